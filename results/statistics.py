"""Figures of an evaluation: pass@k, votes, intervals, what refinement changed."""

from collections import Counter
from dataclasses import dataclass
from math import comb

import numpy as np

from reagent.scorers import SCORER_OF_KIND, score
from results.journal import Entry, Journal

ROOM = ("max_tokens_per_attempt", "max_context", "max_turns")  # of the limits of a chain
F1_SCORERS = ("hotpotqa", "2wiki", "musique", "bamboogle")


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased P(at least one of k samples is right) from n samples (Chen et al. 2021)."""
    return 1.0 - comb(n - right, k) / comb(n, k) if k <= n else float("nan")


def bootstrap_interval(values, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean over questions."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    size = (draws // 20, len(values))  # in parts: 12,000 questions at once would be a gigabyte
    means = [values[rng.integers(len(values), size=size)].mean(1) for _ in range(20)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def interval(values: list[float], signed: bool = False) -> tuple[float, float]:
    """95 % interval of the mean over questions: by bootstrap, and where all are right or all wrong
    (`signed`: nothing moved), so that a bootstrap has no width, Wilson's."""
    n, value = len(values), float(values[0])
    if value not in (-1.0, 0.0, 1.0) or any(v != value for v in values):
        return bootstrap_interval(values)
    width = 1.96**2 / (n + 1.96**2)
    return max(value - width, -1.0 if signed else 0.0), min(value + width, 1.0)


def mean_interval(values, signed: bool = False) -> list[float] | None:
    """[mean, low, high]; None of nothing."""
    values = list(values)
    if not values:
        return None
    return [round(x, 4) for x in (sum(values) / len(values), *interval(values, signed))]


def majority(chains: list["Chain"], scorer: str) -> bool:
    """Whether the answer with the most votes is right; of equals the first given wins."""
    votes: list[list[tuple]] = []  # (answer, right) of those that gave one answer

    def same(a, b):  # to the scorer either is right where the other is gold
        return a == b or score(scorer, a, b)["correct"] or score(scorer, b, a)["correct"]

    given = [(c.entry.answers[-1], c.last) for c in chains if c.entry and c.entry.answers]
    for answer, right in given:
        if answer is not None:  # no answer has no vote
            those = next((of for of in votes if same(answer, of[0][0])), None)
            if those is None:
                votes.append(those := [])
            those.append((answer, right))
    most = max(votes, key=len, default=[])
    return next((right for _, right in most if right is not None), False)


@dataclass
class Chain:
    """One chain for the statistics: what is known of it, or that it is missing."""

    first: bool | None = None  # right, wrong, None: unscored
    last: bool | None = None
    entry: Entry | None = None


def chains_of(task, journal: Journal, judge: str) -> list[list[Chain]]:
    """By question and rollout."""
    grid: dict[str, list[Chain]] = {}
    for key, row in task.keys():
        chain = Chain()
        if journal.done(key, row):
            entry = journal.entries[key]
            told = enumerate(entry.correct)
            right = [journal.said(key, i, judge)[1] if c is None else c for i, c in told] or [False]
            chain = Chain(right[0], right[-1], entry)
        grid.setdefault(row["id"], []).append(chain)
    return list(grid.values())


def summarise(task, journal: Journal, judge: str = "", refine: bool = False) -> dict:
    """The figures of one data set. `all`: over all rows, where whatever failed or stayed unscored
    counts as wrong; `scored`: over the scored rows. Intervals are over questions."""
    grid, k, scorer = chains_of(task, journal, judge), task.rollouts, task.spec.scorer or "rule"
    flat = [chain for chains in grid for chain in chains]
    kinds = [SCORER_OF_KIND[row["kind"]] for row in task.rows]
    rules = kinds if scorer in ("judge", "rule") else [scorer for _ in grid]  # of equal answers
    scored = [[bool(c.last) for c in chains if c.last is not None] for chains in grid]
    rights = [sum(c.last is True for c in chains) for chains in grid]
    levels = sorted({k, *(2**i for i in range(k.bit_length()))})
    figures = {
        "dataset": task.name,
        "subset": task.subset,
        "questions": len(grid),
        "k": k,
        "scorer": scorer,
        "revision": task.revision,
        "tools": task.spec.tools,
        "prompt_file": task.spec.prompt_file,
        "limits": {name: getattr(task.limits, name, None) for name in ROOM},
        "judge": judges_of(task, journal, judge),
        "all": mean_interval(right / k for right in rights),
        "scored": mean_interval(sum(values) / len(values) for values in scored if values),
        "scored_rows": sum(map(len, scored)),
        "pass_at": {n: mean_interval(pass_at_k(k, r, n) for r in rights) for n in levels},
        "majority": mean_interval(map(majority, grid, rules)),
        "counts": counts(task, flat, journal),
        "by": by_meta(task, grid),
    }
    f1 = [sum((c.entry.f1 or [0.0])[-1] or 0.0 for c in chains if c.entry) / k for chains in grid]
    if scorer in F1_SCORERS or any(f1):
        figures["f1"] = mean_interval(f1)
    return figures | ({"refine": refine_figures(grid)} if refine else {})


def judges_of(task, journal: Journal, judge: str) -> str:
    """The names of the judges behind the numbers; "rule" where none is."""
    if task.spec.scorer != "judge":
        return "rule"
    if judge:
        return judge
    keys = {key for key, _ in task.keys()}
    names = {said[-1][0] for key, said in journal.verdicts.items() if key[:3] in keys}
    return ", ".join(sorted(names)) or "none"


LIMITS = {"turn_limit", "turn_tokens", "token_limit", "context_limit", "time_limit"}


def counts(task, chains: list[Chain], journal: Journal) -> dict:
    """What happened to the rows."""
    entries = [chain.entry for chain in chains if chain.entry]
    lasts, statuses = Counter(c.last for c in chains if c.entry), Counter(e.status for e in entries)
    lost = Counter(key in journal.faults for key, row in task.keys() if not journal.done(key, row))
    figures = dict(rows=len(chains), right=lasts[True], wrong=lasts[False], unscored=lasts[None])
    figures["no_answer"] = statuses["no_answer"]
    figures["limit"] = sum(bool(set(entry.ended[-1:]) & LIMITS) for entry in entries)
    figures |= dict(prompt_too_long=statuses["prompt_too_long"], fault=lost[True])
    figures |= dict(missing=lost[False], calls=0, tokens=0)
    if entries:
        figures["calls"] = round(sum(entry.calls for entry in entries) / len(entries), 2)
        figures["tokens"] = round(sum(entry.tokens for entry in entries) / len(entries))
    return figures


def by_meta(task, grid: list[list[Chain]]) -> dict:
    """{"level": {"1": {"questions", "all"}}}: accuracy over all rows by what a set publishes."""
    found = {}
    for name in ("level", "difficulty_level", "type", "hops", "lang"):
        groups: dict[str, list[float]] = {}
        for row, chains in zip(task.rows, grid):
            if name in row["meta"]:
                share = sum(c.last is True for c in chains) / len(chains)
                groups.setdefault(str(row["meta"][name]), []).append(share)
        for value, shares in sorted(groups.items()) if 1 < len(groups) <= 24 else ():
            group = dict(questions=len(shares), all=mean_interval(shares))
            found.setdefault(name, {})[value] = group
    return found


def refine_figures(grid: list[list[Chain]]) -> dict:
    """Reagent-C: o1 and o2 over all rows, and what changed; a chain without o2 keeps o1."""
    flat = [chain for chains in grid for chain in chains]

    def share(of, signed=False):
        return mean_interval((sum(map(of, chains)) / len(chains) for chains in grid), signed)

    moves = Counter((c.first, c.last) for c in flat)
    answers = Counter(min(len(c.entry.answers), 2) for c in flat if c.entry)
    return {
        "o1": share(lambda c: c.first is True),
        "o2": share(lambda c: c.last is True),
        "gain": share(lambda c: (c.last is True) - (c.first is True), signed=True),
        "fixed": moves[False, True],
        "broken": moves[True, False],
        "refined": answers[2],
        "not_refined": answers[0] + answers[1],
    }
