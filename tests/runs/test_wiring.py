"""What main() of each trainer does between its pure functions: three steps in this process, seen at
the seams, resumed to the bit, and with numbers written down once.
"""

import json
import random
import shutil
import statistics
from dataclasses import asdict
from functools import partial
from inspect import getclosurevars
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo_unified
import sft
import train_rrm
from data.report.markdown import report_table
from grpo_unified import kept_pools
from reagent.config import flat, load_script
from reagent.engines import HFEngine, Sample
from reagent.reward_model import Judgment, RewardModelConfig
from reagent.run import Run, checkpoints
from tests.helpers.tiny import toy, toy_world
from tests.helpers.trainers import Seen, run_here, trained_tokens
from tests.runs.test_jobs import final_state
from tools import Toolbox

COMMON = (
    "--steps=3",
    "--lr=1e-3",
    "--lr_end=0.4",
    "--max_grad_norm=0.02",
    "--weight_decay=0.03",
    "--policy.tokens_per_microbatch=300",
    "--save_interval=2",
    "--seed=7",
    "--policy.checkpoint_activations=false",
    "--timeout_s=100",
)
RRM = (
    "--judgments_per_step=4",
    "--warmup_steps=2",
    "--engine=hf",
    "--max_context=1024",
    "--eval_interval=2",
    "--keep_last=0",
    "--log_interval=3",
    "--temperature=0.8",
)
U = (
    "--engine=hf",
    "--tools=search",
    "--prompts_per_step=4",
    "--prompts_per_minibatch=2",
    "--group_size=2",
    "--temperature=0.8",
    "--kl_coef=0.1",
    "--max_turns=2",
    "--max_new_tokens_per_turn=12",
    "--max_tokens_per_attempt=100",
    "--max_context=700",
    "--max_dlogp=1e-3",
    "--rrm_weight=0.3",
    "--fixed_critique=Look again at Rome.",
    "--eval_interval=1",
    "--keep_last=1",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, rng = toy_world(tmp_path_factory.mktemp("world"), heads=1, kv_heads=1), random.Random(0)
    toy.write(folder / "rrm.jsonl", (toy.rrm_row(rng, i) for i in range(32)))
    toy.write(folder / "held.jsonl", (toy.rrm_test_row(rng, i) for i in range(2)))
    (folder / "rrm.py").write_text(ANNOTATE)
    held = [toy.rl_row(rng, i, "test") for i in range(2)]
    toy.write(folder / "eval.jsonl", [*held, TOO_LONG | {"docs": held[0]["docs"]}])
    return folder


# a question that leaves its chain no room
TOO_LONG = {"id": "long-9", "question": "Where is Rome ? " * 300, "answer": "x", "kind": "qa"}

# the reward model of these runs: at some questions every attempt has the same score
ANNOTATE = """
def same_for_all(question):
    return sum(map(ord, question)) % 4 == 0

def annotate(question, turns):
    score = .5 if same_for_all(question) else sum(map(ord, turns[-1]["content"])) % 101 / 100
    return f"<think>Read.</think><critique>Look.</critique><score>{score}</score>"
"""


def any_judgment(chat, sample):
    """An untrained reward model writes no valid judgment: here every text counts as one."""
    words = f"Look at page {sum(sample.ids) % 7} once more."
    return Judgment("It did not read all pages.", words, sum(sample.ids) % 101 / 100)


class Rules:
    """In place of the rule reward, to an untrained agent that answers nothing: some attempts at a
    question are right, by their order, every four alike. `of`: id -> what was said of it.
    """

    def __init__(self):
        self.of = {}

    def __call__(self, row, answer):
        said, number = self.of.setdefault(row["id"], []), sum(map(ord, row["question"]))
        flat = number % 4 == 0 and "train" in row["id"]  # as the scores of `same_for_all`
        right = not flat and (number + len(said) % 4 + int(row["id"][-1])) % 3 == 0
        said.append(right)
        return float(right), right


def run_u(world, out, *more):
    with pytest.MonkeyPatch.context() as patch:
        seen, rules = Seen(patch), Rules()
        for name in ("kept_pools", "pooled_advantages", "grpo_loss", "step_metrics"):
            seen.note(grpo_unified, name, told_as(name))
        patch.setattr(grpo_unified, "rule_reward", rules)
        seen.note(grpo_unified.rollout, "run_chains", told_keys)
        seen.note(grpo_unified, "training_sequences", told_minibatch, after=True)
        seen.note(grpo_unified, "has_fallen", lambda aucs: ("aucs", list(aucs)))
        seen.note(grpo_unified.engines, "rest", lambda engine: ("rest",))
        seen.note(grpo_unified, "make_policy", told_seed)
        files = [f"--model={world}/model", f"--data={world}/rl.jsonl", f"--rrm={world}/rrm.py"]
        files.append("--rrm.seconds=50")
        files += [f"--eval_data={world}/eval.jsonl", f"--out_dir={out}"]
        log = run_here(grpo_unified, [*COMMON, *U, *files, *more], seen.reads)
    return SimpleNamespace(seen=seen, log=log, out=out, rules=rules)


LONGEST = 90  # tokens of a row of the cold start: one has as many, some are longer


def told_rows(policy, optimizer, rows, *_):
    return "rows", [row.ids for row in rows]


def told_as(name):
    return lambda *args, **options: (name, args, options)


def told_seed(*_):
    return "seed", torch.initial_seed()


def told_keys(jobs, *_):
    return "rollout", [key for _, key in jobs]


def told_report(report, judgments, rows, lengths):
    return "report", report, rows, lengths


def told_minibatch(sequences, episodes, advantages, group, loss_agg):
    return "minibatch", sequences, episodes, advantages, group


def run_rrm(stage, world, out, *more):
    new = "16" if stage == "grpo" else "48"
    own = [f"--stage={stage}", "--group_size=2", f"--max_judgment_tokens={new}"]
    own += [f"--model={world}/model", f"--data={world}/rrm.jsonl", f"--out_dir={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rrm, "read_judgment", any_judgment)
        seen = Seen(patch)
        seen.note(train_rrm, "rest", lambda engine: ("rest",))
        seen.note(train_rrm, "make_policy", told_seed)
        seen.note(train_rrm, "judgment_report", told_report, after=True)
        seen.note(train_rrm, "update", lambda _, __, rows, *___: ("rows", [r.ids for r in rows]))
        own.append(f"--eval_data={world}/held.jsonl")
        log = run_here(train_rrm, [*COMMON, *RRM, *own, *more], seen.reads)
    return SimpleNamespace(seen=seen, log=log, out=out, stage=stage)


def run_sft(world, out, *more):
    own = ["--rows_per_step=4", "--warmup_steps=2", "--keep_last=0", "--beta2=0.95"]
    own.append("--log_interval=2")
    own.append(f"--max_tokens_per_row={LONGEST}")
    own += [f"--model={world}/model", f"--data={world}/sft.jsonl", f"--out_dir={out}"]
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        seen.note(sft, "update", told_rows)
        seen.note(sft, "make_policy", told_seed)
        log = run_here(sft, [*COMMON, *own, *more], seen.reads)
    return SimpleNamespace(seen=seen, log=log, out=out)


@pytest.fixture(scope="module")
def u(world, tmp_path_factory):
    """Reagent-U."""
    return run_u(world, tmp_path_factory.mktemp("u"))


@pytest.fixture(scope="module", params=["sft", "grpo"])
def rrm(request, world, tmp_path_factory):
    """The two stages of the reward model."""
    return run_rrm(request.param, world, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def cold(world, tmp_path_factory):
    """The cold start."""
    return run_sft(world, tmp_path_factory.mktemp("cold"))


def check_closed(run):
    """vLLM's engine would end torch.distributed too, at exit, and fail: a traceback below a run
    that went well.
    """
    last = [event for event in run.seen.events if event in (("close",), ("meet", "the end"))]
    assert last == [("close",), ("meet", "the end")]


def test_reagent_u_closes_its_engine_before_torch_distributed_ends(u):
    check_closed(u)


def test_the_reward_models_training_closes_its_engine_before_torch_distributed_ends(rrm):
    check_closed(rrm)


WARM = [5e-4, 1e-3, 1e-3]  # two steps of warm-up, then the top of the cosine


def check_updates(run, rates, per_step=1, beta2=0.999):
    """The optimizer steps with the logged rate, the settings that were given and a clipped
    gradient; the log has the norm before it was clipped.
    """
    steps, log = run.seen.of("step"), [line for line in run.log if line["step"]]
    assert [lr for lr, *_ in steps] == pytest.approx([r for r in rates for _ in range(per_step)])
    assert [line["lr"] for line in log] == pytest.approx(rates)
    assert all(norm == pytest.approx(0.02, rel=1e-3) for _, norm, _ in steps)
    assert {settings for *_, settings in steps} == {(0.03, 0.9, beta2)}
    assert all(line["grad_norm"] > 0.03 and not line["skipped"] for line in log)


def test_the_cold_start_steps_with_its_schedule_and_a_clipped_gradient(cold):
    check_updates(cold, WARM, beta2=0.95)


def test_the_cold_start_takes_new_rows_at_every_step_and_none_that_is_too_long(cold):
    taken = [rows for (rows,) in cold.seen.of("rows")]
    told = [(4 - len(rows), sum(map(len, rows))) for rows in taken]
    assert told == [(line["too_long"], line["tokens"]) for line in cold.log]
    whole = [tuple(ids) for rows in taken for ids in rows]
    assert 3 < len(set(whole)) == len(whole) < 12 and max(map(len, whole)) == LONGEST


def test_the_reward_model_steps_with_its_schedule_and_a_clipped_gradient(rrm):
    check_updates(rrm, WARM)


def test_the_agent_steps_with_its_schedule_and_a_clipped_gradient(u):
    check_updates(u, [1e-3, 7e-4, 4e-4], per_step=2)


def test_the_sampler_gets_the_weights_of_every_update_before_it_is_asked_again(u, rrm):
    for run in (u, rrm):
        kinds = [event[0] for event in run.seen.events]
        kinds = [kind for kind in kinds if kind in ("step", "sync", "ask", "rest")]
        after = set(zip(kinds, kinds[1:]))
        assert not after & {("step", "ask"), ("rest", "ask")} and "ask" in kinds
        assert ("ask", "step") not in after  # an engine that can sleep has given its memory back
        assert all(line.get("dlogp/mean", 0.0) < 1e-5 for line in run.log)


UNREAD = {  # on a CPU, by transformers, with a reward model of a file
    "cold": set(),
    "sft": set(
        "engine.max_live_chains engine.memory_share engine.sleep engine.tensor_parallel "
        "temperature group_size clip_low clip_high "
        "agreement_weight closeness_weight critique_weight leak_penalty".split()
    ),
    "grpo": set(
        "engine.max_live_chains engine.memory_share engine.sleep engine.tensor_parallel "
        "max_tokens_per_row verdict_weight leak_penalty".split()  # nothing leaks here
    ),
    "u": set(
        "engine.memory_share engine.sleep rrm.memory_share rrm.model rrm.in_flight "
        "rrm.max_context rrm.max_tokens rrm.temperature".split()
    ),
}


def test_every_key_of_a_config_is_read_where_its_run_has_a_use_for_it(cold, rrm, u):
    runs = [("cold", cold, sft), (rrm.stage, rrm, train_rrm), ("u", u, grpo_unified)]
    for name, run, script in runs:
        assert set(flat(asdict(script.Config()))) - run.seen.reads == UNREAD[name]


def test_what_is_random_in_a_policys_start_hangs_on_the_seed_of_the_run(cold, rrm, u):
    """Adapters: an engine that was made before has left torch's generator anywhere."""
    assert [run.seen.of("seed") for run in (cold, rrm, u)] == [[(7,)]] * 3


def test_no_turn_is_asked_for_more_tokens_than_a_turn_may_have(u):
    assert {most for *_, most in u.seen.of("ask")} == {12}


def test_a_step_is_printed_at_its_interval_and_where_it_is_evaluated(cold, rrm, u):
    assert [step for step, quiet in cold.seen.of("write") if not quiet] == [2]
    assert [step for step, quiet in rrm.seen.of("write") if not quiet] == [2, 3]
    assert [step for step, quiet in u.seen.of("write") if not quiet] == [1, 2, 3]


def test_ranks_meet_after_the_sampling_of_judgments(rrm):
    kinds = [event[0] if event[0] == "ask" else event[-1] for event in rrm.seen.events]
    last = len(kinds) - 1 - kinds[::-1].index("ask")
    assert kinds[last + 1] == "the sampling of judgments"


class Left(Exception):
    """Leaves a main() at the seam where a test has seen enough."""


async def what_was_asked(_, ids, *, seed, temperature, max_new_tokens) -> Sample:
    """In place of an engine's `generate`: its text is the request."""
    return Sample([*ids, seed, round(10 * temperature), max_new_tokens], [], "stop")


def sampled_by(ranks: int, sample, prompts, seeds) -> tuple[list, list]:
    """(what each rank samples, what each gets), one rank after another; what the others bring to
    their meeting is known in the second round.
    """
    run, shares, gather = getclosurevars(sample).nonlocals["run"], [], Run.gather
    own = run.rank, run.world

    def bring(mine):
        shares.append(mine)
        raise Left

    run.world, run.gather = ranks, bring
    for run.rank in range(ranks):
        with pytest.raises(Left):
            sample(prompts, seeds, 0.5)
    run.gather, got = lambda _: shares, []
    for run.rank in range(ranks):
        got.append(sample(prompts, seeds, 0.5))
    (run.rank, run.world), run.gather = own, partial(gather, run)
    return shares, got


def test_ranks_share_the_sampling_of_judgments_and_all_get_all_in_the_order_of_rows(
    world, tmp_path, monkeypatch
):
    seen = []

    def see(chat, rows, sample, *_):
        for ranks, rows in product((1, 2, 3), (1, 6, 7)):
            prompts, seeds = [[i] for i in range(rows)], [900 - i for i in range(rows)]
            seen.append((ranks, rows, *sampled_by(ranks, sample, prompts, seeds)))
        raise Left

    monkeypatch.setattr(train_rrm, "grpo_batch", see)
    monkeypatch.setattr(HFEngine, "generate", what_was_asked)
    with pytest.raises(Left):
        run_rrm("grpo", world, tmp_path)
    for ranks, rows, shares, got in seen:
        wanted = [[i, 900 - i, 5, 16] for i in range(rows)]
        once = sorted(sample.ids for share in shares for sample in share)
        assert once == wanted and len(seen) == 9
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert [[sample.ids for sample in of] for of in got] == [wanted] * ranks


async def keys_of_chains(jobs, setup, most, *more):
    """In place of `run_chains`: each episode is the key of its chain. What they share is as the
    config says, and at most 5 live at a time.
    """
    ends = dict(max_seconds_per_chain=1800.0, final_tokens=12)
    assert most == 5 and setup.limits == grpo_unified.rollout.Limits(2, 12, 100, 700, **ends)
    assert (setup.refine, setup.temperature, setup.top_p) == (True, 0.8, 1.0)
    assert (setup.fixed_critique, setup.policy_version) == ("Look again at Rome.", 0)
    return [SimpleNamespace(packed=partial(str, key)) for _, key in jobs]


def test_engines_of_two_ranks_share_the_questions_and_all_get_all_in_order(
    world, tmp_path, monkeypatch
):
    """Four ranks in this process, one after another, then one of them again with the shares of all;
    the second and the fourth follow the others.
    """
    shares, followed, got = [], [], []

    class OneOfFour(Run):
        def __init__(self, *given):
            super().__init__(*given)
            self.rank, self.world = rank, 4

        def gather(self, mine):
            if mine == "":  # what the reward model had to say
                return [""] * 4
            if rank == len(shares):
                shares.append(mine)
                raise Left
            return shares

    def leave(episodes, *_):
        got.extend(episodes)
        raise Left

    monkeypatch.setattr(grpo_unified, "Run", OneOfFour)
    monkeypatch.setattr(grpo_unified, "engine_group", lambda *_: None)
    monkeypatch.setattr(HFEngine, "follow", lambda _: followed.append(rank), raising=False)
    monkeypatch.setattr(grpo_unified.rollout, "run_chains", keys_of_chains)
    monkeypatch.setattr(grpo_unified, "set_rewards", leave)
    for rank in (0, 1, 2, 3, 2):
        with pytest.raises(Left):
            engine = ("--engine.tensor_parallel=2", "--engine.max_live_chains=5")
            run_u(world, tmp_path / f"{len(shares)}", *engine, "--eval_data=")
    chains = [[str((7, 0, question, g)) for g in range(2)] for question in range(4)]
    assert shares == [[*chains[0], *chains[2]], [], [*chains[1], *chains[3]], []]
    assert followed == [1, 3] and got == sum(chains, [])


def test_no_two_judgments_of_a_run_are_asked_for_with_one_seed(rrm):
    held = {seed for seed, *_ in rrm.seen.of("ask")[-2:]}  # the same at every evaluation
    assert len(held) == 2
    asked = [seed for seed, *_ in rrm.seen.of("ask") if seed not in held]
    assert len(set(asked)) == len(asked) == (24 if rrm.stage == "grpo" else 0)
    told = rrm.seen.of("ask")
    assert {most for *_, most in told} == {16 if rrm.stage == "grpo" else 48}
    temperatures = {(seed in held, temperature) for seed, _, temperature, _ in told}
    at_work = {(True, RewardModelConfig.temperature)}
    assert temperatures == at_work | ({(False, 0.8)} if rrm.stage == "grpo" else set())


def test_no_two_turns_of_a_run_are_asked_for_with_one_seed(u):
    training, asked = False, []
    for event in u.seen.events:
        if event[0] == "rollout":
            training = event[1][0][1] != "eval"
        elif event[0] == "ask" and training:
            asked.append(event[1])
    assert len(set(asked)) == len(asked) >= 3 * 16


def test_chains_of_a_step_have_keys_of_their_own(u):
    rollouts = [keys for (keys,) in u.seen.of("rollout")]
    assert [keys[0][1] for keys in rollouts] == ["eval", 0, "eval", 1, "eval", 2, "eval"]
    assert all(len(set(keys)) == len(keys) == 8 for keys in rollouts[1::2])
    assert {key for keys in rollouts[::2] for key in keys} == {(7, "eval", 0)}  # they compare
    assert {key[0] for keys in rollouts for key in keys} == {7}  # the seed of the run


def advantages_of(episodes) -> dict[int, float]:
    """{id of an attempt: its advantage} from rule rewards and scores, with lambda = .3."""
    pools = {}
    for episode in episodes:
        for attempt in episode.attempts:
            if attempt.score is not None and not episode.dropped:
                reward = attempt.rule_reward + 0.3 * attempt.score
                pools.setdefault(episode.id, {})[id(attempt)] = reward
    wanted = {}
    for pool in pools.values():
        mean, std = statistics.mean(pool.values()), statistics.stdev(pool.values())
        wanted |= {name: (reward - mean) / (std + 1e-6) for name, reward in pool.items()}
    return wanted


def test_every_minibatch_is_trained_with_the_advantages_of_its_own_pools(u):
    minibatches = u.seen.of("minibatch")
    for _, episodes, advantages, group in minibatches:
        wanted = advantages_of(episodes)
        assert group == 2 and advantages.shape == (len(episodes) // 2, 2, 2)
        for i, episode in enumerate(episodes):
            for stage, attempt in enumerate(episode.attempts):
                got = advantages[i // 2, stage, i % 2].item()
                assert got == pytest.approx(wanted[id(attempt)], abs=1e-6)
    assert len(minibatches) == 6 and any(abs(a).max() > 0 for _, _, a, _ in minibatches)


def test_pools_without_spread_train_nothing_and_count_nowhere(u, world):
    left_out, same_for_all = 0, load_script(f"{world}/rrm.py").same_for_all
    for sequences, episodes, _, _ in u.seen.of("minibatch"):
        left_out += 2 - len({episode.id for episode in episodes})
        assert not any(same_for_all(e.question) for e in episodes)
        weights = [w for sequence in sequences for w in sequence.columns["weight"]]
        assert sum(weights) == pytest.approx(1.0)
    assert left_out and sum(line["pools/dropped"] for line in u.log[1:]) == left_out / 4


def test_refinement_reads_the_fixed_critique(u):
    episodes = [json.loads(line) for line in open(u.out / "episodes" / "step-000001.jsonl")]
    turns = [m["content"] for e in episodes for m in e["messages"] if m["role"] == "user"]
    told = [text for text in turns if "reviewer" in text]
    assert len(told) == 8 and all("Look again at Rome." in text for text in told)


def test_evaluations_are_of_first_and_refined_answers_and_the_first_of_the_best_is_kept(u, world):
    *rows, _ = [json.loads(line) for line in open(world / "eval.jsonl")]  # one is too long
    said = [u.rules.of[row["id"]] for row in rows]  # an evaluation: first, refined
    for name, stage in (("eval/first", 0), ("eval/refined", 1)):
        shares = [sum(of[2 * i + stage] for of in said) / 3 for i in range(4)]
        assert [line[name] for line in u.log] == shares
    first = [line["eval/first"] for line in u.log[1:]]
    best = {"step": 1 + first.index(max(first)), "accuracy": max(first)}
    newest = checkpoints(u.out)[-1]
    assert json.loads((newest / "trainer.json").read_text())["best"] == best
    kept = sorted({best["step"], 3})
    assert [path.name for path in checkpoints(u.out)] == [f"step-{n:06d}" for n in kept]
    assert len(kept) == 2 and first.count(max(first)) == 2  # else this shows less than it says


def test_the_figures_of_a_step_are_those_of_its_episodes(u):
    for line in u.log[1:]:
        path = u.out / "episodes" / f"step-{line['step']:06d}.jsonl"
        episodes = [json.loads(text) for text in open(path)]
        assert {e["policy_version"] for e in episodes} == {line["step"] - 1}
        everything = [a for e in episodes for a in e["attempts"]]
        for stage, name in enumerate(("first", "refined")):
            attempts = [e["attempts"][stage] for e in episodes]
            for key, field in (("accuracy", "correct"), ("reward", "reward"), ("score", "score")):
                mean = statistics.mean(float(a[field]) for a in attempts)
                assert line[f"{key}/{name}"] == pytest.approx(mean, abs=1e-6)
        for name, right in (("right", True), ("wrong", False)):
            scores = [a["score"] for a in everything if a["correct"] is right]
            assert line[f"score/{name}"] == pytest.approx(statistics.mean(scores), abs=1e-6)
        assert line["attempts"] == len(everything) == line["judge/asked"] == 16
        assert line["judge/failed"] == 0 and line["tokens"] == sum(e["tokens"] for e in episodes)
        assert line["trained_tokens"] == trained_tokens(u.out, line["step"])


def test_the_alarm_sees_every_auc_of_the_run_up_to_its_own_step(u):
    aucs = [line["score/auc"] for line in u.log if "score/auc" in line]
    assert [told for (told,) in u.seen.of("aucs")] == [aucs[: i + 1] for i in range(len(aucs))]
    assert aucs


def test_checkpoints_are_saved_at_their_interval_at_the_end_and_where_an_evaluation_is_best(
    cold, rrm, u
):
    assert [step for (step,) in cold.seen.of("save")] == [2, 3]
    assert [step for (step,) in rrm.seen.of("save")] == [2, 3]
    assert [step for (step,) in u.seen.of("save")] == [1, 2, 3]


def test_the_reward_model_is_evaluated_on_the_held_out_rows_and_its_report_is_of_the_last_one(
    rrm, world
):
    evaluated = [line for line in rrm.log if "eval/valid" in line]
    assert [line["step"] for line in evaluated] == [2, 3]
    held = [json.loads(line) for line in open(world / "held.jsonl")]
    reports = rrm.seen.of("report")
    assert [rows for _, rows, _ in reports] == [held, held]
    for line, (report, _, lengths) in zip(evaluated, reports):
        assert len(lengths) == 2 and line["eval/too_long"] == 0
        assert all(0 < tokens <= 48 for tokens in lengths)  # of judgments: prompts have hundreds
        assert all(line[f"eval/{name}"] == value for name, value in report.items())
    final = reports[-1][0] | {"too_long": 0}
    assert (rrm.out / "report.md").read_text() == report_table(final)


def test_the_tokens_of_a_step_are_those_of_its_prompts_and_judgments(rrm):
    taken = [sum(map(len, rows)) for (rows,) in rrm.seen.of("rows")]
    assert [line["tokens"] for line in rrm.log] == taken and len(taken) == 3


def test_the_kl_term_measures_how_far_the_policy_has_moved(u):
    assert all(abs(line["kl"]) > 1e-4 for line in u.log[1:])


@pytest.mark.parametrize("variant", ["r", "rule"])
def test_what_a_run_is_told_reaches_its_chains_its_pools_and_its_loss(
    variant, world, tmp_path, monkeypatch, capsys
):
    closed, clock = [], (2.0**n for n in range(99))
    monkeypatch.setattr(Toolbox, "close", lambda toolbox: closed.append(toolbox))
    monkeypatch.setattr(grpo_unified, "time", SimpleNamespace(perf_counter=partial(next, clock)))
    gather = Run.gather  # as if there were a second rank, whose sampler is further off
    monkeypatch.setattr(Run, "gather", lambda run, own: further(gather(run, own)))
    monkeypatch.setattr(grpo_unified, "kept_pools", without_the_first)
    (tmp_path / "prompt.txt").write_text("Look at it .")
    told = ["--steps=1", f"--variant={variant}", "--pool=per_stage", "--drop=release"]
    told += ["--loss_agg=token_mean", "--max_seconds_per_chain=0", "--clip_low=0.1"]
    told += [f"--prompt_file={tmp_path}/prompt.txt", "--group_size=4"]
    told.append(f"--eval_data={one_right_and_one_too_long(world, tmp_path)}")
    run = run_u(world, tmp_path / "out", *told)
    assert run.log[0] == {"step": 0, "eval/first": 0.5}  # of all questions
    check_told(run, capsys.readouterr().out)
    assert len(closed) == 1 and (run.out / "report.html").is_file()
    (((rewards, rules, drop), _),) = run.seen.of("kept_pools")
    assert drop == "release" and not rules[:, 1].isfinite().any()
    assert {tuple(options.items()) for _, options in run.seen.of("pooled_advantages")} == {
        (("pool", "per_stage"),),
        (),
    }
    ((_, _, _, advantages, kept),) = [args for args, _ in run.seen.of("step_metrics")]
    assert not kept.all() and not advantages[~kept].any() and advantages[kept].any()
    assert run.log[-1]["dlogp/max"] > 1 > run.log[-1]["dlogp/mean"]
    kinds = {(options["clip_low"], options["clip_high"]) for _, options in run.seen.of("grpo_loss")}
    assert kinds == {(0.1, 0.34)}
    written = lines_of(run.out)
    for i, episode in enumerate(written):
        (attempt,) = episode["attempts"]
        assert episode["messages"][0] == {"role": "system", "content": "Look at it ."}
        bonus = 0.3 * attempt["score"] if variant == "r" else 0.0
        assert rules[i // 4, 0, i % 4].item() == attempt["rule_reward"]
        assert rewards[i // 4, 0, i % 4].item() == pytest.approx(attempt["rule_reward"] + bonus)
    assert len(written) == 16 and rules[:, 0].sum() > 0
    for sequences, *_ in run.seen.of("minibatch"):
        weights = {w for sequence in sequences for w in sequence.columns["weight"]}
        assert len(weights) <= 1  # a mean over tokens


def without_the_first(rewards, rules, drop):
    """As if a rule dropped the first pool that has a gradient."""
    kept = kept_pools(rewards, rules, drop)
    kept[kept.nonzero()[0]] = False
    return kept


def one_right_and_one_too_long(world, folder):
    """Two questions: the agent is right at the first by `Rules`, the other leaves it no room."""
    row = json.loads((world / "eval.jsonl").read_text().splitlines()[0])
    right = -sum(map(ord, row["question"])) % 3
    toy.write(folder / "eval.jsonl", [row | {"id": f"right-{right}"}, row | TOO_LONG])
    return folder / "eval.jsonl"


def check_told(run, printed: str) -> None:
    """What a run of one step prints and times, by a clock that doubles at every look."""
    line, written = run.log[-1], lines_of(run.out)
    began, rollout, train, sync, ended, end = (2.0**n for n in range(6))
    seconds = {"rollout": train - rollout, "train": sync - train, "sync": ended - sync}
    assert seconds | {"step": end - began} == {
        name.partition("/")[2]: line[name] for name in line if name.startswith("seconds/")
    }
    assert line["tokens_per_second"] == round(line["tokens"] / (ended - rollout))
    assert "4 questions x 4 attempts a step" in printed
    for episode in (written[0], written[-1]):
        (a,) = episode["attempts"]
        earned = f"answer {a['answer']}, reward {a['reward']}, score {a['score']}"
        assert f"--- {episode['id']}\n" in printed and f"[{a['termination']}, {earned}]" in printed
    assert written[0]["id"] != written[-1]["id"]


def further(told: list) -> list:
    return told + [of + 1 for of in told if isinstance(of, float)]


def lines_of(out):
    return [json.loads(line) for line in open(out / "episodes" / "step-000001.jsonl")]


@pytest.mark.parametrize("trainer", ["cold", "rrm", "agent"])
def test_a_run_that_is_asked_to_stop_saves_the_step_that_it_has_done(
    trainer, world, tmp_path, monkeypatch
):
    asked = iter([False, True] if trainer == "agent" else [True])
    monkeypatch.setattr(Run, "stopping", lambda _: next(asked))
    runs = {"cold": run_sft, "rrm": partial(run_rrm, "sft"), "agent": run_u}
    run = runs[trainer](world, tmp_path)
    assert [line["step"] for line in run.log if line["step"]] == [1]
    assert run.seen.of("save") == [(1,)]


def test_a_stop_while_judgments_are_sampled_saves_the_steps_before(world, tmp_path, monkeypatch):
    asked = iter([False, False, True])  # in the first step, behind it, in the second
    monkeypatch.setattr(Run, "stopping", lambda _: next(asked))
    run = run_rrm("grpo", world, tmp_path)
    assert [line["step"] for line in run.log] == [1] and run.seen.of("save") == [(1,)]


@pytest.mark.parametrize("trainer", ["cold", "rrm", "agent"])
def test_a_first_step_that_is_skipped_ends_the_run(trainer, world, tmp_path, monkeypatch):
    line = dict(loss=1.0, grad_norm=1.0, skipped="loss nan")
    line |= dict(norms=[1.0], worst=0.0) | dict.fromkeys(grpo_unified.SUMS, 1.0)
    for script in (sft, train_rrm, grpo_unified):
        monkeypatch.setattr(script, "update", lambda *_: line)
    runs = {"cold": run_sft, "rrm": partial(run_rrm, "sft"), "agent": run_u}
    with pytest.raises(SystemExit, match="step 1: loss nan"):
        runs[trainer](world, tmp_path)


def resumed(run, tmp_path, at: int, again) -> None:
    """The run that goes on from a checkpoint leaves what the run that was never stopped left."""
    for name in (f"step-{at:06d}", f"trainer/step-{at:06d}"):
        shutil.copytree(run.out / name, tmp_path / name)
    if (run.out / "episodes").exists():
        shutil.copytree(run.out / "episodes", tmp_path / "episodes")
        for path in sorted((tmp_path / "episodes").glob("*.*"))[2 * at :]:
            path.unlink()
    again(tmp_path)
    straight, resumed = final_state(run.out, 3), final_state(tmp_path, 3)
    for name, a, b in zip(("weights", "log", "episodes", "optimizer"), straight, resumed):
        assert a == b, name


def test_a_resumed_cold_start_is_the_same_to_the_bit(cold, world, tmp_path):
    resumed(cold, tmp_path, 2, lambda out: run_sft(world, out))


def test_a_resumed_reward_model_is_the_same_to_the_bit(rrm, world, tmp_path):
    resumed(rrm, tmp_path, 2, lambda out: run_rrm(rrm.stage, world, out))


def test_a_resumed_agent_is_the_same_to_the_bit(u, world, tmp_path):
    resumed(u, tmp_path, 1, lambda out: run_u(world, out))


def test_a_run_takes_more_steps_where_no_schedule_hangs_on_their_number(cold, world, tmp_path):
    with pytest.raises(SystemExit, match="steps: 3 -> 4, lr: 0.001 -> 0.002"):
        run_sft(world, cold.out, "--steps=4", "--lr=2e-3")
    for steps in (1, 2):
        longer = run_sft(world, tmp_path, "--lr_end=1", f"--steps={steps}")
        assert [line["step"] for line in longer.log] == [1, 2][:steps]
    straight = run_sft(world, tmp_path / "straight", "--lr_end=1", "--steps=2")
    assert final_state(straight.out, 2) == final_state(tmp_path, 2)


GOLDEN = {  # of the last step: loss, norm of the gradient; how the weights moved
    "cold": (5.7096829414, 3.2681522369, 0.3763596886),
    "sft": (5.7838401794, 1.6764867306, -0.0954612454),
    "grpo": (0.0, 1.0770618916, 0.0246982957),
    "u": (0.0013980418, 1.1915147305, -0.2375926576),
}


def check_numbers(run, world, name):
    """Written down once, 2026-11-30: a change of the arithmetic shows here, also where a resumed
    run is changed with the straight one. The weights' move is its product with one wave. Where a
    prompt, a template or a seed was changed on purpose, the new numbers are written down.
    """
    start = load_file(world / "model" / "model.safetensors")
    end = load_file(checkpoints(run.out)[-1] / "model.safetensors")
    moves = torch.cat([(end[name] - start[name]).flatten() for name in sorted(start)]).double()
    moved = (moves * torch.arange(len(moves)).double().cos()).sum().item()
    loss, norm, move = GOLDEN[name]
    assert run.log[-1]["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-6)
    assert run.log[-1]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert moved == pytest.approx(move, abs=2e-3)


def test_the_numbers_of_the_cold_start(cold, world):
    check_numbers(cold, world, "cold")


def test_the_numbers_of_the_reward_model(rrm, world):
    check_numbers(rrm, world, rrm.stage)


def test_the_numbers_of_the_agent(u, world):
    check_numbers(u, world, "u")
