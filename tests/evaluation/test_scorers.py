"""Scorers against the outputs of the official code and against the benchmarks' own gold
solutions.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from reagent import scorers
from reagent.scorers import rule_reward, score
from results.statistics import bootstrap_interval, compare, pass_at_k

SHARED = Path(__file__).parents[3] / "shared" / "data"
GOLDEN = SHARED / "golden" / "scorer_cases.jsonl"


def rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")] if path.is_file() else []


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the outputs of the official scorers are not here")
def test_the_outputs_of_the_official_scorers():
    for row in rows(GOLDEN):
        got = score(row["scorer"], row["pred"], row["gold"])
        if "expected" in row:
            assert got["correct"] == row["expected"], row
        else:
            assert (got["em"], round(got["f1"], 6)) == (float(row["em"]), row["f1"]), row


@pytest.mark.skipif(not (SHARED / "math500").is_dir(), reason="MATH500 is not here")
def test_the_gold_solutions_of_math500_are_right():
    wrong = [
        r["unique_id"]
        for r in rows(SHARED / "math500/test.jsonl")
        if not score("math", r["solution"], r["answer"])["correct"]
    ]
    assert wrong == []


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="GSM8K is not here")
def test_the_gold_solutions_of_gsm8k_are_right():
    for row in rows(SHARED / "gsm8k/test.jsonl"):
        assert score("math", row["answer"], row["answer"].rpartition("####")[2])["correct"]
        assert score("gsm8k_official", row["answer"], row["answer"])["correct"]


@pytest.mark.parametrize(
    "scorer",
    ["gaia", "hotpotqa", "2wiki", "musique", "bamboogle", "math", "choice", "hendrycks_is_equiv"],
)
@pytest.mark.parametrize("pred", ["", "  ", None])
def test_an_empty_prediction_is_never_right(scorer, pred):
    assert not score(scorer, pred, "the")["correct"] and not score(scorer, pred, "")["correct"]


@pytest.mark.parametrize(
    "pred, gold, right",
    [
        ("25", "025", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("x + 1", "1 + x", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("1,234", "1234", True),
        ("3", "4", False),
        ("unknown", "no", False),
        ("\\frac{", "1", False),
    ],
)
def test_mathematics(pred, gold, right):
    assert score("math", pred, gold)["correct"] is right


def test_a_hanging_verifier_is_killed_and_says_so(monkeypatch):
    score("math", "x + 2", "2 + x")  # there is a child
    os.kill(scorers._Verifier.process.pid, signal.SIGSTOP)  # and now it hangs
    monkeypatch.setattr(scorers, "MATH_SECONDS", 0.2)
    assert score("math", "x + 1", "1 + x") == {"correct": False, "status": "timeout"}
    monkeypatch.undo()
    assert score("math", "x + 1", "1 + x")["correct"]


@pytest.mark.parametrize(
    "pred, right", [("B", True), ("(b)", True), ("B. Paris", True), ("Banana", False), ("A", False)]
)
def test_multiple_choice(pred, right):
    assert score("choice", pred, "B")["correct"] is right


def test_an_unknown_scorer_is_an_error():
    with pytest.raises(ValueError, match="no scorer 'x'"):
        score("x", "1", "1")


@pytest.mark.parametrize(
    "answer, reward, correct",
    [
        ("New York", 1.0, True),
        ("New York City", 0.8, False),
        ("a b c d e f g h New York", 2 * 2 / 11, False),
        ("in a far away town called York of the big old north", 0.0, False),
        (None, 0.0, False),
        ("unknown", 0.0, False),
    ],
)
def test_rule_reward(answer, reward, correct):
    got = rule_reward({"kind": "qa", "answer": ["New York", "NY"]}, answer)
    assert got == (pytest.approx(reward), correct)


def test_no_inside_unknown_earns_nothing():
    assert rule_reward({"kind": "qa", "answer": "no"}, "unknown") == (0.0, False)


def test_pass_at_k_counts_draws():
    assert (
        pass_at_k(4, 1, 2) == pytest.approx(0.5)
        and pass_at_k(3, 3, 1) == 1
        and pass_at_k(3, 0, 3) == 0
    )


def test_bootstrap_interval_of_a_constant_is_the_constant():
    assert bootstrap_interval([0.5] * 20) == (0.5, 0.5)


def test_comparison_counts_gained_and_lost():
    a, b = {("", i): float(i < 2) for i in range(4)}, {("", i): float(i > 0) for i in range(5)}
    got = compare(a, b)
    assert (got["questions"], got["only_in_b"], got["gained"], got["lost"], got["difference"]) == (
        4,
        1,
        2,
        1,
        0.25,
    )
