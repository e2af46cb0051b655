"""Finished answers scored again: files, folders, pass@k over files, judges, prompts of a set."""

import dataclasses
import json
import re

import pytest

import evaluate
from data import score
from reagent.config import parse_config
from results import benchmarks
from tests.helpers.chat_server import chat_server
from tests.helpers.judge_server import judge_server
from tests.helpers.trainers import note_parsed, unread

COMMITS = ("66", "67", "68")


def row(i: int, answer: str, correct=None, **more) -> dict:
    line = {"dataset": "gsm8k", "id": f"q{i}", "question": "How many?", "gold": ["66"]}
    return line | {"correct": correct, "attempts": [{"answer": "1"}, {"answer": answer}]} | more


def write(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_folder_has_pass_at_1_of_each_file_and_pass_at_k_over_them(tmp_path, capsys):
    """Three files: q0 is right in all, q1 in one of three: pass@1 2/3, pass@2 by Chen's formula."""
    for n, answer in enumerate(COMMITS):
        write(tmp_path / f"{n}/results.jsonl", [row(0, "66.0", True), row(1, answer, True)])
        write(tmp_path / f"{n}/journal-0.jsonl", [{"anything": 1}])
    score.main([str(tmp_path)])
    first, _, total = capsys.readouterr().out.partition("Pass@k")
    cells = [line.split(" | ") for line in first.splitlines() if "results.jsonl" in line]
    assert [cell[5].split()[0] for cell in cells] == ["100.0", "50.0", "50.0"]
    assert [cell[-1] for cell in cells] == ["0 |", "1 |", "1 |"]  # those that changed
    last = total.splitlines()[-1].split(" | ")
    assert last[1:3] == ["2", "3"] and [c.split()[0] for c in last[3:]] == ["66.7", "83.3", "100.0"]


def test_rows_of_other_tools_are_scored_by_the_rule_that_is_named(tmp_path, capsys):
    rows = [
        {"question": "Q1", "response": "It is \\boxed{Paris}", "ground_truth": "paris"},
        {"question": "Q2", "response": "Lyon", "ground_truth": ["Paris", "City of Paris"]},
        {"question": "Q3", "response": None, "ground_truth": "Rome"},
    ]
    write(tmp_path / "theirs.jsonl", rows)
    with pytest.raises(SystemExit, match="theirs.jsonl:1: data set .*--scorer=NAME"):
        score.main([str(tmp_path / "theirs.jsonl")])
    score.main([str(tmp_path / "theirs.jsonl"), "--scorer=hotpotqa"])
    assert "| 3 | 3 | 33.3 [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "file", "keys", "scorer"),
    [
        ({"scorer": "math"}, "hotpotqa", {"scorer": "choice"}, "math"),
        ({"dataset": "musique"}, "hotpotqa", {"scorer": "choice"}, "musique"),
        ({}, "hotpotqa", {"scorer": "choice"}, "hotpotqa"),
        ({"kind": "gaia"}, "mine", {"scorer": "choice"}, "gaia"),
        ({"kind": "gaia"}, "musique", {}, "musique"),
        ({}, "mine", {"scorer": "choice"}, "choice"),
        ({"correct": True}, "mine", {"scorer": "choice"}, "choice"),
        ({"correct": True}, "mine", {}, "judge"),
        ({"scorer": "math"}, "hotpotqa", {"judged": "all"}, "judge"),
        ({}, "hle", {"scorer": "choice"}, "judge"),
    ],
)
def test_the_rule_of_a_row_is_its_own_its_sets_its_kinds_or_the_one_that_is_named(
    row, file, keys, scorer
):
    whole = {"question": "Q", "pred": "a", "gold": "b"} | row
    found = score.answer_of(whole, f"{file}.jsonl", 0, score.Config(**keys))
    assert (found.scorer, found.before) == (scorer, row.get("correct"))


def test_files_of_the_release_keep_their_judges_score(tmp_path, capsys):
    """Their get_score reads {"question", "auto_judge": {"score"}} of each file."""
    for n, scores in enumerate(((1, 0), (1, 1))):
        rows = [
            {"question": f"Q{i}", "answer": "a", "prediction": "b", "auto_judge": {"score": s}}
            for i, s in enumerate(scores)
        ]
        write(tmp_path / f"iter{n}.jsonl", rows)
    score.main([str(tmp_path)])
    told = capsys.readouterr().out
    assert "| 2 | 2 | 50.0 [" in told and "| 2 | 2 | 100.0 [" in told
    assert "| 2 | 2 | 75.0 [" in told and told.splitlines()[-1].count("100.0 [") == 1  # pass@2


def test_a_chain_of_the_release_that_failed_is_wrong_and_counted_once_when_tried_again(
    tmp_path, capsys
):
    failed = {"answer": "a", "prediction": "[Failed]", "error": "Timeout (>1800s)", "messages": []}
    judged = {"question": "Q0", "answer": "a", "prediction": "b", "auto_judge": {"score": 1}}
    rows = [failed | {"question": "Q0"}, judged, failed | {"question": "Q1"}]
    write(tmp_path / "iter1.jsonl", rows)
    score.main([str(tmp_path)])
    assert "| 2 | 2 | 50.0 [" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, problem", [({"id": "1", "gold": "x"}, "no answer"), ({"pred": "x"}, "no reference")]
)
def test_a_row_without_answer_or_reference_is_named(tmp_path, line, problem):
    write(tmp_path / "rows.jsonl", [row(0, "66"), line])
    with pytest.raises(SystemExit, match=f"rows.jsonl:2: {problem}"):
        score.main([str(tmp_path / "rows.jsonl")])


def test_plain_rows_give_a_line_each(tmp_path, capsys):
    rows = [{"scorer": "math", "pred": p, "gold": "1/2"} for p in ("0.5", "2")]
    write(tmp_path / "rows.jsonl", rows)
    score.main([str(tmp_path / "rows.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["correct"] for line in lines] == [True, False]


def test_a_judge_is_asked_where_one_is_named_and_else_verdicts_stay(tmp_path, capsys):
    rows = [row(0, "sixty-six", True), row(1, "nothing", False)]
    rows = [r | {"dataset": "webwalker", "gold": "66"} for r in rows]
    write(tmp_path / "results.jsonl", rows)
    score.main([str(tmp_path)])
    told = capsys.readouterr().out
    assert "| verdicts of the rows | 2 | 2 | 50.0 [" in told and "| 0 | 0 |" in told
    with chat_server(lambda *_: "VERDICT: CORRECT", model="big") as (url, seen):
        keys = [f"--judge={url}", f"--judge_cache={tmp_path}/cache.sqlite"]
        score.main([str(tmp_path), *keys])
        score.main([str(tmp_path), *keys])
    assert len(seen) == 2  # the second time the cache answers
    assert re.search(r"big/[0-9a-f]{8} \| 2 \| 2 \| 100.0 .* \| 0 \| 1 \|", capsys.readouterr().out)


def test_a_set_has_a_prompt_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "maths.txt").write_text("Compute with care.")
    spec = dataclasses.replace(benchmarks.DATASETS["gsm8k"], tools="none")
    own = dataclasses.replace(spec, prompt_file=f"{tmp_path}/maths.txt")
    monkeypatch.setitem(benchmarks.DATASETS, "gsm8k", own)
    monkeypatch.setitem(benchmarks.DATASETS, "math500", spec)
    for name in ("gsm8k", "math500"):
        rows = [{"id": "1", "question": f"Sum {name}?", "answer": "4", "kind": "math"}]
        write(tmp_path / f"data/{name}.jsonl", rows)
    with chat_server(lambda *_: "\\boxed{4}", completions=False) as (url, seen):
        keys = [f"--model={url}", f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/out"]
        evaluate.main(parse_config(evaluate.Config, [*keys, "--dataset=gsm8k,math500"]))
    systems = {r["messages"][1]["content"]: r["messages"][0]["content"] for r in seen}
    assert systems["Sum gsm8k?"] == "Compute with care." != systems["Sum math500?"]
    assert f"prompt {tmp_path}/maths.txt" in (tmp_path / "out/report.md").read_text()


def test_every_key_of_the_command_is_read(tmp_path, monkeypatch):
    reads = set()
    note_parsed(monkeypatch, score, reads)
    write(tmp_path / "mine.jsonl", [{"id": "1", "question": "Q", "pred": "a", "gold": "b"}])
    with judge_server(lambda text: "VERDICT: CORRECT") as (url, _):
        keys = ["--judged=all", f"--judge={url}", f"--judge_cache={tmp_path}/cache.sqlite"]
        score.main([str(tmp_path / "mine.jsonl"), *keys])
        monkeypatch.setattr(score, "open_judge", lambda *_: None)
        with pytest.raises(SystemExit, match="cannot be asked"):
            score.main([str(tmp_path / "mine.jsonl"), *keys])
    score.main([str(tmp_path / "mine.jsonl"), "--scorer=math"])
    assert not unread(score.Config, reads)
