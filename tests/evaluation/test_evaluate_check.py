"""evaluate.py --check: everything is looked at, nothing heavy loads, nothing is written."""

import types

import pytest

import evaluate
from reagent.config import parse_config
from reagent.policy import load_tokenizer
from tests.evaluation.test_evaluate_jobs import knows
from tests.helpers.chat_server import chat_server
from tests.helpers.judge_server import judge_server
from tests.helpers.tiny import tiny_model, toy
from tests.helpers.trainers import note_reads, unread


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and three questions, with and without documents of their own."""
    folder = tmp_path_factory.mktemp("check")
    tiny_model(folder / "model", max_positions=4096)
    docs = [{"title": "Capitals", "text": "Paris, Lima and Rome are capitals."}]
    rows = [dict(id=f"q{i}", question=f"Which city is q{i}?", answer="Lima") for i in range(3)]
    toy.write(folder / "none.jsonl", [row | {"kind": "qa"} for row in rows])
    toy.write(folder / "cities.jsonl", [row | {"kind": "qa", "docs": docs} for row in rows])
    return folder


@pytest.fixture(autouse=True)
def no_loading(monkeypatch):
    def loads(*_, **__):
        raise AssertionError("something heavy was loaded")

    monkeypatch.setattr("reagent.engines.make_engine", loads)
    monkeypatch.setattr("reagent.reward_model.make_engine", loads)


def run(folder, out, *more, check="--check"):
    base = ["--tools=search", "--engine=hf", "--patience_s=2", "--rollouts=2", "--rrm.seconds=2"]
    files = [f"--out_dir={out}", f"--judge_cache={out}/cache.sqlite", f"--model={folder}/model"]
    given = [*base, *files, f"--dataset={folder}/cities.jsonl", *more, check]
    evaluate.main(parse_config(evaluate.Config, given))


def test_a_check_says_what_a_run_asks_for_and_writes_nothing(folder, tmp_path, capsys):
    with judge_server() as (rrm, critiques), judge_server(lambda text: "VERDICT: CORRECT") as judge:
        more = ["--refine", f"--rrm={rrm}", "--judged=all", f"--judge={judge[0]}"]
        more.append(f"--cache={tmp_path}/web.sqlite")
        run(folder, tmp_path / "out", *more)
        told = capsys.readouterr().out
        assert len(critiques) == len(judge[1]) == 1 and "boxed{unknown}" in critiques[0]
    left = "6 chains, 12 attempts, 12 judgments, 12 verdicts, 20,004 tokens at most, 360 turns"
    assert f"left of the run: {left}" in told and ", hours: unknown\n" in told
    assert "2 attempt(s) of 1667 tokens" in told
    assert "memory of a rank, GB: engine 0.0" in told and told.endswith("checked: it can start\n")
    assert not list(tmp_path.iterdir())


def test_a_check_counts_what_is_left_and_changes_no_byte(folder, tmp_path, capsys):
    with chat_server(knows, load_tokenizer(f"{folder}/model")) as (url, _):
        more = [f"--model={url}", f"--tokenizer={folder}/model"]
        run(folder, tmp_path, *more, "--limit=1", check="--check=false")
        held = {path: path.read_bytes() for path in tmp_path.iterdir()}
        run(folder, tmp_path, *more)
        left = "left of the run: 4 chains, 4 attempts, 0 judgments, 0 verdicts, 15,384 tokens"
        told = capsys.readouterr().out.rpartition("left of")
        assert left in "".join(told) and " hours at " in told[2]
        with pytest.raises(SystemExit, match="top_p: 0.95 -> 0.5"):
            run(folder, tmp_path, *more, "--top_p=0.5")
    assert held == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_finished_run_asks_its_reward_model_for_nothing(folder, tmp_path):
    tokenizer = load_tokenizer(f"{folder}/model")
    with chat_server(knows, tokenizer) as (url, _), judge_server() as (rrm, critiques):
        more = [f"--model={url}", f"--tokenizer={folder}/model", "--limit=1"]
        more += ["--refine", f"--rrm={rrm}", "--rrm.seconds=20"]
        run(folder, tmp_path, *more, check="--check=false")
        asked = len(critiques)
        run(folder, tmp_path, *more)
    assert len(critiques) == asked > 2


def test_what_other_ranks_have_run_is_in_the_results(folder, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"

    def other_rank(*_, **__):  # it has had all questions
        (two / "journal-1.jsonl").write_bytes((one / "journal-0.jsonl").read_bytes())
        (two / "run.json").write_bytes((one / "run.json").read_bytes())

    with chat_server(knows, load_tokenizer(f"{folder}/model")) as (url, _):
        more = [f"--model={url}", f"--tokenizer={folder}/model"]
        run(folder, one, *more, check="--check=false")
        monkeypatch.setattr(evaluate, "run_missing", other_rank)
        run(folder, two, *more, check="--check=false")
    assert (one / "results.jsonl").read_bytes() == (two / "results.jsonl").read_bytes() != b""


LACKS = {
    "no rows": (["--dataset=nowhere.jsonl"], "nowhere.jsonl"),
    "no docs": (["--dataset={folder}/none.jsonl"], "nothing to search"),
    "no tool": (["--tools=serach"], "no tool named serach"),
    "no template": (["--chat_template=none.jinja"], "chat_template = none.jinja"),
    "no model": (["--model=out/a/b"], "no model in out/a/b"),
    "no room": (["--max_context=40"], "positions are left for an attempt"),
    "no server": (["--model=http://127.0.0.1:9/v1"], "127.0.0.1:9.* 0 of 6 chains are finished"),
    "no rrm": (["--refine", "--rrm=http://127.0.0.1:9/v1"], "no reward model answers|gives no jud"),
    "no annotator": (["--refine", "--rrm={folder}/rrm.py"], "gives no judgment: no judg"),
    "no judge": (["--judged=all", "--judge=http://127.0.0.1:9/v1"], "no verdict of http"),
    "no memory": ([], "it cannot fit: host needs"),
    "file": (["--out_dir={folder}/cities.jsonl"], "cannot be written"),
}


@pytest.mark.parametrize("lack", LACKS)
@pytest.mark.parametrize("check", ["--check", "--check=false"])
def test_what_an_evaluation_lacks_is_told_before_anything_heavy_loads(
    lack, check, folder, tmp_path, monkeypatch
):
    if check == "--check=false" and lack == "no judge":
        pytest.skip("a run looks for its judge when answers wait")
    if lack == "no memory":
        monkeypatch.setattr("reagent.memory.host_memory", lambda: 1000)
    (folder / "rrm.py").write_text("def annotate(question, messages):\n    return 'Fine.'\n")
    more, told = LACKS[lack]
    with pytest.raises(SystemExit, match=told):
        run(folder, tmp_path / "o", *[m.format(folder=folder) for m in more], check=check)


def test_no_judge_is_asked_where_none_is_wanted(folder, tmp_path, capsys):
    (folder / "hle.jsonl").write_bytes((folder / "cities.jsonl").read_bytes())
    named = ["--dataset=hle", f"--data_dir={folder}", "--judge=http://127.0.0.1:9/v1"]
    run(folder, tmp_path / "out", *named, "--judged=none")
    told = capsys.readouterr()
    assert "the answers of hle stay unscored" in told.err and " 0 verdicts" in told.out
    with pytest.raises(SystemExit, match="no verdict of http"):
        run(folder, tmp_path / "out", *named)


@pytest.mark.parametrize("reply", ["Fine.", 500])
def test_a_judge_whose_verdict_cannot_be_read_is_told(reply, folder, tmp_path):
    with judge_server(lambda text: reply) as (url, _):
        with pytest.raises(SystemExit, match=f"no verdict of {url}: "):
            run(folder, tmp_path / "out", "--judged=all", f"--judge={url}")


def test_hours_are_of_the_chains_that_are_left_at_the_pace_of_those_that_are_done(
    folder, tmp_path, monkeypatch, capsys
):
    """One question of three, twice: the second chain ends 7,200 s after the start: an hour each."""
    clock = iter([0.0, 3600.0, 7200.0])
    monkeypatch.setattr(evaluate, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with chat_server(knows, load_tokenizer(f"{folder}/model")) as (url, _):
        more = [f"--model={url}", f"--tokenizer={folder}/model"]
        run(folder, tmp_path, *more, "--limit=1", check="--check=false")
        run(folder, tmp_path, *more)
    assert "4.0 hours at 3600.0 s each\n" in capsys.readouterr().out
    assert "pace" not in (tmp_path / "results.jsonl").read_text()


def test_every_key_of_a_config_is_read_by_a_run_that_has_a_use_for_it(
    folder, tmp_path, monkeypatch
):
    """One that is served, with a reward model and a judge, and one in this process."""
    monkeypatch.undo()  # what loads may load here
    tokenizer, reads = load_tokenizer(f"{folder}/model"), set()
    (folder / "hotpotqa.jsonl").write_bytes((folder / "cities.jsonl").read_bytes())

    def noted(out, *more):
        given = ["--tools=search", "--rollouts=1", "--limit=1"]
        given += ["--dataset=hotpotqa", f"--data_dir={folder}"]
        given += [f"--out_dir={out}", f"--judge_cache={out}/cache.sqlite", "--patience_s=5"]
        cfg = parse_config(evaluate.Config, [*given, *more])
        note_reads(cfg, reads)
        evaluate.main(cfg)

    with chat_server(knows, tokenizer) as (url, _), judge_server() as (rrm, _):
        with judge_server(lambda text: "VERDICT: CORRECT") as (judge, _):
            more = [f"--tokenizer={folder}/model", "--judged=all", f"--judge={judge}"]
            more += ["--refine", f"--rrm={rrm}", "--rrm.seconds=20"]
            noted(tmp_path / "served", f"--model={url}", *more)
    small = ["--max_tokens_per_attempt=80", "--max_turns=1", "--max_context=700"]
    noted(tmp_path / "here", f"--model={folder}/model", "--engine=hf", *small)
    # where there is a card, or where the policy trains
    left = {"engine.sleep", "engine.memory_share", "rrm.max_failures"}
    assert unread(evaluate.Config, reads) == left
