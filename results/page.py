"""One self-contained HTML page per run: config, results, curves, and every episode readable turn by
turn.

    python evaluate.py page RUN_FOLDER       # makes RUN_FOLDER/report.html and RUN_FOLDER/curve.svg again

The page loads nothing from outside and runs no text of a model or a web page as markup: Python
escapes the head, and the episodes travel as one JSON block which the script puts on the page by
textContent only.
"""

import html
import json
import math
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

CHARS_PER_MESSAGE = (
    20_000  # longer messages are cut in the middle: a thousand long episodes must still open
)

LIVE_EPISODES = 1_000  # how many of a run's newest episodes go on its page

# section of the page -> first words of the keys it shows, in that order; what is named nowhere
# stands under Other
SECTIONS = {
    "Learning": "eval accuracy grounded reward rule_reward score lift valid mae auc spearman loss".split(),
    "Optimization": "entropy clip_share dlogp grad_norm advantage pools kl lr updates".split(),
    "Rollouts": "tokens trained_tokens tool_calls ended attempts left_out judge too_long prefix_hits".split(),
    "Speed": "seconds tokens_per_second memory".split(),
}

COUNTS = ("ended/",)  # keys that a step without such a case leaves out: missing means 0

NOISY = 40  # panels of more points show them faintly, and their running mean in full

COLOURS = {
    "first": 0,
    "refined": 1,
    "right": 2,
    "wrong": 3,
}  # series that keep their colour in every panel


# ---------------------------------------------------------------- text from outside, made harmless
_VISIBLE = {
    code: f"\\x{code:02x}" for code in (*range(9), 11, 12, *range(13, 32), *range(0x7F, 0xA0))
}

_VISIBLE |= {
    code: f"\\u{code:04x}"
    for code in (
        0x200E,
        0x200F,
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0xFEFF,
    )
}

_MARK = r"[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"

_MARKS = re.compile(f"({_MARK}{{4}}){_MARK}+")


def plain(text) -> str:
    """`text` with control characters and direction overrides made visible, lone surrogates
    replaced, and stacks of combining marks cut at four: what a page can show without being moved
    about by it."""
    text = (
        str(text)
        .replace("\r\n", "\n")
        .encode("utf-16", "surrogatepass")
        .decode("utf-16", "replace")
    )
    return _MARKS.sub(r"\1", text.translate(_VISIBLE))


def shorten(text: str, most: int = CHARS_PER_MESSAGE) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return (
        f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out of this page "
        f"...]\n{text[-half:]}"
    )


def jsonable(value):
    """Any value as strict JSON data: text made plain, NaN and infinity as None, unknown types as
    text.
    """
    if isinstance(value, dict):
        return {plain(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return shorten(plain(value))


def embed(name: str, value) -> str:
    """A JSON script block. `<` is written as an escape, so nothing inside can close the block or
    open a comment.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def escape(text) -> str:
    return html.escape(plain(text))


# ---------------------------------------------------------------- episodes
def outcomes(episode: dict) -> list[str]:
    """The filters an episode falls under: dropped, or right / wrong / unscored by its last attempt,
    plus fixed / broken when refinement changed the verdict."""
    if episode.get("dropped"):
        return ["dropped"]
    verdicts = [attempt.get("correct") for attempt in episode.get("attempts") or []]
    if not verdicts or verdicts[-1] is None:
        return ["unscored"]
    found = ["right" if verdicts[-1] else "wrong"]
    if len(verdicts) == 2 and verdicts[0] is not None and bool(verdicts[0]) != bool(verdicts[1]):
        found.append("fixed" if verdicts[1] else "broken")
    return found


def slim(episode: dict) -> dict:
    """What the page needs of an Episode: everything but token ids, mask and log-probs, whose counts
    stay.
    """
    kept = {key: value for key, value in episode.items() if key not in ("ids", "mask", "logps")}
    gold = kept.get("gold") or []
    kept["gold"] = gold if isinstance(gold, (list, tuple)) else [gold]
    kept = jsonable(kept)
    for message in kept.setdefault("messages", []):
        content = message.get("content") or ""
        message["content"] = (
            content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        )
    kept.setdefault("attempts", [])
    kept["tokens"] = len(episode.get("ids") or [])
    kept["trained"] = sum(episode.get("mask") or [])
    kept["outcomes"] = outcomes(episode)
    kept["dataset"] = plain((episode.get("meta") or {}).get("dataset", ""))
    return kept


def summary(episodes: list[dict], which: str = "episodes") -> list[tuple[str, str]]:
    """The strip of figures above the table: (label, value) pairs over slim episodes; `which` they
    are is the first label.
    """
    if not episodes:
        return []
    counts = {
        name: sum(name in e["outcomes"] for e in episodes)
        for name in ("fixed", "broken", "dropped")
    }
    pairs = [(which, f"{len(episodes):,}")]
    for stage, label in enumerate(("first attempts right", "refined attempts right")):
        verdicts = [
            e["attempts"][stage].get("correct")
            for e in episodes
            if len(e.get("attempts") or []) > stage and "dropped" not in e["outcomes"]
        ]
        verdicts = [verdict for verdict in verdicts if verdict is not None]
        if verdicts:
            pairs.append((label, f"{100 * sum(map(bool, verdicts)) / len(verdicts):.1f} %"))
    if len(pairs) == 3:
        pairs += [
            ("fixed by refinement", f"{counts['fixed']:,}"),
            ("broken by it", f"{counts['broken']:,}"),
        ]
    return pairs + [("dropped", f"{counts['dropped']:,}")]


# ---------------------------------------------------------------- curves
def numeric_series(log: Iterable[dict]) -> dict[str, list[tuple[float, float]]]:
    """{key: [(step, value), ...]} of every finite number in the log lines; a line without a step
    counts for itself.
    """
    lines = [(line.get("step", place), line) for place, line in enumerate(log, 1)]
    series: dict[str, list[tuple[float, float]]] = {}
    for step, line in lines:
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "step" and math.isfinite(value):
                series.setdefault(str(key), []).append((step, float(value)))
    for key in (key for key in series if key.startswith(COUNTS)):
        series[key] = [(step, float(line.get(key, 0))) for step, line in lines]
    return series


def panels(series: dict) -> tuple[list[tuple[str, str, dict]], dict[str, float]]:
    """Series -> ([(section, panel title, {label: points})], constants {key: value}).

    Keys that share what stands before the "/" share a panel, unless their scales differ twentyfold;
    score/right and score/wrong stand apart from score/first and score/refined. A key that never
    moves is a constant, not a curve.
    """
    constants, groups = {}, {}
    for key, points in series.items():
        values = [y for _, y in points]
        family, _, label = key.rpartition("/")
        if len(points) > 1 and min(values) == max(values) and not family:
            constants[key] = values[0]
            continue
        apart = " of right and wrong answers" * (label in ("right", "wrong"))
        groups.setdefault((family or key, apart, bool(family)), {})[label] = points
    found = []
    for (title, apart, _), lines in groups.items():
        found += [
            (section_of(title), name, part) for name, part in split_by_scale(title + apart, lines)
        ]
    words = [word for section in SECTIONS.values() for word in section]
    sections = [*SECTIONS, "Other"]
    place = {word: i for i, word in enumerate(words)}
    found.sort(
        key=lambda panel: (sections.index(panel[0]), place.get(first_word(panel[1]), len(place)))
    )
    return found, constants


def first_word(title: str) -> str:
    return re.split(r"[/ ]", title)[0]


def section_of(title: str) -> str:
    return next((name for name, words in SECTIONS.items() if first_word(title) in words), "Other")


def split_by_scale(title: str, lines: dict) -> list[tuple[str, dict]]:
    """[(title, {label: points})]: lines that a common axis would flatten get a panel of their
    own.
    """
    sizes = {label: max(abs(y) for _, y in points) for label, points in lines.items()}
    rooms: list[dict] = []
    for label in sorted(lines, key=lambda name: -sizes[name]):
        for room in rooms:
            if sizes[label] * 20 >= max(sizes[name] for name in room) and len(room) < 8:
                room[label] = lines[label]
                break
        else:
            rooms.append({label: lines[label]})
    parts = []
    for room in rooms:
        room = {label: room[label] for label in lines if label in room}
        only = next(iter(room))
        parts.append(
            (f"{title}/{only}" if len(room) == 1 and only and only != title else title, room)
        )
    return parts


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers that cover [low, high], at most `most` + 1 of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A short label: 0.25, 12k, 3.1M, 2e-5."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g}{suffix}"
    return (
        f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2g}".replace("e-0", "e-")
    )


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean over about a tenth of the points."""
    half = len(points) // 20
    ys = [y for _, y in points]
    means = (ys[max(0, i - half) : i + half + 1] for i in range(len(ys)))
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, means)]


def thin(points: list, most: int = 300) -> list:
    """At most `most` + 1 points, the last one kept: no screen shows more."""
    stride = max(1, math.ceil(len(points) / most))
    kept = points[::stride]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def curve_svg(
    series: dict[str, list[tuple[float, float]]], title: str = "", width=300, height=184
) -> str:
    """One panel as an SVG element; series = {label: [(x, y), ...]}. Colours come from CURVE_CSS.

    Lines of more than NOISY points are drawn faintly, with their running mean in full.
    """
    left, right, top, bottom = 40, 12, 44, 24
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    marks = ticks(0.0 if 0 <= min(ys) < 0.6 * max(ys) else min(ys), max(ys))
    x0, x1, y0, y1 = min(xs), max(xs), marks[0], marks[-1]

    def at(x, y):
        across = (x - x0) / ((x1 - x0) or 1)
        return (
            round(left + across * (width - left - right), 1),
            round(top + (1 - (y - y0) / ((y1 - y0) or 1)) * (height - top - bottom), 1),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curve" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}" data-box="{left},{right},{x0},{x1}">',
        f'<text class="title" x="{left - 34}" y="15">{escape(title)}</text>',
    ]
    for mark in marks:
        _, y = at(x0, mark)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{left - 6}" y="{y + 3.5}" text-anchor="end">{number(mark)}</text>'
        )
    for x, anchor, text in (
        (x0, "start", number(x0)),
        ((x0 + x1) / 2, "middle", "step"),
        (x1, "end", number(x1)),
    ):
        parts.append(
            f'<text class="tick" x="{at(x, y0)[0]}" y="{height - 8}" text-anchor="{anchor}">{text}</text>'
        )
    legend_x = left - 34
    for index, (label, points) in enumerate(
        sorted(series.items(), key=lambda item: COLOURS.get(item[0], 9))
    ):
        named = len(COLOURS.keys() & series)
        colour = f"c{COLOURS.get(label, (index + (len(COLOURS) - named if named else 0)) % 8)}"
        parts.append(line_svg(points, at, colour))
        if label and len(series) > 1:
            parts.append(
                f'<circle class="dot {colour}" cx="{legend_x + 4}" cy="29" r="3.5"/>'
                f'<text class="label" x="{legend_x + 11}" y="32.5">{escape(label)}</text>'
            )
            legend_x += 22 + 6.2 * len(label)
    return "".join(parts) + "</svg>"


def line_svg(points: list[tuple[float, float]], at, colour: str) -> str:
    """One series as SVG; at(x, y) -> the place on the panel."""
    if len(points) == 1:
        x, y = at(*points[0])
        return f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="2.5"/>'

    def path(those):
        return " ".join(f"{x},{y}" for x, y in (at(*point) for point in thin(those)))

    if len(points) <= NOISY:
        return f'<polyline class="line {colour}" points="{path(points)}"/>'
    return (
        f'<polyline class="line faint {colour}" points="{path(points)}"/>'
        f'<polyline class="line {colour}" points="{path(smooth(points))}"/>'
    )


def figure_svg(chosen: list[tuple[str, str, dict]], columns: int = 3) -> str:
    """Several panels as one free-standing SVG file, for a README; it follows the reader's light or
    dark scheme.
    """
    wide, high, gap = 300, 184, 18
    rows = math.ceil(len(chosen) / columns)
    columns = min(columns, len(chosen))
    width, height = columns * (wide + gap) + gap, rows * (high + gap) + gap
    cells = []
    for i, (_, title, lines) in enumerate(chosen):
        panel = curve_svg(lines, title, wide, high)
        x, y = gap + i % columns * (wide + gap), gap + i // columns * (high + gap)
        cells.append(panel.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}"><style>{CURVE_CSS}</style><rect class="paper" width="100%" height="100%" rx="8"/>'
        f"{''.join(cells)}</svg>\n"
    )


def curves_html(log: Iterable[dict]) -> str:
    """All panels by section, the first section open; constants as a line of text."""
    found, constants = panels(numeric_series(log))
    parts, data = [], []
    for section in dict.fromkeys(panel[0] for panel in found):
        cells = []
        for _, title, lines in (panel for panel in found if panel[0] == section):
            drawn = curve_svg(lines, title)
            cells.append(
                f'<figure data-panel="{len(data)}">{drawn}<figcaption></figcaption></figure>'
            )
            data.append({plain(label or title): thin(points) for label, points in lines.items()})
        opened = " open" * (section in ("Learning", "Other") or not parts or len(found) < 9)
        parts.append(
            f'<details class="curves"{opened}><summary>{section} <small>{len(cells)}</small></summary>'
            f'<div class="grid-of-curves">{"".join(cells)}</div></details>'
        )
    if constants:
        text = " &middot; ".join(
            f"{escape(key)} {number(value)}" for key, value in sorted(constants.items())
        )
        parts.append(f'<p class="constants">Did not change: {text}</p>')
    if not parts:
        return ""
    noisy = any(len(points) > NOISY for _, _, lines in found for points in lines.values())
    note = (
        "<p class='constants'>Faint: every step. Full: running mean over a tenth of the steps.</p>"
        * noisy
    )
    return f'<section id="curves"><h2>Curves</h2>{note}{"".join(parts)}{embed("panels", data)}</section>'


# ---------------------------------------------------------------- the rest of the head
def table_html(markdown: str) -> str:
    """Headings, paragraphs and pipe tables of Markdown as HTML; **bold** and `code` inside,
    everything escaped.
    """

    def inline(text):
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text.strip().replace("\\|", "|")))
        return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)

    parts, rows = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.strip().startswith("|"):
            rows.append(re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|")))
            continue
        if rows:
            parts.append(rows_html(rows, inline))
            rows = []
        heading = re.match(r"#{1,6}\s+(.*)", line)
        if heading:
            parts.append(f"<h3>{inline(heading[1])}</h3>")
        elif line.strip():
            parts.append(f"<p>{inline(line.strip().removeprefix('- '))}</p>")
    return "".join(parts)


def rows_html(rows: list[list[str]], inline) -> str:
    """One pipe table; a column is set right when its rule says so (`--:`) or all its cells are
    figures.
    """
    rule = (
        rows[1]
        if len(rows) > 1 and all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in rows[1])
        else None
    )
    body = rows[2:] if rule else rows[1:]
    figure = re.compile(r"\s*(?:[-+−±]?[\d.,]+\s*%?(?:\s*[±\[(–-].*)?|n/a|-|–|)\s*")

    def side(column):
        cells = [row[column] for row in body if column < len(row)]
        told = rule and column < len(rule) and rule[column].strip().endswith(":")
        return ' class="right"' if told or (cells and all(map(figure.fullmatch, cells))) else ""

    head = "".join(f"<th{side(i)}>{inline(cell)}</th>" for i, cell in enumerate(rows[0]))
    lines = "".join(
        "<tr>"
        + "".join(f"<td{side(i)}>{inline(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in body
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def config_html(config: dict) -> str:
    if not config:
        return ""
    shown = (
        value if isinstance(value, str) else json.dumps(jsonable(value))
        for value in config.values()
    )
    rows = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in zip(config, shown)
    )
    head = f"<summary>Config <small>{len(config)} keys</small></summary>"
    return f"<details class='config'>{head}<dl>{rows}</dl></details>"


def write_report(
    path,
    *,
    title: str,
    episodes=(),
    which="episodes",
    log=(),
    table_markdown: str = "",
    config=None,
) -> None:
    """Write the page to `path`, beside and renamed.

    episodes: Episode.to_json() dicts, in the order to show; which: what to call them if they are
    not all; log: the dicts of log.jsonl; table_markdown: text with pipe tables, e.g. report.md;
    config: any flat dict.
    """
    shown = [slim(episode) for episode in episodes]
    strip = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>"
        for label, value in summary(shown, which)
    )
    made = time.strftime("%Y-%m-%d %H:%M")
    table = (
        f'<section id="results">{table_html(table_markdown)}</section>'
        if table_markdown.strip()
        else ""
    )
    page = PAGE.format(
        title=escape(title),
        made=made,
        css=CSS + CURVE_CSS,
        js=JS,
        table=table,
        curves=curves_html(list(log)),
        strip=f'<div class="strip">{strip}</div>' if strip else "",
        config=config_html(config or {}),
        reader=READER if shown else "",
        episodes=embed("episodes", shown),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


# ---------------------------------------------------------------- the page
CURVE_CSS = """
svg{--paper:#fdfcf9;--ink:#23272b;--soft:#70757a;--rule:#e6e2d8}
.paper{fill:var(--paper)}
.curve text{font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.curve .title{font-size:12.5px;font-weight:600;fill:var(--ink)}
.curve .label{font-size:11px;fill:var(--soft)}
.curve .tick{font-size:10px;fill:var(--soft);font-variant-numeric:tabular-nums}
.curve .grid{stroke:var(--rule);stroke-width:1}
.curve .line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.curve .faint{opacity:.25;stroke-width:1}
.c0{stroke:#3a75b0}.c1{stroke:#d9822b}.c2{stroke:#3f9463}.c3{stroke:#c24b45}
.c4{stroke:#7d62ab}.c5{stroke:#2f9aa0}.c6{stroke:#a8743a}.c7{stroke:#b0558c}
.dot.c0{fill:#3a75b0}.dot.c1{fill:#d9822b}.dot.c2{fill:#3f9463}.dot.c3{fill:#c24b45}
.dot.c4{fill:#7d62ab}.dot.c5{fill:#2f9aa0}.dot.c6{fill:#a8743a}.dot.c7{fill:#b0558c}
.dot{stroke:none}
@media (prefers-color-scheme:dark){svg{--paper:#1b1e21;--ink:#e8e5de;--soft:#989da2;--rule:#30353a}}
"""

CSS = """
:root{color-scheme:light dark;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
--page:#f5f3ee;--paper:#fdfcf9;--ink:#23272b;--soft:#6a6f74;--rule:#e2ded3;--hover:#f0ede5;
--accent:#2a6f78;--good:#2f7d50;--bad:#b5433d;--warm:#a86a14;--good-bg:#e5f1e8;--bad-bg:#f8e6e3;--warm-bg:#faf0dc;
--cool-bg:#e6eff3;--code:#f3f1ea}
@media (prefers-color-scheme:dark){:root{--page:#141619;--paper:#1b1e21;--ink:#e4e1da;--soft:#999ea3;--rule:#30353a;
--hover:#23272b;--accent:#79b8c2;--good:#79c096;--bad:#e58a83;--warm:#dcab5c;--good-bg:#1d3326;--bad-bg:#3b2323;
--warm-bg:#352b18;--cool-bg:#1d2d34;--code:#222629}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
header,main>section,main>details,main>.strip{max-width:1440px;margin:0 auto;padding:0 28px}
header{padding-top:34px}
h1{font-size:26px;line-height:1.25;font-weight:650;letter-spacing:-.015em;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:17px;font-weight:650;letter-spacing:-.005em;margin:34px 0 12px}
h3{font-size:15px;font-weight:650;margin:22px 0 8px}
header p,.constants,small{color:var(--soft)}
header p{margin:0 0 18px}
small{font-size:12px;font-weight:400;margin-left:4px}
.strip{display:flex;flex-wrap:wrap;gap:8px 40px;padding-top:6px!important;padding-bottom:8px!important}
.strip b{display:block;font-size:24px;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums;
line-height:1.2}
.strip span{font-size:13px;color:var(--soft)}
.scroll{overflow-x:auto;background:var(--paper);border:1px solid var(--rule);border-radius:10px;width:fit-content;
max-width:100%}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 16px;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:13px;white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
.right{text-align:right}
summary{cursor:pointer;font-weight:600;padding:6px 0}
summary::marker{color:var(--soft)}
code{font-family:var(--mono);font-size:13px}
code{background:var(--code);padding:1px 5px;border-radius:4px}
.config{margin-top:14px!important}
.config dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 22px;margin:6px 0 0;
font-size:13.5px}
.config dt{color:var(--soft)}
.config dd{margin:0;overflow-wrap:anywhere;font-family:var(--mono);font-size:12.5px}
.grid-of-curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:14px;margin:6px 0 14px}
figure{margin:0;background:var(--paper);border:1px solid var(--rule);border-radius:10px;padding:8px 6px 2px}
figure svg{width:100%;height:auto;display:block}
figcaption{font-size:11.5px;line-height:1.35;color:var(--soft);min-height:17px;padding:0 8px 3px;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.constants{font-size:13px}
#episodes-section{padding-bottom:30px!important}
.bar{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin-bottom:12px}
.chip{font:inherit;font-size:13.5px;border:1px solid var(--rule);background:var(--paper);color:var(--ink);
padding:4px 13px;
border-radius:99px;cursor:pointer}
.chip:hover{background:var(--hover)}
.chip[aria-pressed=true]{background:var(--ink);border-color:var(--ink);color:var(--page)}
.chip span{opacity:.6;margin-left:5px;font-variant-numeric:tabular-nums}
select,input[type=search]{font:inherit;font-size:14px;color:var(--ink);background:var(--paper);
border:1px solid var(--rule);
border-radius:8px;padding:5px 10px}
input[type=search]{flex:1 1 220px;min-width:160px}
:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.panes{display:grid;grid-template-columns:minmax(270px,370px) minmax(0,1fr);border:1px solid var(--rule);
border-radius:12px;
overflow:hidden;background:var(--paper);height:calc(100vh - 40px);min-height:480px}
.list{overflow-y:auto;border-right:1px solid var(--rule);overscroll-behavior:contain}
.item{display:block;width:100%;text-align:left;font:inherit;color:inherit;background:none;border:0;
border-bottom:1px solid var(--rule);padding:10px 16px;cursor:pointer;content-visibility:auto;
contain-intrinsic-size:auto 68px}
.item:hover{background:var(--hover)}
.item[aria-current=true]{background:var(--cool-bg);box-shadow:inset 3px 0 var(--accent)}
.item .q{display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;overflow:hidden;font-size:14px;
line-height:1.4;
overflow-wrap:anywhere}
.item .under{display:flex;gap:9px;align-items:center;font-size:12px;color:var(--soft);margin-top:4px}
.item .under>:last-child{margin-left:auto;font-variant-numeric:tabular-nums;white-space:nowrap}
.tag{font-size:12px;font-weight:600;padding:1px 8px;border-radius:99px;background:var(--code);color:var(--soft);
white-space:nowrap}
.tag.right,.tag.fixed{background:var(--good-bg);color:var(--good);text-align:left}
.tag.wrong,.tag.broken,.tag.error,.tag.timeout,.tag.fault{background:var(--bad-bg);color:var(--bad)}
.tag.dropped,.tag.unscored{background:var(--warm-bg);color:var(--warm)}
.reader{overflow-y:auto;padding:26px 34px 60px;overscroll-behavior:contain;scrollbar-gutter:stable}
.reader>*{max-width:860px}
.reader h3.question{font-size:20px;line-height:1.4;font-weight:600;letter-spacing:-.01em;margin:0 0 10px;
white-space:pre-wrap;
overflow-wrap:anywhere;unicode-bidi:plaintext}
.facts{display:flex;flex-wrap:wrap;gap:4px 22px;font-size:13px;color:var(--soft);align-items:baseline}
.facts b{color:var(--ink);font-weight:600;overflow-wrap:anywhere}
.stage{display:flex;flex-wrap:wrap;gap:6px 16px;align-items:baseline;margin:34px 0 12px;padding-bottom:8px;
border-bottom:1px solid var(--rule)}
.stage h4{margin:0;font-size:16px;font-weight:650}
.stage .facts{margin-left:auto}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;overflow-x:clip}
.turn{margin:12px 0;padding-left:16px;border-left:2px solid var(--rule)}
.turn.says{border-color:var(--accent)}
.who{font-size:12px;font-weight:600;color:var(--soft);margin-bottom:2px;display:flex;gap:8px;align-items:baseline}
.thought{color:var(--soft);font-size:14px}
.thought summary,.quiet summary{font-size:13px;font-weight:500;color:var(--soft);padding:2px 0}
.call,.result{background:var(--code);border-radius:8px;padding:9px 13px;margin:7px 0;font-size:13px;line-height:1.5}
.call .text,.result .text,.result summary{font-family:var(--mono);font-size:12.5px}
.call .name{font-weight:650;color:var(--accent);font-family:var(--mono);font-size:13px}
.result summary{font-weight:400;padding:0;overflow-wrap:anywhere}
.result details[open] summary .text{display:none}
.result details[open] summary::after{content:"show less"}
.review{background:var(--warm-bg);border-radius:10px;padding:14px 18px;margin:20px 0}
.review .who{color:var(--warm)}
mark{background:var(--good-bg);color:var(--good);font-weight:600;border-radius:4px;padding:0 3px}
.empty{padding:34px 24px;color:var(--soft)}
@media (max-width:820px){header,main>section,main>details,main>.strip{padding-left:16px;padding-right:16px}
.panes{grid-template-columns:1fr;height:auto}.list{max-height:42vh;border-right:0;border-bottom:1px solid var(--rule)}
.reader{padding:20px 16px 40px}.stage .facts{margin-left:0}}
@media print{.panes{height:auto}.list,.bar{display:none}}
"""

READER = """<section id="episodes-section"><h2>Episodes <small id="count"></small></h2>
<div class="bar"><span id="chips"></span><select id="dataset" aria-label="data set"></select>
<input id="search" type="search" placeholder="Search questions, answers and transcripts" aria-label="search"></div>
<div class="panes"><nav class="list" id="list" aria-label="episodes"></nav>
<article class="reader" id="reader"></article></div>
</section>"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline'">
<title>{title}</title><style>{css}</style></head>
<body><header><h1>{title}</h1><p>Written {made}</p></header>
<main>{strip}{table}{config}{curves}{reader}</main>
{episodes}<script>{js}</script></body></html>
"""

JS = r"""
"use strict";
const read = id => JSON.parse(document.getElementById(id)?.textContent || "[]");
const el = (tag, name, ...children) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return node;
};
const short = value => value === null || value === undefined ? "–"
  : Number.isInteger(value) ? String(value) : value.toFixed(2);

// ---- curves: the values at the pointer's step, under the panel
const panelData = read("panels");
for (const figure of document.querySelectorAll("figure[data-panel]")) {
  const svg = figure.querySelector("svg"), note = figure.querySelector("figcaption");
  const [left, right, x0, x1] = svg.dataset.box.split(",").map(Number);
  const width = svg.viewBox.baseVal.width, lines = panelData[figure.dataset.panel];
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width * width - left) / (width - left - right);
    const x = x0 + Math.min(1, Math.max(0, across)) * (x1 - x0);
    const values = Object.entries(lines).map(([label, points]) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      return [near[0], `${label} ${Number(near[1].toPrecision(4))}`];
    });
    note.textContent = `step ${values[0][0]}: ` + values.map(v => v[1]).join(", ");
  });
  svg.addEventListener("mouseleave", () => { note.textContent = ""; });
}

// ---- episodes: filters, list, reader
const episodes = read("episodes");
const state = { outcome: "all", dataset: "", words: "", shown: [], at: 0 };
const byId = id => document.getElementById(id);

function matches(episode) {
  if (state.outcome !== "all" && !episode.outcomes.includes(state.outcome)) return false;
  if (state.dataset && episode.dataset !== state.dataset) return false;
  if (!state.words) return true;
  const texts = [episode.id, episode.question, ...episode.gold];
  for (const message of episode.messages) texts.push(message.content);
  for (const attempt of episode.attempts) texts.push(attempt.answer, attempt.critique, attempt.think);
  return texts.some(text => text && String(text).toLowerCase().includes(state.words));
}

function listItem(episode, index) {
  const last = episode.attempts.at(-1);
  const item = el("button", "item",
    el("span", "q", episode.question || "(no question)"),
    el("span", "under", ...episode.outcomes.map(name => el("span", "tag " + name, name)),
      el("span", "", episode.dataset), el("span", "", last ? `reward ${short(last.reward ?? last.rule_reward)}` : "")));
  item.onclick = () => open(index);
  return item;
}

function filter() {
  state.shown = episodes.filter(matches);
  const list = byId("list");
  list.replaceChildren(...state.shown.map(listItem));
  list.scrollTop = 0;
  byId("count").textContent = `${state.shown.length} of ${episodes.length}`;
  const linked = state.shown.findIndex(episode => "#" + encodeURIComponent(episode.id) === location.hash);
  if (state.shown.length) return open(Math.max(0, linked));
  list.append(el("div", "empty", "No episode matches these filters."));
  byId("reader").replaceChildren();
}

function open(index) {
  const list = byId("list");
  list.children[state.at]?.removeAttribute("aria-current");
  state.at = index;
  list.children[index].setAttribute("aria-current", "true");
  byId("reader").replaceChildren(...episodeView(state.shown[index]));
  byId("reader").scrollTop = 0;
  history.replaceState(null, "", "#" + encodeURIComponent(state.shown[index].id));
}

function fact(label, value, name) {
  return el("span", "", label + " ", el("b", name || "", String(value)));
}

function episodeView(episode) {
  const head = el("div", "facts", ...episode.outcomes.map(name => el("span", "tag " + name, name)),
    fact("gold", episode.gold.join("  |  ") || "–"), fact("id", episode.id),
    episode.dataset && fact("data set", episode.dataset), fact("policy version", short(episode.policy_version)),
    fact("tokens", `${episode.tokens} (${episode.trained} sampled)`),
    episode.dropped && fact("dropped", episode.dropped));
  const parts = [el("h3", "question text", episode.question), head];
  let at = 0;
  episode.attempts.forEach((attempt, stage) => {
    const [from, to] = attempt.messages || [0, episode.messages.length];
    const given = episode.messages.slice(at, from);
    if (given.length) parts.push(quiet(stage ? "What the agent was given for the second attempt" : "Prompt", given));
    parts.push(stageHead(stage ? "Refined attempt" : "First attempt", attempt));
    parts.push(...turns(episode.messages.slice(from, to), attempt.calls || []));
    if (attempt.critique || attempt.think) parts.push(review(attempt));
    at = to;
  });
  const rest = episode.messages.slice(at);
  if (rest.length) parts.push(...(episode.attempts.length ? [quiet("After the last attempt", rest)] : turns(rest, [])));
  return parts;
}

function quiet(label, messages) {
  return el("details", "quiet turn", el("summary", "", label),
    ...messages.map(({ role, content }) => el("div", "", el("div", "who", role), el("div", "text thought", content))));
}

function stageHead(label, attempt) {
  const verdict = typeof attempt.correct !== "boolean" ? "unscored" : attempt.correct ? "right" : "wrong";
  return el("div", "stage", el("h4", "", label), el("span", "tag " + verdict, verdict),
    el("div", "facts", fact("answer", attempt.answer ?? "none"), fact("rule reward", short(attempt.rule_reward)),
      fact("score", short(attempt.score)), fact("reward", short(attempt.reward)),
      fact("calls", (attempt.calls || []).length), fact("ended", (attempt.termination || "–").replaceAll("_", " "))));
}

function turns(messages, calls) {
  let result = 0;
  return messages.map(message => message.role === "tool" ? toolResult(message.content, calls[result++])
    : message.role === "assistant" ? assistantTurn(message)
    : el("div", "turn", el("div", "who", message.role), el("div", "text", message.content)));
}

function assistantTurn(message) {
  const turn = el("div", "turn says");
  const pattern = /<think>([\s\S]*?)(?:<\/think>|$)|<tool_call>([\s\S]*?)(?:<\/tool_call>|$)/g;
  const text = message.content || "";
  let at = 0;
  for (const match of text.matchAll(pattern)) {
    turn.append(...says(text.slice(at, match.index)));
    turn.append(match[1] !== undefined ? thought(match[1]) : toolCall(match[2]));
    at = match.index + match[0].length;
  }
  turn.append(...says(text.slice(at)));
  for (const call of message.tool_calls || []) turn.append(toolCall(JSON.stringify(call.function || call)));
  if (!turn.childNodes.length) turn.append(el("div", "thought", "(empty turn)"));
  return turn;
}

function says(text) {
  text = text.trim();
  if (!text) return [];
  const box = text.lastIndexOf("\\boxed{");
  if (box < 0) return [el("div", "text", text)];
  let depth = 0, end = box + 6;
  for (; end < text.length; end++) {
    depth += (text[end] === "{") - (text[end] === "}");
    if (!depth) break;
  }
  return [el("div", "text", text.slice(0, box), el("mark", "", text.slice(box, end + 1)), text.slice(end + 1))];
}

function thought(text) {
  text = text.trim();
  if (!text) return "";
  const label = el("summary", "", `Reasoning, ${text.length} characters`);
  const node = el("details", "thought", label, el("div", "text", text));
  node.open = text.length < 1200;
  return node;
}

function toolCall(text) {
  const node = el("div", "call");
  try {
    const call = JSON.parse(text);
    node.append(el("span", "name", call.name));
    const given = typeof call.arguments === "string" ? JSON.parse(call.arguments) : call.arguments || {};
    for (const [key, value] of Object.entries(given)) {
      const shown = typeof value === "string" ? value : JSON.stringify(value);
      node.append(el("div", "text", `${key}: ` + (shown.includes("\n") ? "\n" : "") + shown));
    }
  } catch (error) {
    node.append(el("span", "tag error", "not readable"), el("div", "text", text.trim()));
  }
  return node;
}

function toolResult(text, call) {
  const status = call?.status && call.status !== "ok" ? el("span", "tag " + call.status, call.status) : "";
  const took = call?.seconds;
  const seconds = typeof took !== "number" ? "" : took < 0.01 ? "<0.01 s" : took.toFixed(2) + " s";
  const who = el("div", "who", call ? `${call.name || "call"} returned` : "tool", status, el("span", "", seconds));
  const body = text.length <= 900 ? el("div", "text", text)
    : el("details", "", el("summary", "", el("span", "text", text.slice(0, 420).trim() + " …")),
      el("div", "text", text));
  return el("div", "result", who, body);
}

function review(attempt) {
  const analysis = attempt.think &&
    el("details", "thought", el("summary", "", "The judge's analysis"), el("div", "text", attempt.think));
  return el("div", "review", el("div", "who", `Judge, score ${short(attempt.score)}`),
    el("div", "text", attempt.critique || "(no critique)"), analysis);
}

function buildFilters() {
  const counts = { all: episodes.length };
  for (const episode of episodes) for (const name of episode.outcomes) counts[name] = (counts[name] || 0) + 1;
  const names = ["all", "right", "wrong", "fixed", "broken", "dropped", "unscored"].filter(name => counts[name]);
  const chips = names.map(name => {
    const chip = el("button", "chip", name, el("span", "", String(counts[name])));
    chip.dataset.outcome = name;
    chip.setAttribute("aria-pressed", String(name === "all"));
    chip.onclick = () => {
      state.outcome = name;
      for (const other of chips) other.setAttribute("aria-pressed", String(other === chip));
      filter();
    };
    return chip;
  });
  byId("chips").replaceChildren(...chips);
  byId("chips").style.cssText = "display:flex;flex-wrap:wrap;gap:6px";
  const sets = [...new Set(episodes.map(episode => episode.dataset))].filter(Boolean).sort();
  const select = byId("dataset");
  select.replaceChildren(...[["", "all data sets"], ...sets.map(name => [name, name])].map(([value, label]) => {
    const option = el("option", "", label);
    option.value = value;
    return option;
  }));
  select.hidden = sets.length < 2;
  select.onchange = () => { state.dataset = select.value; filter(); };
  let timer;
  byId("search").oninput = event => {
    clearTimeout(timer);
    timer = setTimeout(() => { state.words = event.target.value.trim().toLowerCase(); filter(); }, 120);
  };
  document.addEventListener("keydown", event => {
    if (event.target.matches("input,select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { j: 1, k: -1 }[event.key];
    if (step && state.shown[state.at + step]) {
      open(state.at + step);
      byId("list").children[state.at].scrollIntoView({ block: "nearest" });
    }
  });
}

if (episodes.length) {
  const linked = location.hash.length > 1;
  buildFilters();
  filter();
  if (linked) byId("episodes-section").scrollIntoView();
}
"""


# ---------------------------------------------------------------- a run folder's page, made again
def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file, [] where there is none; a last line cut short by a kill is left
    out.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(
                f"{path}: line {len(rows) + 1} is cut short, reading stops there", file=sys.stderr
            )
            break
    return rows


def newest_episodes(run: Path) -> list[dict]:
    """The last LIVE_EPISODES of a run, in their order."""
    episodes: list[dict] = []
    for path in sorted((run / "episodes").glob("*.jsonl"), reverse=True):
        episodes = read_jsonl(path) + episodes
        if len(episodes) >= LIVE_EPISODES:
            break
    return episodes[-LIVE_EPISODES:]


def write_run_page(folder: str) -> None:
    """Makes report.html and curve.svg of a run's folder from what lies in it."""
    run = Path(folder)
    log, facts, episodes = read_jsonl(run / "log.jsonl"), {}, newest_episodes(run)
    if not log and not episodes:
        raise SystemExit(
            f"{run}: neither log.jsonl nor episodes/*.jsonl there; give the folder of a run"
        )
    if (run / "run.json").is_file():
        facts = json.loads((run / "run.json").read_text())
    table = (run / "report.md").read_text(encoding="utf-8") if (run / "report.md").is_file() else ""
    write_report(
        run / "report.html",
        title=str(run),
        episodes=episodes,
        which="newest episodes",
        log=log,
        table_markdown=table,
        config=facts.get("config", {}),
    )
    print(f"wrote {run / 'report.html'}")
    found, _ = panels(numeric_series(log))
    chosen = [panel for panel in found if panel[0] == "Learning"][:6] or found[:6]
    if chosen:
        (run / "curve.svg").write_text(figure_svg(chosen), encoding="utf-8")
        print(f"wrote {run / 'curve.svg'}")
