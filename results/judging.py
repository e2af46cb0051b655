"""How good a judge is: agreement with annotated scores, with correctness, against another judge."""

import math

import numpy as np

from reagent.reward_model import golds_of, leaks, row_trajectory
from results.statistics import table


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
    return float(
        (_ranks(scores)[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    )


def judgment_report(judgments: list, rows: list[dict], lengths: list[int]) -> dict:
    """Share valid, MAE, Spearman, AUC against correctness (and grounded correctness), leaks,
    calibration by tenths.
    """
    pairs = [(j, row) for j, row in zip(judgments, rows) if j is not None]
    scored = [(j.score, row["score"]) for j, row in pairs if row.get("score") is not None]
    leaked = [
        leaks(j.critique, golds_of(row), row["question"], row_trajectory(row)) for j, row in pairs
    ]
    report = {
        "valid": len(pairs) / max(len(rows), 1),
        "mae": float(np.mean([abs(a - b) for a, b in scored])) if scored else math.nan,
        "spearman": rank_correlation(*zip(*scored)) if scored else math.nan,
        "critique_leaks": float(np.mean(leaked)) if leaked else math.nan,
        "tokens": float(np.mean(lengths)) if lengths else math.nan,
    }
    for name in ("correct", "grounded"):
        labelled = [(j.score, row[name]) for j, row in pairs if row.get(name) is not None]
        if labelled:
            report[f"auc/{name}"] = auc(*zip(*labelled))
    labelled = [(j.score, row["correct"]) for j, row in pairs if row.get("correct") is not None]
    for tenth in range(10):
        inside = [right for score, right in labelled if min(int(score * 10), 9) == tenth]
        if inside:
            report[f"calibration/{tenth / 10:.1f}"] = [
                round(float(np.mean(inside)), 3),
                len(inside),
            ]
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}


def report_table(report: dict) -> str:
    """A report as Markdown: its figures, then the calibration."""
    figures = {key: value for key, value in report.items() if not key.startswith("calibration")}
    tenths = [
        {"score": key[12:] + "+", "share correct": value[0], "judgments": value[1]}
        for key, value in report.items()
        if key.startswith("calibration")
    ]
    return "\n".join(table([figures]) + (table(tenths) if tenths else [])).strip()


def paired_bootstrap(judged_a: list, judged_b: list, rows: list[dict], draws: int = 2000) -> dict:
    """b minus a over trajectories that both judged: MAE and AUC differences with 95 % intervals."""
    both = [i for i in range(len(rows)) if judged_a[i] and judged_b[i]]
    a, b = ([judged[i].score for i in both] for judged in (judged_a, judged_b))
    a, b, truth = np.array(a), np.array(b), np.array([rows[i]["score"] for i in both])
    gaps = np.abs(b - truth) - np.abs(a - truth)
    rng, result = np.random.default_rng(0), {}
    picks = rng.integers(len(both), size=(draws, len(both)))
    result["mae"] = (gaps.mean(), *np.quantile(gaps[picks].mean(1), [0.025, 0.975]))
    for name in ("correct", "grounded"):
        if all(rows[i].get(name) is not None for i in both):
            label = np.array([bool(rows[i][name]) for i in both])
            drawn = [auc(b[p], label[p]) - auc(a[p], label[p]) for p in picks]
            result[f"auc/{name}"] = (
                auc(b, label) - auc(a, label),
                *np.nanquantile(drawn, [0.025, 0.975]),
            )
    return {
        f"difference/{name}": [round(float(x), 4) for x in values]
        for name, values in result.items()
    }
