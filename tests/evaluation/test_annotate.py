"""Making RRM rows: a teacher over real HTTP that fails in every way, balance, going on; critique
lift; paired bootstrap.
"""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import json
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import rollout
from data import annotate as annotation
from data import at_work, compare_rrm
from reagent import reward_model
from reagent.config import parse_config
from reagent.reward_model import Judgment, RewardModelConfig
from tests.helpers.judge_server import hashed_judgment, judge_server
from tests.helpers.tiny import ROOT, toy, toy_world
from tests.helpers.trainers import note_reads, unread

LIMITS = [
    "--engine=hf",
    "--tools=search",
    "--max_turns=2",
    "--max_new_tokens_per_turn=12",
    "--max_tokens_per_attempt=200",
    "--max_context=600",
    "--teacher.max_context=4000",
    "--teacher.max_tokens=1000",
    "--temperature=1.0",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy_world(tmp_path_factory.mktemp("world"), demonstrations=0, questions=6)


def annotate(world, out, url, *more):
    args = [
        f"--agents={world}/model",
        f"--data={world}/rl.jsonl",
        f"--teacher={url}",
        f"--out={out}/rows.jsonl",
        *LIMITS,
    ]
    annotation.annotate(
        parse_config(
            annotation.AnnotateConfig,
            [*args, "--samples_per_question=2", "--share_correct=0", *more],
        )
    )
    return annotation.read_appended(out / "rows.jsonl")


def test_rows_are_valid_and_a_second_call_asks_nothing_again(world, tmp_path):
    with judge_server() as (url, seen):
        rows = annotate(world, tmp_path, url)
        assert (
            len(rows) == len(seen) == 12
            and annotate(world, tmp_path, url) == rows
            and len(seen) == 12
        )
    for row in rows:
        assert reward_model.check_rrm_row(row) is None and reward_model.target_text(row)
    assert len({row["id"] for row in rows}) == 12


def test_a_teacher_that_answers_500_prose_and_429_loses_no_trajectory(world, tmp_path):
    asked = Counter()

    def moody(text):
        asked[text] += 1
        return [500, "I think it was fine.", 429, hashed_judgment(text)][min(asked[text] - 1, 3)]

    with judge_server(moody) as (url, _):
        rows = annotate(world, tmp_path, url)
    assert len(rows) == 12


def test_what_stays_prose_is_left_out_and_asked_again_by_the_next_call(world, tmp_path, capsys):
    with judge_server(
        lambda text: (
            "prose" if "x" in text.split("from ")[1][:3] or len(text) % 2 else hashed_judgment(text)
        )
    ) as (url, _):
        some = annotate(world, tmp_path, url)
    assert f"{12 - len(some)} without a valid judgment" in capsys.readouterr().out
    with judge_server() as (url, seen):
        rows = annotate(world, tmp_path, url)
    assert (
        len(seen) == 12 - len(some) and len(rows) == 12 and [r for r in rows if r in some] == some
    )


def test_a_judgment_that_tells_the_answer_is_left_out_and_asked_for_again(world, tmp_path, capsys):
    lines, data = (world / "rl.jsonl").open(), f"--data={tmp_path}/rl.jsonl"
    rows = [json.loads(line) | {"answer": f"Quillby {i}"} for i, line in enumerate(lines)]
    toy.write(tmp_path / "rl.jsonl", rows)
    golds = {row["question"]: row["answer"] for row in rows}

    def indiscreet(text):
        gold = next(golds[question] for question in golds if question in text)
        said = f"It is {gold}." if int(gold[-1]) % 2 else "Look again."
        return f"<think>It should say {gold}.</think><critique>{said}</critique><score>0.5</score>"

    with judge_server(indiscreet, whole=True) as (url, seen):
        rows = annotate(world, tmp_path, url, data)
        told = capsys.readouterr().out
        assert len(seen) == 12 and len(rows) == 6
        assert annotate(world, tmp_path, url, data) == rows and len(seen) == 18
        assert len({request["seed"] for request in seen}) == 18  # what failed is asked afresh
    assert {row["critique"] for row in rows} == {"Look again."}
    assert "6 leak the answer" in told and "call it again" in told


def test_a_line_cut_by_a_kill_is_written_again(world, tmp_path):
    with judge_server() as (url, seen):
        rows = annotate(world, tmp_path, url)
        path = tmp_path / "rows.judgments.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        again = annotate(world, tmp_path, url)
    assert again == rows and len(seen) == 13


def test_a_teacher_that_is_not_there_is_named_before_any_work(world, tmp_path):
    with pytest.raises(SystemExit, match="no reward model answers at http://127.0.0.1:9/v1"):
        annotate(world, tmp_path, "http://127.0.0.1:9/v1")
    assert not (tmp_path / "rows.trajectories.jsonl").exists()


@pytest.mark.parametrize(
    "right, wrong, share, kept", [(10, 4, 0.5, (4, 4)), (3, 30, 0.25, (3, 9)), (5, 2, 0.0, (5, 2))]
)
def test_the_larger_class_is_thinned_to_the_share_asked_for(right, wrong, share, kept):
    rows = [{"id": f"r{i}", "correct": i < right} for i in range(right + wrong)]
    thin = annotation.thinned(rows, share, 0)
    assert (sum(r["correct"] for r in thin), sum(not r["correct"] for r in thin)) == kept
    assert thin == annotation.thinned(rows[::-1], share, 0)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_neither_agent_nor_question_tells_the_label(share):
    """A strong and a weak agent, easy and hard questions, four trajectories of each."""
    rng, rows = random.Random(0), []
    for agent, skill in (("strong", 0.9), ("weak", 0.2)):
        for q in range(300):
            chance = min(max(skill + (q % 3 - 1) * 0.2, 0.05), 0.95)
            for g in range(4):
                row = {"id": f"{agent}/{q}/{g}", "agent": agent, "question": f"q{q}"}
                rows.append(row | {"correct": rng.random() < chance})
    thin = annotation.thinned(rows, share, 0)
    shares = {"agent": {}, "question": {}}
    for row in thin:
        for key, of in shares.items():
            of.setdefault(row[key], []).append(row["correct"])
    assert all(abs(sum(of) / len(of) - share) < 0.01 for of in shares["agent"].values())
    if share == 0.5:  # pairs: no fraction of a row is carried over to another question
        assert {sum(of) / len(of) for of in shares["question"].values()} == {0.5}
    assert len(thin) > 500


def test_a_question_that_is_always_right_is_left_out_and_none_left_is_told(world, tmp_path):
    rows = [{"id": f"{i}", "agent": "a", "question": "q", "correct": True} for i in range(4)]
    assert annotation.thinned(rows, 0.5, 0) == []
    with judge_server() as (url, _), pytest.raises(SystemExit, match="none of 12 trajectories"):
        annotate(world, tmp_path, url, "--share_correct=0.5")


def test_a_changed_setting_is_refused_by_name_and_more_of_the_same_is_taken(world, tmp_path):
    with judge_server() as (url, seen):
        assert len(annotate(world, tmp_path, url, "--limit=2")) == 4
        for change in ("--temperature=0.9", "--teacher.temperature=0.9"):
            with pytest.raises(SystemExit, match=change[2:].partition("=")[0]):
                annotate(world, tmp_path, url, change)
        with pytest.raises(SystemExit, match="no model 'other' at"):
            annotate(world, tmp_path, url, "--teacher.model=other")
        assert len(annotate(world, tmp_path, url)) == len(seen) == 12


@pytest.fixture
def first_attempts(world):
    """(setup, jobs of a lift, run): an agent whose answers are right where their length is odd; a
    tiny model is never right by itself.
    """
    limits = [limit for limit in LIMITS if "teacher" not in limit]
    config = parse_config(compare_rrm.Config, [f"--data={world}/rl.jsonl", *limits])
    with at_work.agent_at_work(config, f"{world}/model") as (setup, rows, run):
        setup.rule_reward = lambda row, answer: (0.0, len(answer or "") % 2 == 1)
        episodes = run(rollout.run_chains([(row, (0, "lift", 0)) for row in rows], setup))
        rrm = reward_model.open_rrm(
            RewardModelConfig(str(ROOT / "data/toy/prepare.py")), None, engine=None
        )
        critiques = run(compare_rrm.critiques_of(rrm, episodes, 0))
        yield setup, list(zip(episodes, rows, critiques)), run


def test_critique_lift_counts_each_kind_of_critique(first_attempts):
    lift = compare_rrm.critique_lift(*first_attempts, seed=0)
    for name in ("own", "shuffled", "empty"):
        change = (lift[f"lift/{name}/fixed"] - lift[f"lift/{name}/broken"]) / lift["lift/questions"]
        assert lift[f"lift/{name}/refined"] == pytest.approx(lift["lift/first"] + change)
    assert (lift["lift/questions"], lift["lift/aborted"]) == (6, 0)


def test_each_chain_is_refined_by_its_own_critique_by_another_ones_and_by_none(
    first_attempts, monkeypatch
):
    setup, jobs, run = first_attempts
    given, seeds, refine_with = {}, {}, compare_rrm.refine_with

    def recorded(episodes, rows, critiques, setup, key):
        told = zip(episodes, rows, critiques)
        given[key[1]] = [(episode.id, row["id"], critique) for episode, row, critique in told]
        seeds[key[1]] = key[0]
        return refine_with(episodes, rows, critiques, setup, key)

    monkeypatch.setattr(compare_rrm, "refine_with", recorded)
    jobs = [(episode, row, f"critique of {row['id']}") for episode, row, _ in jobs]
    compare_rrm.critique_lift(setup, jobs, run, seed=7)
    ids = [row["id"] for _, row, _ in jobs]
    assert {*seeds.values()} == {7} and list(given) == ["own", "shuffled", "empty"]
    assert given["own"] == [(name, name, f"critique of {name}") for name in ids]
    assert given["empty"] == [(name, name, "") for name in ids]
    assert [told[:2] for told in given["shuffled"]] == [(name, name) for name in ids]
    of = [told[2].removeprefix("critique of ") for told in given["shuffled"]]
    assert sorted(of) == sorted(ids) and all(a != b for a, b in zip(of, ids))


def test_a_refinement_that_was_aborted_is_not_broken(first_attempts, monkeypatch):
    setup, jobs, run = first_attempts

    async def refine_with(episodes, rows, critiques, setup, key):
        refined = copy.deepcopy(list(episodes))
        for i, episode in enumerate(refined):
            episode.attempts[0].correct = True
            again = dataclasses.replace(episode.attempts[0], correct=bool(i % 2))
            episode.attempts.append(again)
        if key[1] == "shuffled":
            refined[0].dropped = refined[1].dropped = "aborted"
        return refined

    for episode, _, _ in jobs:
        episode.attempts[0].correct = True
    monkeypatch.setattr(compare_rrm, "refine_with", refine_with)
    lift = compare_rrm.critique_lift(setup, jobs, run, seed=0)
    assert (lift["lift/questions"], lift["lift/aborted"]) == (4, 2)
    assert {lift[f"lift/{kind}/broken"] for kind in ("own", "shuffled", "empty")} == {2}


def test_a_comparison_has_one_engine_at_a_time_and_says_what_was_trained_on(
    world, tmp_path, monkeypatch, capsys
):
    alive, most, make, close = [], [], compare_rrm.engines.make_engine, compare_rrm.engines.close

    def made(*args, **kwargs):
        alive.append(1)
        most.append(len(alive))
        return make(*args, **kwargs)

    def closed(engine):
        if engine:
            alive.pop()
            close(engine)

    monkeypatch.setattr(compare_rrm.engines, "make_engine", made)
    monkeypatch.setattr(reward_model, "make_engine", made)
    monkeypatch.setattr(compare_rrm.engines, "close", closed)
    rng = random.Random(0)
    rows = [toy.rrm_row(rng, i) for i in range(3)]
    toy.write(tmp_path / "held.jsonl", rows)
    toy.write(tmp_path / "trained.jsonl", rows[:1])
    shutil.copytree(world / "model", tmp_path / "agent")
    config = {"data": f"{tmp_path}/trained.jsonl", "model": "nowhere"}
    (tmp_path / "agent" / "trainer.json").write_text(json.dumps({"config": config}))
    args = [f"--rrm={ROOT}/data/toy/prepare.py", f"--against={tmp_path}/agent"]
    args += [f"--agent={tmp_path}/agent", f"--eval_data={tmp_path}/held.jsonl"]
    args += [f"--data={world}/rl.jsonl", "--limit=2", f"--out_dir={tmp_path}/out"]
    args += [a for a in LIMITS if "teacher" not in a]
    compare_rrm.main(parse_config(compare_rrm.Config, [*args, "--rrm.max_tokens=20"]))
    assert most == [1, 1, 1]
    told = capsys.readouterr().out
    assert f"what {ROOT}/data/toy/prepare.py was trained on is not known" in told
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert line["mae"] == 0.0 and line["lift/questions"] == 2
    own = compare_rrm.held_out("held.jsonl", rows, f"{tmp_path}/agent")
    same = sum(row["question"] == rows[0]["question"] for row in rows)
    assert f"of 3 rows {same} have a question" in own and "1 stand there whole" in own


def scored_rows(scores):
    return [
        {"question": f"q{i}", "score": float(s), "correct": bool(s > 0.5)}
        for i, s in enumerate(scores)
    ]


def test_the_interval_is_of_95_percent_and_draws_questions():
    """Against the normal interval; ten copies of a trajectory under its question say no more."""
    rng = np.random.default_rng(1)
    rows = scored_rows(rng.uniform(0.3, 0.7, 400))
    gaps = rng.uniform(0, 0.3, 400)
    exact = [Judgment("t", "c", row["score"]) for row in rows]
    off = [Judgment("t", "c", row["score"] + gap) for row, gap in zip(rows, gaps)]
    middle, low, high = compare_rrm.paired_bootstrap(exact, off, rows)["difference/mae"]
    assert middle == pytest.approx(gaps.mean(), abs=1e-4)
    half = 1.96 * gaps.std() / 20
    assert high - middle == pytest.approx(half, rel=0.1) == middle - low  # of 90 %: 16 % less
    copies = [dict(row) for row in rows * 10]
    ten = compare_rrm.paired_bootstrap(exact * 10, off * 10, copies, draws=200)
    assert ten == compare_rrm.paired_bootstrap(exact, off, rows, draws=200)


def test_rows_without_a_label_are_left_out_of_its_difference_alone():
    rows = scored_rows([0.1, 0.9, 0.4])
    rows[0]["score"] = rows[1]["correct"] = rows[2]["correct"] = None
    judged = [Judgment("t", "c", 0.5)] * 3
    assert (
        compare_rrm.paired_bootstrap(judged, judged, rows, draws=20)["difference/mae"] == [0.0] * 3
    )


def test_paired_bootstrap_tells_a_better_judge_from_an_equal_one():
    rng = np.random.default_rng(0)
    rows = scored_rows(rng.random(200))
    good = [Judgment("t", "c", min(1.0, row["score"])) for row in rows]
    bad = [Judgment("t", "c", float(rng.random())) for _ in rows]
    better, equal = (
        compare_rrm.paired_bootstrap(bad, good, rows, draws=200),
        compare_rrm.paired_bootstrap(good, good, rows, draws=200),
    )
    assert better["difference/mae"][2] < 0 < better["difference/auc/correct"][1]
    assert equal["difference/mae"] == [0.0, 0.0, 0.0] and equal["difference/auc/correct"] == [
        0.0,
        0.0,
        0.0,
    ]


def test_report_says_when_it_has_no_tokenizer_to_count_with(tmp_path):
    toy.write(tmp_path / "rrm.jsonl", [toy.rrm_row(random.Random(0), 0)])
    with pytest.raises(SystemExit, match="prepare.py is no folder.*--agent=FOLDER"):
        compare_rrm.main(
            parse_config(
                compare_rrm.Config,
                ["--rrm=data/toy/prepare.py", f"--eval_data={tmp_path}/rrm.jsonl"],
            )
        )


def test_a_difference_is_the_own_figure_minus_the_others(tmp_path, monkeypatch, capsys):
    """The one that is asked about is always right, the other one always says .5."""
    rng = random.Random(0)
    rows = [toy.rrm_row(rng, i) for i in range(30)]
    toy.write(tmp_path / "held.jsonl", rows)
    asked, closed = [], []

    def open_rrm(config, chat, *, engine):
        asked.append((config.source, config.memory_share))

        async def judge(question, trajectory, key):
            told = next(row for row in rows if row["trajectory"] == trajectory)
            exact = config.source.endswith("own")
            return Judgment("a", "b", told["score"] if exact else 0.5)

        judge.engine = config.source
        return judge

    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    chat = SimpleNamespace(text=list)
    monkeypatch.setattr("reagent.policy.load_chat", lambda *_, **__: chat)
    monkeypatch.setattr(compare_rrm.reward_model, "open_rrm", open_rrm)
    monkeypatch.setattr(compare_rrm.engines, "close", closed.append)
    few = functools.partial(compare_rrm.paired_bootstrap, draws=50)
    monkeypatch.setattr(compare_rrm, "paired_bootstrap", few)
    keys = [f"--rrm={tmp_path}/own", f"--against={tmp_path}/other", "--engine.memory_share=0.7"]
    keys += [f"--eval_data={tmp_path}/held.jsonl", f"--out_dir={tmp_path}/out"]
    compare_rrm.main(parse_config(compare_rrm.Config, keys))
    assert asked == [(f"{tmp_path}/own", 0.7), (f"{tmp_path}/other", 0.7)]
    assert closed == [f"{tmp_path}/own", f"{tmp_path}/other"]
    told = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    own, other = told
    assert [line["rrm"] for line in told] == closed and "difference/mae" not in other
    for name, sign in (("mae", -1), ("auc/correct", 1), ("auc/grounded", 1)):
        middle, low, high = own[f"difference/{name}"]
        assert middle == pytest.approx(own[name] - other[name], abs=2e-4) and sign * middle > 0
        assert low <= middle <= high
    assert capsys.readouterr().out.count("\ndifference/") == 3


def test_an_agent_at_work_has_the_limits_and_the_server_that_were_asked_for(tmp_path, monkeypatch):
    """Each option has a value of its own, so that none can stand in for another."""
    asked = []

    def served_agent(cfg, runner):
        asked.append(cfg)
        return evaluate.Agent("engine", "chat", positions, "", {})

    monkeypatch.setattr(evaluate, "served_agent", served_agent)
    toy.write(tmp_path / "rl.jsonl", [toy.rl_row(random.Random(0), i, "train") for i in range(5)])
    own = dict(max_turns=3, max_new_tokens_per_turn=70, max_tokens_per_attempt=400)
    own |= dict(max_context=900, temperature=0.25, limit=2, patience_s=7.0)
    own |= dict(tokenizer="tok", endpoint="chat", tools="search,none")
    keys = [f"--{key}={value}" for key, value in own.items()] + ["--engine.max_live_chains=9"]
    config = parse_config(at_work.Common, [f"--data={tmp_path}/rl.jsonl", *keys])
    for positions, context in ((4000, 900), (800, 800)):
        with at_work.agent_at_work(config, "https://a/v1#name") as (setup, rows, _):
            assert setup.limits == rollout.Limits(3, 70, 400, context, final_tokens=70)
            assert (setup.engine, setup.chat, setup.temperature) == ("engine", "chat", 0.25)
            assert setup.rrm is None and setup.toolbox.names == ["search"]
            assert [row["id"] for row in rows] == ["toy-train-0", "toy-train-1"]
    told = asked[0]
    assert (told.model, told.served_model, told.tools) == ("https://a/v1", "name", "search,none")
    assert (told.tokenizer, told.endpoint, told.patience_s) == ("tok", "chat", 7.0)
    assert (told.max_context, told.engine.max_live_chains) == (900, 9)


def test_attempts_that_are_lost_are_counted_and_tried_again_the_next_time(tmp_path, monkeypatch):
    asked, lost = [], {"q1", "q2"}

    @contextlib.contextmanager
    def at_work(*_):
        yield None, [{"id": f"q{i}"} for i in range(3)], asyncio.run

    async def chain(row, setup, key):
        asked.append(row["id"])
        ids = dict(ids=[], mask=[], logps=[], messages=[], policy_version=0)
        episode = rollout.Episode(row["id"], "Q", ["A"], **ids)
        episode.dropped = "fault" if row["id"] in lost else ""
        episode.attempts = [rollout.Attempt((0, 0), (0, 0), None, "answered", 0)]
        return episode

    monkeypatch.setattr(annotation, "agent_at_work", at_work)
    monkeypatch.setattr(rollout, "run_chain", chain)
    cfg, why = annotation.AnnotateConfig(agents="a", samples_per_question=1), Counter()
    kept = annotation.sample_trajectories(cfg, tmp_path / "t.jsonl", why)
    assert [row["row"] for row in kept] == ["q0"] and why == {"attempts lost: fault": 2}
    lost.clear()
    kept = annotation.sample_trajectories(cfg, tmp_path / "t.jsonl", why)
    assert [row["row"] for row in kept] == ["q0", "q1", "q2"]
    assert asked == ["q0", "q1", "q2", "q1", "q2"] and why.total() == 2


def test_every_key_of_a_config_is_read_where_one_of_its_makes_has_a_use_for_it(world, tmp_path):
    reads = set()
    with judge_server() as (url, _):
        for make, teacher in (("rrm", url), ("sft", ""), ("rl", "")):
            keys = [f"--agents={world}/model", f"--data={world}/rl.jsonl", f"--make={make}"]
            keys += [f"--out={tmp_path}/{make}.jsonl", "--limit=1", "--samples_per_question=1"]
            keys += [f"--teacher={teacher}"] * (make == "rrm")
            cfg = parse_config(annotation.AnnotateConfig, [*keys, *LIMITS, "--share_correct=0"])
            note_reads(cfg, reads)
            annotation.annotate(cfg)
    # of vLLM or of a policy that trains; a teacher has the engine's share; no agent here is right
    left = {"engine.sleep", "engine.tensor_parallel", "teacher.sleep", "teacher.max_failures"}
    left |= {"teacher.memory_share", "rows_per_question"}
    assert unread(annotation.AnnotateConfig, reads) == left
