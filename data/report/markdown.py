"""Figures as Markdown: the tables of an evaluation and of a report on a reward model."""

import time


def percent(figure: list[float] | None) -> str:
    """53.4 [48.1, 58.7], in percent."""
    return "–" if figure is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in figure))


WORDS = ("data set", "subset", "judge", "kind", "value")  # columns of words; others hold figures


def table(rows: list[dict]) -> list[str]:
    """A pipe table of {column: value} rows with an empty line before it."""
    rule = ["---" if name in WORDS else "--:" for name in rows[0]]
    cells = [list(rows[0]), rule, *(row.values() for row in rows)]
    return ["", *("| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in cells)]


def report_facts(run: dict, summaries: list[dict]) -> list[str]:
    """What the numbers depend on, a line each, by run.json and summary.json."""
    config, commit = run["config"], run["git"] or "unknown"
    facts = [
        f"model {config['model']} ({run['agent']})",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit[:12]}",
        "temperature {temperature}, top_p {top_p}, seed {seed}".format(**config),
    ]
    for s in summaries:
        facts.append(f"{s['dataset']}: rows of {s['revision']}; tools {s['tools']}")
        if s["prompt_file"] and not config["prompt_file"]:
            facts[-1] += f", prompt {s['prompt_file']}"
        room = "{max_tokens_per_attempt} tokens an attempt, {max_context} positions, "
        room += "{max_turns} turns with calls"
        facts[-1] += ", " + room.format(**s["limits"])
    prompts = run["prompts"].items()
    facts += [f"{key} {told}" for key, told in prompts if config["refine"] or key == "prompt_file"]
    if any("search" in s["tools"] for s in summaries):
        facts.append(f"search: {run['search']}")
    if judges := {s["judge"] for s in summaries if s["scorer"] == "judge"}:
        facts.append(f"judge of answers: {', '.join(sorted(judges))}")
    if config["refine"]:
        source = config["rrm"]["source"]
        facts.append(f"refined after critiques of {source}: pass@1 is of refined answers")
    return facts


def markdown(summaries: list[dict], facts: list[str]) -> str:
    """report.md: every number with its subset, its judge and k beside it."""
    most = max(s["k"] for s in summaries)
    # JSON has made texts of the numbers
    summaries = [s | {"pass_at": {int(n): v for n, v in s["pass_at"].items()}} for s in summaries]
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


def report_table(report: dict) -> str:
    """A report as Markdown: its figures, then the calibration."""
    figures = {key: value for key, value in report.items() if not key.startswith("calibration")}
    tenths = [(key[12:] + "+", *report[key]) for key in report if key not in figures]
    tenths = [dict(zip(("score", "share correct", "judgments"), each)) for each in tenths]
    return "\n".join(table([figures]) + (table(tenths) if tenths else [])).strip()
