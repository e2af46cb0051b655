"""How good a reward model is: agreement with annotated scores, with correctness, with another."""

import math

import numpy as np

from reagent.critiques import MOST_WORDS, leaks, name_agreement, named, names, prose
from reagent.reward_model import annotation, golds_of, row_trajectory


def rank_correlation(a, b) -> float:
    """Spearman's rho with average ranks."""
    ranks = [_ranks(np.asarray(x, float)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]) if min(r.std() for r in ranks) > 0 else math.nan


def _ranks(x):
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]


def auc(scores, labels) -> float:
    """Probability that a positive scores above a negative, ties count half."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    positives, negatives = labels.sum(), (~labels).sum()
    if not positives or not negatives:
        return math.nan
    above = _ranks(scores)[labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


WINDOW, CLEAR_FALL = 10, 0.1  # steps of a running mean; how far below its best is clear


def has_fallen(values: list[float]) -> bool:
    """Whether the mean of the last WINDOW values is CLEAR_FALL below the best such mean so far."""
    means = [sum(values[i - WINDOW : i]) / WINDOW for i in range(WINDOW, len(values) + 1)]
    return bool(means) and means[-1] < max(means) - CLEAR_FALL


def judgment_report(judgments: list, rows: list[dict], lengths: list[int]) -> dict:
    """Figures of judgments (None: not valid) of rows; "unknown" where no row says it."""
    pairs = [(j, row) for j, row in zip(judgments, rows) if j is not None]
    scored = [(j.score, s) for j, row in pairs if (s := annotation(row)[0]) is not None]
    labelled = [(j.score, row["correct"]) for j, row in pairs if row.get("correct") is not None]
    told = [(row["question"], row_trajectory(row), golds_of(row), j.critique) for j, row in pairs]
    leaked = [leaks(text, golds, asked, turns) for asked, turns, golds, text in told if golds]
    report = {
        "valid": len(pairs) / max(len(rows), 1),
        "mae": _mean(abs(a - b) for a, b in scored),
        "brier": _mean((score - right) ** 2 for score, right in labelled),
        "spearman": rank_correlation(*zip(*scored)) if scored else math.nan,
        "critique_leaks": _mean(leaked),
        "tokens": _mean(lengths),
    }
    for name in ("correct", "grounded"):
        told = [(j.score, row[name]) for j, row in pairs if row.get(name) is not None]
        if told:
            report[f"auc/{name}"] = auc(*zip(*told))
    report |= critique_report(pairs)
    report["ece"] = 0.0 if labelled else math.nan  # expected calibration error, over ten bins
    for tenth in range(10):
        inside = [pair for pair in labelled if min(int(pair[0] * 10), 9) == tenth]
        if inside:
            told, right = map(_mean, zip(*inside))
            report[f"calibration/{tenth / 10:.1f}"] = [round(right, 3), len(inside)]
            report["ece"] += abs(told - right) * len(inside) / len(labelled)
    unknown = {k for k, v in report.items() if isinstance(v, float) and math.isnan(v)}
    figures = {k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}
    return figures | dict.fromkeys(unknown, "unknown")


def critique_report(pairs: list) -> dict:
    """Critiques of (judgment, row): what share names something of its trajectory, and of the next
    row's (one that fits any names the same in both), F1 of names against the annotated, prose."""
    trails = [names(row["question"] + "\n" + row_trajectory(row)) for _, row in pairs]
    critiques, annotated = [j.critique for j, _ in pairs], [annotation(row)[1] for _, row in pairs]
    told = [each for each in zip(critiques, annotated, trails) if each[1]]
    return {
        "critique/named": _mean(map(bool, map(named, critiques, trails))),
        "critique/named_in_next": _mean(map(bool, map(named, critiques, trails[1:] + trails[:1]))),
        "critique/names_f1": _mean(name_agreement(*each) for each in told),
        "critique/prose": _mean(prose(critique, MOST_WORDS) for critique in critiques),
    }


def _mean(values) -> float:
    values = list(values)
    return float(np.mean(values)) if values else math.nan
