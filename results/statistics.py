"""Figures of an evaluation: pass@k, votes, intervals, comparisons, tables."""

import time
from collections import Counter
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np

from reagent.config import prompt_facts
from reagent.folder import read_json
from reagent.scorers import SCORER_OF_KIND, score
from results.journal import Entry, Journal

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


LIMITS = {"turn_limit", "turn_tokens", "token_limit", "context_limit"}


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


def percent(figure: list[float] | None) -> str:
    """53.4 [48.1, 58.7], in percent."""
    return "–" if figure is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in figure))


WORDS = ("data set", "subset", "judge", "kind", "value")  # columns of words; others hold figures


def table(rows: list[dict]) -> list[str]:
    """A pipe table of {column: value} rows with an empty line before it."""
    rule = ["---" if name in WORDS else "--:" for name in rows[0]]
    cells = [list(rows[0]), rule, *(row.values() for row in rows)]
    return ["", *("| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in cells)]


def report_facts(cfg, tasks: list, judge: str, how: str, search: str) -> list[str]:
    """What the numbers depend on, a line each."""
    commit = read_json(Path(cfg.out_dir) / "run.json", "git")["git"] or "unknown"
    facts = [
        f"model {cfg.model} ({how})",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit[:12]}",
        f"temperature {cfg.temperature}, top_p {cfg.top_p}, seed {cfg.seed}",
    ]
    for task in tasks:
        facts.append(f"{task.name}: rows of {task.revision}; tools {task.spec.tools}")
        if task.spec.prompt_file and not cfg.prompt_file:
            facts[-1] += f", prompt {task.spec.prompt_file}"
        if limits := task.limits:
            room = f"{limits.max_context} positions, {limits.max_turns} turns with calls"
            facts[-1] += f", {limits.max_tokens_per_attempt} tokens an attempt, {room}"
    prompts = prompt_facts(cfg).items()
    facts += [f"{key} {told}" for key, told in prompts if cfg.refine or key == "prompt_file"]
    if any("search" in task.spec.tools for task in tasks):
        facts.append(f"search: {search}")
    if any(task.spec.scorer == "judge" for task in tasks):
        facts.append(f"judge of answers: {judge or 'none named, verdicts of earlier runs count'}")
    if cfg.refine:
        facts.append(f"refined after critiques of {cfg.rrm.source}: pass@1 is of refined answers")
    return facts


def markdown(summaries: list[dict], facts: list[str]) -> str:
    """report.md: every number with its subset, its judge and k beside it."""
    most = max(s["k"] for s in summaries)
    text = ["# Evaluation", "", *(f"- {fact}" for fact in facts), ""]
    note = "All rows: whatever failed or is unscored counts as wrong."
    text.append(f"Percent, with 95 % intervals over questions. {note}")
    text += table([name(s) | main_figures(s, most) for s in summaries])
    between = sorted({n for s in summaries for n in s["pass_at"]} - {1, most})
    shares = [{f"n = {n}": percent(s["pass_at"].get(n)) for n in between} for s in summaries]
    sections = {"pass@n, unbiased, over all rows": zip(summaries, shares) if between else ()}
    refined = "Reagent-C: first answer (o1) and answer after the critique (o2), over all rows"
    sections[refined] = ((s, readable(s["refine"])) for s in summaries if "refine" in s)
    sections["Rows"] = ((s, readable(s["counts"])) for s in summaries)
    for s in summaries:
        groups = [(kind, *each) for kind, of in s["by"].items() for each in of.items()]
        rows = [(s, dict(kind=kind, value=value) | readable(of)) for kind, value, of in groups]
        sections[f"{s['dataset']} by kind of question"] = rows
    for title, rows in sections.items():
        if rows := [name(s) | row for s, row in rows]:
            text += ["", f"## {title}", *table(rows)]
    return "\n".join(text) + "\n"


def readable(figures: dict) -> dict:
    """Figures under the names of their columns; those with an interval in percent."""
    names = {"gain": "o2 - o1", "all": "pass@1, all rows"}
    shown = {key: percent(v) if isinstance(v, list) else v for key, v in figures.items()}
    return {names.get(key, key.replace("_", " ")): value for key, value in shown.items()}


def name(s: dict) -> dict:
    return {"data set": s["dataset"], "subset": s["subset"], "judge": s["judge"], "k": s["k"]}


def main_figures(s: dict, most: int) -> dict:
    figures = {"questions": s["questions"], "pass@1, all rows": percent(s["all"])}
    figures |= {"scored rows": s["scored_rows"], "pass@1, scored rows": percent(s["scored"])}
    figures |= {"F1": percent(s.get("f1"))}
    own = s["k"] == most
    many = {f"pass@{most}": percent(s["pass_at"][most] if own else None)}
    many[f"majority@{most}"] = percent(s["majority"] if own else None)
    return figures | (many if most > 1 else {})
