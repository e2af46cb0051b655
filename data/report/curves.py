"""From the lines of a log to curves: series of numbers, the panels they share, their sections."""

import math
import re
from collections.abc import Iterable
from statistics import mean

from data.report.plots import Line, Panel

# section of the page -> first words of the keys it shows, in that order; others stand under Other
SECTIONS = {
    "Learning": "eval accuracy grounded reward rule_reward score lift valid mae auc spearman loss "
    "leak alarm",
    "Optimization": "entropy clip_share dlogp grad_norm advantage pools kl lr updates",
    "Rollouts": "tokens trained_tokens tool_calls repaired ended attempts left_out judge too_long",
    "Speed": "seconds tokens_per_second memory",
}
ORDER = [(section, word) for section, words in SECTIONS.items() for word in words.split()]


def numeric_series(log: Iterable[dict]) -> dict[str, list[tuple[float, float]]]:
    """{key: [(step, value)]} of the finite numbers in log lines; lines without a step count."""
    lines = [(line.get("step", number), line) for number, line in enumerate(log, 1)]
    series: dict[str, list[tuple[float, float]]] = {}
    for step, line in lines:
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "step" and math.isfinite(value):
                series.setdefault(str(key), []).append((step, float(value)))
    for key in series:
        if key.startswith("ended/"):  # a step without such an end leaves it out: 0
            series[key] = [(n, float(line.get(key, 0))) for n, line in lines if n or key in line]
    return series


def panels(lines: dict[str, Line]) -> tuple[list[Panel], dict[str, float]]:
    """{key: line} -> (panels in the order of SECTIONS, constants {key: value}, which never move).
    Keys that share what stands before the "/" share a panel, unless their scales differ twentyfold;
    score/right and score/wrong stand apart from score/first and score/refined."""
    constants, groups = {}, {}
    for key, line in lines.items():
        values = {y for _, y in line.points}
        family, _, label = key.rpartition("/")
        if len(line.points) > 1 and len(values) == 1 and not family:
            constants[key] = values.pop()
            continue
        apart = " of right and wrong answers" * (label in ("right", "wrong"))
        groups.setdefault((family or key) + apart, {})[label] = line
    found = [part for title, group in groups.items() for part in split_by_scale(title, group)]
    return sorted(found, key=lambda panel: place(panel.title)), constants


def place(key: str) -> int:
    """Where a key's first word stands in ORDER; behind all where it does not."""
    word = re.split(r"[/ ]", key)[0]
    return next((i for i, (_, known) in enumerate(ORDER) if known == word), len(ORDER))


def section_of(key: str) -> str:
    return [*(section for section, _ in ORDER), "Other"][place(key)]


def split_by_scale(title: str, lines: dict[str, Line]) -> list[Panel]:
    """A panel, or several: lines that a common axis would flatten get one of their own."""
    sizes = {label: max(abs(y) for _, y in line.points) for label, line in lines.items()}
    rooms: list[list[str]] = []
    for label in sorted(lines, key=sizes.get, reverse=True):
        fits = (room for room in rooms if sizes[label] * 20 >= sizes[room[0]] and len(room) < 8)
        room = next(fits, None)
        rooms.append([label]) if room is None else room.append(label)
    found = []
    for room in rooms:
        alone = len(room) == 1 and room[0] not in ("", title)
        part = {label: line for label, line in lines.items() if label in room}
        found.append(Panel(f"{title}/{room[0]}" if alone else title, part, section_of(title)))
    return found


def mean_line(runs: list[list[tuple[float, float]]], per: float = 1) -> Line:
    """The mean over runs where all have a value, its band from lowest to highest; x times `per`."""
    values = [dict(points) for points in runs]
    steps = [x for x in sorted(values[0]) if all(x in of for of in values)]
    rows = [(per * x, [of[x] for of in values]) for x in steps]
    spread = [(x, min(ys), max(ys)) for x, ys in rows] if len(runs) > 1 else []
    return Line([(x, mean(ys)) for x, ys in rows], spread)
