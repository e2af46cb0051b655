"""Two evaluations of the same questions: difference, its interval, gained and lost.

python evaluate.py compare A/results.jsonl B/results.jsonl
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reagent.rows import JsonlRows
from results.statistics import interval


@dataclass
class Outcome:
    """What a result file says of one question: by chain, right, wrong or None (unscored)."""

    right: list[bool | None]
    rows: set[str | None]  # digests of the rows that were asked
    judges: set[str]


def outcomes(path: str) -> dict[tuple, Outcome]:
    """By (dataset, id), of rows {"dataset"?, "id", "correct", "row"?, "judge"?}, one a chain."""
    found: dict[tuple, Outcome] = {}

    def check(row):
        return None if {"id", "correct"} <= set(row) else "a result row needs 'id' and 'correct'"

    for row in JsonlRows(path, check, "compare takes two results.jsonl", unique=False):
        key = row.get("dataset", ""), str(row["id"])
        outcome = found.setdefault(key, Outcome([], set(), set()))
        outcome.right.append(None if row["correct"] is None else bool(row["correct"]))
        outcome.rows.add(row.get("row"))
        if row["correct"] is not None:
            outcome.judges.add(row.get("judge", "rule"))
    return found


def compare(a: dict[tuple, Outcome], b: dict[tuple, Outcome]) -> dict:
    """Paired comparison, b minus a, over the questions that both have scored in full. What is left
    out is named; answers that different judges saw are not compared at all."""
    both = sorted(set(a) & set(b), key=str)
    judges = [", ".join(sorted(set().union(*(of[q].judges for q in both)))) for of in (a, b)]
    if all(judges) and judges[0] != judges[1]:
        raise SystemExit(f"not comparable: judged by {judges[0]} in a, by {judges[1]} in b")
    other = [q for q in both if len(a[q].rows | b[q].rows) > 1]
    unscored = [q for q in both if q not in other and None in a[q].right + b[q].right]
    both = [q for q in both if q not in {*other, *unscored}]
    left_out = {
        "only_in_a": [q for q in a if q not in b],
        "only_in_b": [q for q in b if q not in a],
        "other_rows": other,
        "unscored": unscored,
    }
    counts = {name: len(of) for name, of in left_out.items()}
    if not both:
        told = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise SystemExit(f"the two files have no question in common that can be compared: {told}")
    means = [[sum(of[q].right) / len(of[q].right) for q in both] for of in (a, b)]
    differences = [y - x for x, y in zip(*means)]
    return {
        "questions": len(both),
        **counts,
        "left_out": {name: [" ".join(q).strip() for q in of[:20]] for name, of in left_out.items()},
        "judge": judges[0] or judges[1],
        "a": sum(means[0]) / len(both),
        "b": sum(means[1]) / len(both),
        "difference": sum(differences) / len(both),
        "interval_95": [round(x, 4) for x in interval(differences, signed=True)],
        "gained": sum(d > 0 for d in differences),
        "lost": sum(d < 0 for d in differences),
    }


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[0].startswith("-"):
        raise SystemExit(__doc__)
    print(json.dumps(compare(*map(outcomes, argv)), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
