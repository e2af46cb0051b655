"""The chains of an evaluation: who runs which, how often, with which seeds, and what is written."""

import asyncio
import json
from dataclasses import replace

import pytest

import evaluate
import rollout
from reagent.chat import Chat
from reagent.config import parse_config
from reagent.engines import Sample
from reagent.reward_model import RewardModel
from results.benchmarks import load_task
from results.journal import Journal
from tests.evaluation.test_evaluate import row_of, task_of
from tests.helpers.tiny import toy
from tools import Toolbox

CHAT = Chat(toy.make_tokenizer([]))
JUDGMENT = "<think>a</think><critique>look again</critique><score>0.5</score>"


class Says:
    """An engine whose first answer is `first`, the next in a chain `then`; None: it aborts."""

    def __init__(self, first, then="a"):
        self.first, self.then, self.seeds = first, then, []

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0):
        self.seeds.append(seed)
        text = CHAT.decode(ids)
        answer = self.then if "look again" in text else self.first
        if answer is None:
            return Sample([], [], "abort")
        new = [*CHAT.text(f"\\boxed{{{answer}}}"), CHAT.closer_id]
        return Sample(new, [-0.5] * len(new), "stop")


async def ask(question, trajectory, text, seed, seconds):
    return {"message": {"content": JUDGMENT}}


def run(folder, task, engine, *args, rank=0, world=1, refine=False):
    """One rank's share of a task; -> its journal, closed."""
    cfg = parse_config(evaluate.Config, ["--tools=search", *args])
    agent = evaluate.Agent(engine, CHAT, 4096, "", {})
    cfg.refine, rrm = refine, RewardModel(ask) if refine else None
    setup = replace(evaluate.setup_of(cfg, task, agent, Toolbox(["search"])), rrm=rrm)
    journal = Journal(folder, rank)
    asyncio.run(evaluate.run_task(cfg, task, setup, journal, rank, world))
    journal.close()
    return journal


@pytest.fixture
def task(tmp_path):
    made = task_of(tmp_path, [row_of(str(i), f"q{i}?") for i in range(5)], rollouts=2)
    made.longest = ["q0?"]
    return made


def test_a_limit_takes_the_first_questions_and_ids_those_that_are_named(task, tmp_path):
    def chosen(*args):
        cfg = parse_config(evaluate.Config, list(args))
        made = load_task(f"{tmp_path}/rows.jsonl", cfg)
        assert len(made.longest) == 5  # the room for prompts does not hang on it
        return [row["id"] for row in made.rows], made.rollouts

    assert chosen("--limit=2") == (["0", "1"], 1)
    assert chosen("--ids=4,1", "--rollouts=3") == (["1", "4"], 3)
    assert chosen("--ids=4,1", "--limit=1") == (["1"], 1)


def test_the_room_for_prompts_goes_by_the_longest_questions_of_a_set(tmp_path):
    texts = ["x" * n for n in (5, 30, *range(6, 28))]
    rows = [row_of(str(i), text) for i, text in enumerate(texts)]
    rows.append(row_of("f", "short", files=["a-long-name-of-a-file.csv"]))
    toy.write(tmp_path / "rows.jsonl", rows)
    made = load_task(f"{tmp_path}/rows.jsonl", parse_config(evaluate.Config, ["--limit=1"]))
    wanted = [*texts, "short\nFile: a-long-name-of-a-file.csv"]
    assert sorted(made.longest, key=len) == sorted(wanted, key=len)[-20:]


def test_ranks_share_the_questions_and_every_chain_is_run_by_one(task, tmp_path):
    engines = [Says("a"), Says("a")]
    ran = []
    for rank, engine in enumerate(engines):
        run(tmp_path / "out", task, engine, rank=rank, world=2)
        lines = (tmp_path / "out" / f"journal-{rank}.jsonl").read_text().splitlines()
        ran.append(len(lines))
    assert ran == [6, 4] == [len(engine.seeds) for engine in engines]
    whole = Journal(tmp_path / "out")
    assert all(whole.done(key, row) for key, row in task.keys())
    whole.close()


def test_no_two_chains_of_an_evaluation_have_a_seed_in_common(task, tmp_path):
    engine, again, other = Says("a"), Says("a"), Says("a")
    run(tmp_path / "a", task, engine)
    run(tmp_path / "b", task, again)
    run(tmp_path / "c", task, other, "--seed=1")
    assert len(set(engine.seeds)) == 10 and engine.seeds == again.seeds
    assert not set(engine.seeds) & set(other.seeds)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_chain_that_was_aborted_is_tried_so_often_again_and_is_a_fault(task, tmp_path, retries):
    engine = Says(None)
    journal = run(tmp_path / "out", task, engine, f"--retries={retries}")
    assert len(engine.seeds) == 10 * (retries + 1) and not journal.entries
    assert set(journal.faults.values()) == {"aborted"}


def test_the_refined_answer_is_the_one_that_counts(task, tmp_path):
    for first, then in (("wrong", "a"), ("a", "wrong"), (None, "a")):
        refines = first is not None
        out = tmp_path / f"{first}-{then}"
        journal = run(out, task, Says(first or "a", then), refine=refines)
        record = journal.record(("rows", "3", 1))
        assert record["correct"] is (then == "a")
        told = [(each["answer"], each["correct"]) for each in record["attempts"]]
        answers = [first, then] if refines else ["a"]
        assert told == [(answer, answer == "a") for answer in answers]
        assert (record["rollout"], record["status"]) == (1, "answered")


def test_a_set_has_its_own_prompt_unless_the_run_names_one(task, tmp_path, capsys):
    own, given = tmp_path / "own.txt", tmp_path / "given.txt"
    own.write_text("You are the set's .")
    given.write_text("You are the run's .")
    agent = evaluate.Agent(Says("a"), CHAT, 4096, "", {})

    def prompt_of(spec, *args):
        task.spec = spec
        cfg = parse_config(evaluate.Config, list(args))
        return evaluate.setup_of(cfg, task, agent, Toolbox(["search"])).system_prompt

    plain = task.spec
    named = replace(plain, prompt_file=str(own))
    assert prompt_of(plain) == rollout.SYSTEM_PROMPT
    assert prompt_of(named) == own.read_text()
    assert prompt_of(named, f"--prompt_file={given}") == given.read_text()


def test_sets_of_other_seconds_or_tools_have_toolboxes_of_their_own(tmp_path):
    rows = [row_of("1", docs=[{"title": "t", "text": "x"}])]
    tasks = [task_of(tmp_path, rows, name=name) for name in ("a", "b", "c")]
    tasks[1].spec = replace(tasks[1].spec, seconds_per_call=7.0)
    tasks[2].spec = replace(tasks[2].spec, tools="search,browse")
    boxes = evaluate.make_toolboxes(evaluate.Config(), tasks)
    told = {key: (box.cfg.seconds_per_call, box.names) for key, box in boxes.items()}
    assert told == {
        ("search", 30.0): (30.0, ["search"]),
        ("search", 7.0): (7.0, ["search"]),
        ("search,browse", 30.0): (30.0, ["search", "browse"]),
    }


def test_what_tools_are_told_reaches_every_toolbox(tmp_path, monkeypatch):
    """Each option has its own value, so that none can stand in for another."""
    seen = []

    class Noted:
        def __init__(self, names, **options):
            seen.append((names, options))

        def check_rows(self, rows, what):
            seen.append((rows, what))

    monkeypatch.setattr(evaluate, "Toolbox", Noted)
    own = dict(corpus="a", block="b", cache="c", allow="d", files_dir="e")
    keys = [f"--{key}={value}" for key, value in own.items()] + ["--replay", "--unsafe_python"]
    names = ("plain", "file_reader", "image2text", "audio2text")
    tasks = [task_of(tmp_path, [row_of("1")], name=name) for name in names]
    for task in tasks[1:]:
        task.spec = replace(task.spec, tools=f"{task.name},none", seconds_per_call=7.0)
    evaluate.make_toolboxes(parse_config(evaluate.Config, keys), tasks)
    told = own | dict(replay=True, unsafe_python=True)
    wanted = [(["search"], told | dict(files_dir="", seconds_per_call=30.0))]
    wanted.append((tasks[0].rows, "plain"))
    for task in tasks[1:]:
        wanted += [([task.name], told | dict(seconds_per_call=7.0)), (task.rows, task.name)]
    assert seen == wanted


@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (3, 1), (4, 2), (6, 3)])
def test_engines_of_several_ranks_share_the_questions_and_their_other_ranks_follow(
    ranks, tp, task, tmp_path, monkeypatch
):
    shares, followed, finished = [], [], []

    class Engine(Says):
        def follow(self):
            followed.append(rank)

        def finish(self):
            finished.append(rank)

    async def share(cfg, task, setup, journal, place, places):
        shares.append((place, places))

    monkeypatch.setattr(evaluate, "run_task", share)
    keys = [f"--engine.tensor_parallel={tp}", f"--out_dir={tmp_path}"]
    keys += ["--corpus=pages.jsonl"] * (ranks == 3)
    cfg = parse_config(evaluate.Config, keys)
    agent = evaluate.Agent(Engine("a"), CHAT, 4096, "how it is asked", {"model": "what answers"})
    setups = [evaluate.setup_of(cfg, task, agent, Toolbox(["search"]))] * 2
    with asyncio.Runner() as runner:
        for rank in range(ranks):
            whole = dict(rank=rank, world=ranks, group=None)
            evaluate.run_missing(cfg, [task] * 2, None, runner, agent, None, setups, **whole)
    engines = ranks // tp
    assert shares == [(place, engines) for place in range(engines) for _ in range(2)]
    assert followed == [rank for rank in range(ranks) if rank % tp]
    assert finished == [rank for rank in range(ranks) if not rank % tp] * (tp > 1)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["agent"], facts["served"]) == (agent.how, agent.served)
    assert facts["subsets"] == {"rows": task.subset}
    assert facts["search"] == ("local pages pages.jsonl" if ranks == 3 else "no provider")


@pytest.mark.parametrize("live", [3, 200])
def test_a_server_is_asked_by_as_many_chains_as_may_live(live, monkeypatch):
    made = []

    def endpoint(url, key, most):
        made.append((url, key, most))
        raise ZeroDivisionError

    monkeypatch.setattr("reagent.served.endpoint_of", endpoint)
    keys = ["--model=http://a/v1", f"--engine.max_live_chains={live}"]
    with pytest.raises(ZeroDivisionError):
        evaluate.served_agent(parse_config(evaluate.Config, keys), None)
    assert made == [("http://a/v1", "MODEL_API_KEY", live)]


def test_limits_are_those_that_were_asked_for_where_they_fit(task):
    agent = evaluate.Agent(Says("a"), CHAT, 4096, "", {})

    def limits(*args):
        cfg = parse_config(evaluate.Config, list(args))
        return evaluate.limits_of(cfg, task, agent, "", [])

    asked = limits("--max_tokens_per_attempt=900", "--max_new_tokens_per_turn=70")
    assert (asked.max_tokens_per_attempt, asked.max_new_tokens_per_turn) == (900, 70)
    assert asked.max_turns == task.spec.max_turns == 30 and asked.final_tokens == 225
    assert limits("--max_context=2000").max_context == 2000
    assert limits("--max_context=9000").max_context == 4096
    room = limits()
    assert room.max_new_tokens_per_turn == room.max_tokens_per_attempt


@pytest.mark.parametrize("given, held", [(0, 4096), (2000, 2000), (9000, 4096)])
def test_an_engine_holds_the_positions_that_a_chain_may_have(given, held, monkeypatch):
    made = []
    monkeypatch.setattr(evaluate.engines, "make_engine", lambda *a, **more: made.append((a, more)))
    cfg = parse_config(evaluate.Config, ["--model=m", f"--max_context={given}"])
    evaluate.start_engine(cfg, evaluate.Agent(None, CHAT, 4096, "", {}), "group")
    assert made == [((cfg.engine, "m", CHAT.stop_ids), dict(max_context=held, tp_group="group"))]


@pytest.mark.parametrize(
    "answer, right, status",
    [("x y", True, "answered"), ("x z", False, "answered"), (None, False, "no_answer")],
)
def test_a_record_says_how_a_chain_ended_and_pays_only_what_is_right(
    answer, right, status, tmp_path
):
    task = task_of(tmp_path, [row_of("1", answer="x y")])
    ((_, row),) = task.keys()
    attempt = rollout.Attempt((1, 2), (0, 1), answer, "answered", 0)
    episode = rollout.Episode("1", "q?", ["a b"], [5, 6], [0, 1], [-0.5], [], 0, [attempt])
    record = evaluate.record_of(episode, task, row, 3)
    told = record["attempts"][0]
    assert (record["status"], record["correct"], record["rollout"]) == (status, right, 3)
    assert (told["rule_reward"], told["correct"]) == (float(right), right)
    assert (record["tokens"], record["sampled"]) == (2, 1)
