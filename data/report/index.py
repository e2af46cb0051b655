"""An index over the runs below a folder: their curves side by side, seeds with their spread."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from urllib.parse import quote

from data.growing import whole_rows
from data.report.curves import mean_line, numeric_series, panels, place, section_of
from data.report.markdown import percent
from data.report.page import write_page
from data.report.plots import Line, Panel, number, picture_svg, share_axes
from data.report.run import facts_of, text_of
from reagent.config import flat

PER_SEED = {"seed", "out_dir"}  # keys in which runs that differ by their seed differ


@dataclass
class Run:
    """A run below the folder of an index."""

    name: str  # its folder, seen from there
    script: str  # that made it
    seedless: str  # the same for runs that differ by their seed alone
    settings: dict  # its config, but for PER_SEED
    series: dict[str, list[tuple[float, float]]]
    page: str  # the way to its page, from there; "" where there is none


@dataclass
class Group:
    """Runs of the same settings: the seeds of one."""

    name: str
    runs: list[Run]

    def lines(self) -> dict[str, Line]:
        """The means over the seeds of the keys that all of them have."""
        keys = [key for key in self.runs[0].series if all(key in run.series for run in self.runs)]
        lines = {key: mean_line([run.series[key] for run in self.runs]) for key in keys}
        return {key: line for key, line in lines.items() if line.points}


def read_run(folder: Path, path: Path) -> Run:
    (script, config), name = facts_of(path), path.relative_to(folder).as_posix()
    settings = {key: value for key, value in flat(config).items() if key not in PER_SEED}
    home = str(Path(config.get("out_dir", "")).parent)  # the run's model may lie there too
    seedless = json.dumps(settings or name, sort_keys=True)
    seedless = seedless.replace(home, "") if len(home) > 1 else seedless
    series = numeric_series(whole_rows(path / "log.jsonl"))
    link = quote(f"{name}/report.html") if (path / "report.html").is_file() else ""
    return Run(name, script, seedless, settings, series, link)


def grouped(runs: list[Run]) -> list[Group]:
    """The seeds of each setting together; a run without a run.json stands alone."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.seedless, []).append(run)
    names = [pattern([run.name for run in seeds]) for seeds in found.values()]
    return [
        Group(name if names.count(name) == 1 else " + ".join(run.name for run in seeds), seeds)
        for name, seeds in zip(names, found.values())
    ]


def pattern(names: list[str]) -> str:
    """["u/0", "u/1"] -> "u/*"."""
    parts = [name.split("/") for name in names]
    if len(set(map(len, parts))) > 1:
        return " + ".join(names)
    return "/".join(of[0] if len(set(of)) == 1 else "*" for of in zip(*parts))


def compared(groups: list[Group]) -> list[Panel]:
    """A section for each family of keys with a panel for each group, on the same axes as the
    others with its keys."""
    rows: dict[str, list[Panel]] = {}
    for group in groups:
        for panel in panels(group.lines())[0]:
            if panel.section in ("Learning", "Other"):
                family = panel.title.removesuffix("/" + next(iter(panel.lines)))
                row = rows.setdefault(panel.title, [])
                row.append(replace(panel, title=group.name, section=family))
    for row in rows.values():
        share_axes(row)
    return [panel for row in rows.values() for panel in row]


def table_of(script: str, groups: list[Group]) -> dict:
    """For page.html: a row a group with its last values, mean and deviation over the seeds."""
    keys = sorted({key for group in groups for key in group.lines()})
    keys = [key for key in sorted(keys, key=place) if section_of(key) == "Learning"][:6]
    rows = []
    for group, apart in zip(groups, differences([group.runs[0].settings for group in groups])):
        last = [[run.series[key][-1][1] for run in group.runs if key in run.series] for key in keys]
        steps = {points[-1][0] for run in group.runs for points in run.series.values()}
        links = [{"text": run.name, "href": run.page} for run in group.runs]
        rows.append([links, apart, number(max(steps, default=0)), *map(over_seeds, last)])
    head = ["run", "differs in", "steps", *keys]
    return {"title": f"Runs of {script or 'unknown scripts'}", "head": head, "rows": rows}


def differences(settings: list[dict]) -> list[str]:
    """How each setting differs: its values of the keys that vary, but for those that most have."""
    told: list[list[str]] = [[] for _ in settings]
    for name in dict.fromkeys(name for of in settings for name in of):
        values = [str(of.get(name)) for of in settings]
        usual, times = Counter(values).most_common(1)[0]
        if times == len(values):
            continue
        for words, value in zip(told, values):
            if value != usual or 2 * times <= len(values):
                words.append(f"{name} {value}")
    return list(map(", ".join, told))


def over_seeds(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}" if values else "–"


def evaluations(folder: Path, runs: list[Path]) -> list[dict]:
    """The table of the evaluations among the runs, one row a data set; [] where there are none."""
    rows = []
    for path in runs:
        name = path.relative_to(folder).as_posix()
        link = {"text": name, "href": quote(f"{name}/report.html")}
        for s in json.loads(text_of(path / "summary.json", "[]")):
            figures = [str(s[key]) for key in ("dataset", "subset", "judge", "questions", "k")]
            rows.append([link, *figures, percent(s["all"])])
    head = ["evaluation", "data set", "subset", "judge", "questions", "k", "pass@1, all rows"]
    return [{"title": "Evaluations", "head": head, "rows": rows}] if rows else []


def write_index(folder: Path, found: list[Path]) -> None:
    """index.html and curves.svg over the runs below a folder."""
    runs = [read_run(folder, path) for path in found if (path / "log.jsonl").is_file()]
    scripts = {run.script: [of for of in runs if of.script == run.script] for run in runs}
    tables, drawn = evaluations(folder, found), []
    for script, those in scripts.items():
        groups = grouped(those)
        tables.append(table_of(script, groups))
        drawn += compared(groups)
    sections = list(dict.fromkeys(panel.section for panel in drawn))
    data = {"tiles": [("runs", f"{len(found):,}")], "tables": tables, "unfolded": sections[:3]}
    if any(line.spread for panel in drawn for line in panel.lines.values()):
        data["note"] = "Line: mean over seeds. Band: from the lowest to the highest."
    write_page(folder / "index.html", f"Runs in {folder}", data, drawn)
    if drawn:
        row = [panel for panel in drawn if panel.section == sections[0]]
        (folder / "curves.svg").write_text(picture_svg(row), encoding="utf-8")
