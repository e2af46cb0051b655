"""Curves as SVG, one panel or several as a picture: every plot of this repository."""

import html
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from toolkit.text import COMBINING, CONTROLS, STACKED

WIDTH, HEIGHT = 300, 190  # of a panel, in pixels
PICTURE = 800  # pixels: as wide as a README shows a picture, so that its type keeps its size
NOISY = 40  # lines of more points are drawn faintly, and their running mean in full
FEW = 12  # lines of fewer points show each of them
COLOURS = dict(first=0, refined=1, right=2, wrong=3)  # the same in every panel
CSS = Path(__file__).with_name("plots.css")
MARKED = re.compile(f"[{CONTROLS}\r\u200e\u200f\u2028\u2029\ufeff]|{STACKED}")


@dataclass
class Line:
    """Points (x, y) by rising x; `spread` (x, low, high) is a band behind them."""

    points: list[tuple[float, float]]
    spread: list[tuple[float, float, float]] = field(default_factory=list)
    expected: bool = False  # what theory says: dashed, without points


@dataclass
class Panel:
    """One plot: {label: line}. A range of None is that of the lines themselves."""

    title: str
    lines: dict[str, Line]
    section: str = ""
    x_label: str = "step"
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_marks: dict[float, str] | None = None  # {where: label}; None: the ends of the axis
    y_marks: dict[float, str] | None = None  # None: round numbers

    def xs(self) -> list[float]:
        return [x for line in self.lines.values() for x, _ in line.points]

    def ys(self) -> list[float]:
        ends = [y for line in self.lines.values() for _, *low_high in line.spread for y in low_high]
        return ends + [y for line in self.lines.values() for _, y in line.points]


def share_axes(panels: list[Panel]) -> None:
    """Gives panels the same ranges, so that they can be compared by eye."""
    xs = [x for panel in panels for x in panel.xs()]
    ys = [y for panel in panels for y in panel.ys()]
    for panel in panels:
        panel.x_range, panel.y_range = (min(xs), max(xs)), (min(ys), max(ys))


# --------------------------------------------------------------------------------------------------
# numbers


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers that cover [low, high], at most `most` + 1 of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A short label: 0.25, 12k, 3.1M, 2e-5."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{suffix}"
    return f"{value:.2g}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def thin(points: list, most: int = 300) -> list:
    """At most `most` + 1 points, the last one kept: no screen shows more."""
    stride = max(1, math.ceil(len(points) / most))
    kept = points[::stride]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


# --------------------------------------------------------------------------------------------------
# drawing


@dataclass
class Scale:
    """Values between the first and the last of `marks` -> pixels from `start` to `end`."""

    marks: dict[float, str]
    start: float
    end: float

    def __call__(self, value: float) -> float:
        low, high = min(self.marks), max(self.marks)
        return round(self.start + (value - low) / ((high - low) or 1) * (self.end - self.start), 1)


def visible(text: str) -> str:
    """Any text for somebody who must see what is there: what `clean` takes out is escaped."""
    text = text.replace("\r\n", "\n").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    stacked = re.compile(f"[{COMBINING}]")
    return MARKED.sub(lambda m: "" if stacked.match(m[0]) else ascii(m[0])[1:-1], text)


def escape(text) -> str:
    return html.escape(visible(str(text)))


def label_svg(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def scales(panel: Panel, top: int, width: int, height: int) -> tuple[Scale, Scale]:
    """The panel's two axes below a head of `top` pixels; labels of the y axis get their room."""
    low, high = panel.y_range or (min(panel.ys()), max(panel.ys()))
    across = panel.x_range or (min(panel.xs()), max(panel.xs()))
    rounded = ticks(0.0 if 0 <= low < 0.6 * high else low, high)
    marks = panel.y_marks or {mark: number(mark) for mark in rounded}
    left = 14 + round(6.3 * max(map(len, marks.values())))
    x = Scale(panel.x_marks or {end: number(end) for end in across}, left, width - 14)
    return x, Scale(marks, height - 26, top)


def colours(lines: dict[str, Line]) -> dict[str, str]:
    """{label: class}, those of COLOURS before the others."""
    found = {label: f"c{place}" for label, place in COLOURS.items() if label in lines}
    others = [label for label in lines if label not in found]
    for i, label in enumerate(others, len(COLOURS) if found else 0):
        found[label] = "expected" if lines[label].expected else f"c{i % 8}"
    return found


def panel_svg(panel: Panel, width: int = WIDTH, height: int = HEIGHT) -> str:
    """One panel as an SVG element; its colours stand in plots.css."""
    classes = colours(panel.lines)
    told = len(classes) == 1 and panel.title.endswith(*classes)  # the title names its one line
    legend, top = legend_svg({} if told else classes, width)
    x, y = scales(panel, top, width, height)
    title, ends, most = panel.title, (min(x.marks), max(x.marks)), width // 7  # characters
    shown = title if len(title) <= most else title[: most - 1] + "…"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}" '
        f'data-box="{x.start},{x.end},{ends[0]},{ends[1]}">'
        f'<text class="title" x="8" y="16">{escape(shown)}</text>{legend}'
    ]
    for mark, label in y.marks.items():
        parts.append(f'<path class="grid" d="M{x.start} {y(mark)}H{x.end}"/>')
        parts.append(label_svg(x.start - 6, y(mark) + 3.5, label, "end"))
    for mark, label in x.marks.items():
        anchor = "middle" if panel.x_marks else "start" if mark == ends[0] else "end"
        parts.append(label_svg(x(mark), height - 9, label, anchor))
    if not panel.x_marks:
        parts.append(label_svg((x.start + x.end) / 2, height - 9, panel.x_label, "middle"))
    parts += [line_svg(line, classes[label], x, y) for label, line in panel.lines.items()]
    return "".join(parts) + "</svg>"


def legend_svg(classes: dict[str, str], width: int) -> tuple[str, int]:
    """(the labels with their colours, in as many rows as they need; where the plot begins)."""
    parts, left, row = [], 8.0, 32
    for label, colour in classes.items():
        wide = 24 + 6.1 * len(label)
        if left > 8 and left + wide > width:
            left, row = 8.0, row + 15
        parts.append(f'<circle class="dot {colour}" cx="{left + 4}" cy="{row - 4}" r="3.5"/>')
        parts.append(label_svg(left + 11, row, label))
        left += wide
    return "".join(parts), row + 14


def line_svg(line: Line, colour: str, x: Scale, y: Scale) -> str:
    """One line: its band, its points where they are few, its running mean where they are many."""

    def path(points) -> str:
        return " ".join(f"{x(a)},{y(b)}" for a, b in thin(list(points)))

    parts = []
    if line.spread:
        low = [(at, low) for at, low, _ in line.spread]
        high = [(at, high) for at, _, high in reversed(line.spread)]
        parts.append(f'<polygon class="band {colour}" points="{path(low)} {path(high)}"/>')
    noisy = len(line.points) > NOISY and not line.spread
    faint = " faint" if noisy else ""
    parts.append(f'<polyline class="line{faint} {colour}" points="{path(line.points)}"/>')
    if noisy:  # a centred running mean over about a tenth of the points
        half, (xs, ys) = len(line.points) // 20, zip(*line.points)
        smooth = [mean(ys[max(0, i - half) : i + half + 1]) for i in range(len(ys))]
        parts.append(f'<polyline class="line {colour}" points="{path(zip(xs, smooth))}"/>')
    if len(line.points) <= FEW and not line.expected:
        dots = [(x(a), y(b)) for a, b in line.points]
        parts += [f'<circle class="dot {colour}" cx="{a}" cy="{b}" r="2.8"/>' for a, b in dots]
    return "".join(parts)


def picture_svg(panels: list[Panel], columns: int = 3, height: int = HEIGHT) -> str:
    """Panels as one file, PICTURE pixels wide; it follows the reader's light or dark scheme."""
    gap = 12
    columns = min(columns, len(panels))
    wide = (PICTURE - gap) // columns - gap
    cells = []
    for i, panel in enumerate(panels):
        x, y = gap + i % columns * (wide + gap), gap + i // columns * (height + gap)
        drawn = panel_svg(panel, wide, height)
        cells.append(drawn.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1))
    tall = math.ceil(len(panels) / columns) * (height + gap) + gap
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {PICTURE} {tall}" '
        f'width="{PICTURE}" height="{tall}"><style>{CSS.read_text()}</style>'
        f'<rect class="paper" width="100%" height="100%" rx="8"/>{"".join(cells)}</svg>\n'
    )
