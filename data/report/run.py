"""The page of a run or an evaluation, from what lies in its folder."""

import json
from collections import Counter
from pathlib import Path

from data.growing import whole_rows
from data.report.markdown import markdown, report_facts, report_table
from data.report.page import counted, write_report
from data.report.plots import COLOURS, picture_svg, share_axes
from reagent.folder import write_whole

MOST = 1_000  # episodes on a page: a run's newest, of an evaluation as many of each data set


def text_of(path: Path, missing: str = "") -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else missing


def newest_episodes(run: Path, most: int = MOST) -> list[dict]:
    """A run's last episodes, in order, without token ids, with step and place among siblings."""
    episodes: list[dict] = []
    for path in sorted((run / "episodes").glob("step-*.jsonl"), reverse=True):
        siblings, of_step = Counter(), []
        for row in whole_rows(path):
            siblings[row["id"]] += 1
            step = int(path.stem.rpartition("-")[2])
            of_step.append(counted(row) | {"step": step, "sibling": siblings[row["id"]]})
        episodes = of_step + episodes
        if len(episodes) >= most:
            break
    return episodes[-most:]


def evaluated_episodes(out: Path, sets: int, most: int = MOST) -> tuple[list[dict], int]:
    """(episodes of results.jsonl, as many a set, of how many); encrypted ones without texts."""
    shown, seen = [], Counter()
    for line in whole_rows(out / "results.jsonl"):
        seen[line["dataset"]] += 1
        if seen[line["dataset"]] > most // max(sets, 1):
            continue
        episode = {"question": f"[{line['dataset']} {line['id']}]"} | line
        if "sealed" in line:
            episode["question"] += " kept encrypted"
            episode["attempts"] = [{"correct": line["correct"], "termination": line["status"]}]
        episode["meta"] = {"dataset": line["dataset"]}
        episode["sibling"] = line["rollout"] + 1
        failed = line["status"] in ("fault", "prompt_too_long")
        episode["dropped"] = line["status"] if failed else ""
        shown.append(episode)
    return shown, sum(seen.values())


def set_tiles(summaries: list[dict]) -> list[tuple[str, str, str]]:
    """(data set, pass@1 over all rows, its interval and what it is over) of summary.json."""
    tiles = []
    for s in summaries:
        share, low, high = (100 * x for x in s["all"])
        before = f"{100 * s['refine']['o1'][0]:.1f} → " if "refine" in s else ""
        note = f"{low:.1f} to {high:.1f}, {s['questions']:,} questions"
        tiles.append((s["dataset"], f"{before}{share:.1f} %", note + f" × {s['k']}" * (s["k"] > 1)))
    return tiles


def facts_of(run: Path) -> tuple[str, dict]:
    """(the script that made a run, its config) by run.json; empty ones without it."""
    facts = json.loads(text_of(run / "run.json", "{}"))
    return Path((facts.get("command") or [""])[0]).stem, facts.get("config", {})


def write_tables(run: Path, log: list[dict], summaries: list[dict]) -> str:
    """report.md: the tables of an evaluation, or of the last evaluation of a reward model; returns
    what stands there, "" where it is a run of neither."""
    facts, newest = json.loads(text_of(run / "run.json", "{}")), (log or [{}])[-1]
    figures = {key[5:]: value for key, value in newest.items() if key.startswith("eval/")}
    if summaries and "search" in facts:
        text = markdown(summaries, report_facts(facts, summaries))
    elif "valid" in figures:
        text = report_table(figures)
    else:
        return text_of(run / "report.md")
    write_whole(run / "report.md", text)
    return text


def title_of(run: Path, script: str, config: dict) -> str:
    kinds = {
        "grpo_unified": f"Reagent-{config.get('variant', '').upper()}, {run}",
        "train_rrm": f"Agent-RRM, {config.get('stage')}, {run}",
        "evaluate": f"Evaluation of {config.get('model')}",
    }
    return kinds.get(script, f"{script.upper()} {run}".strip())


def write_run_page(run: Path) -> str:
    """report.md of figures, report.html, and curve.svg where there are curves, from what lies in a
    run's folder; returns report.md."""
    (script, config), log = facts_of(run), list(whole_rows(run / "log.jsonl"))
    summaries = json.loads(text_of(run / "summary.json", "[]"))
    data = {"markdown": write_tables(run, log, summaries), "config": config, "log": log}
    if (run / "results.jsonl").is_file():
        data["episodes"], total = evaluated_episodes(run, len(summaries))
        data["tiles"] = [*set_tiles(summaries), ("episodes", f"{total:,}")]
    else:
        data |= {"episodes": newest_episodes(run), "which": "newest episodes"}
    drawn = write_report(run / "report.html", title=title_of(run, script, config), **data)
    if drawn := [panel for panel in drawn if panel.section == "Learning"][:6]:
        shares = [of for of in drawn if of.lines.keys() <= COLOURS.keys() and max(of.ys()) <= 1]
        if shares:
            share_axes(shares)
        (run / "curve.svg").write_text(picture_svg(drawn), encoding="utf-8")
    return data["markdown"]
