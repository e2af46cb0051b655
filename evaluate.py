"""Evaluation: the rule reward, scored files, statistics and the comparison of two result files.

    python evaluate.py score rows.jsonl          # {"scorer", "pred", "gold"} rows -> one JSON line each
    python evaluate.py compare A.jsonl B.jsonl   # paired: difference, 95 % interval, questions gained and lost
"""

import json
import sys
from math import comb

import numpy as np

from rows import JsonlRows
from scorers import score

SCORER_OF_KIND = {"qa": "hotpotqa", "math": "math", "gaia": "gaia", "choice": "choice"}
F1_FLOOR = 0.3  # a token F1 below it earns nothing (the released reward)


def rule_reward(row: dict, answer: str | None, form: str = "em_f1") -> tuple[float, bool]:
    """R_rule of an RL row and whether the answer is right by the benchmark's own metric (paper section 3.3).

    em_f1: 1 for an exact match, else the token F1 if it is at least 0.3 (qa only); em: the metric alone.
    """
    if answer is None or not answer.strip():
        return 0.0, False
    result = score(SCORER_OF_KIND[row["kind"]], answer, row["answer"])
    reward = float(result["correct"])
    if form == "em_f1" and not result["correct"] and result.get("f1", 0.0) >= F1_FLOOR:
        reward = result["f1"]
    return reward, result["correct"]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from n samples (Chen et al. 2021)."""
    return 1.0 - comb(n - right, k) / comb(n, k) if k <= n else float("nan")


def bootstrap_interval(values, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean over questions."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def question_means(path: str) -> dict[tuple, float]:
    """Mean correctness by (dataset, id) of a result file with rows {"dataset"?, "id", "correct"}."""
    seen: dict[tuple, list[float]] = {}
    rows = JsonlRows(path, lambda row: None if {"id", "correct"} <= set(row) else "a result row needs 'id' and 'correct'")
    for i in range(len(rows)):
        row = rows[i]
        seen.setdefault((row.get("dataset", ""), row["id"]), []).append(float(bool(row["correct"])))
    return {key: sum(values) / len(values) for key, values in seen.items()}


def compare(a: dict[tuple, float], b: dict[tuple, float]) -> dict:
    """Paired comparison over the questions that both have: b minus a."""
    both = sorted(set(a) & set(b), key=str)
    if not both:
        raise SystemExit("the two files have no question in common")
    differences = [b[q] - a[q] for q in both]
    low, high = bootstrap_interval(differences)
    return {
        "questions": len(both), "only_in_a": len(a) - len(both), "only_in_b": len(b) - len(both),
        "a": sum(a[q] for q in both) / len(both), "b": sum(b[q] for q in both) / len(both),
        "difference": sum(differences) / len(both), "interval_95": [round(low, 4), round(high, 4)],
        "gained": sum(d > 0 for d in differences), "lost": sum(d < 0 for d in differences),
    }


def main(argv: list[str]) -> None:
    if len(argv) == 2 and argv[0] == "score":
        rows = JsonlRows(argv[1], lambda row: None if {"scorer", "pred", "gold"} <= set(row) else "needs scorer, pred, gold")
        for i in range(len(rows)):
            print(json.dumps(score(rows[i]["scorer"], rows[i]["pred"], rows[i]["gold"])))
    elif len(argv) == 3 and argv[0] == "compare":
        print(json.dumps(compare(question_means(argv[1]), question_means(argv[2])), indent=1))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
