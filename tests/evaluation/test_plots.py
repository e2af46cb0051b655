"""The plots: well formed, inside their panels, on axes that can be compared."""

import xml.etree.ElementTree as ElementTree

import pytest

from data.report.curves import mean_line
from data.report.plots import (
    FEW,
    NOISY,
    PICTURE,
    Line,
    Panel,
    number,
    panel_svg,
    picture_svg,
    share_axes,
    thin,
    ticks,
)

STRAIGHT = [
    [(1, 0.0)],
    [(1, 0.0), (2, 0.0)],
    [(i, i * 1e9) for i in range(999)],
    [(0, -1e-9), (1, -2e-9)],
]


def marks(drawn, name):
    """The elements of a class, in the order they are drawn."""
    root = ElementTree.fromstring(drawn)
    return [node for node in root.iter() if name in node.get("class", "").split()]


def points_of(node):
    return [tuple(map(float, pair.split(","))) for pair in node.get("points").split()]


@pytest.mark.parametrize("points", STRAIGHT)
def test_a_curve_is_well_formed_and_stays_inside_its_panel(points):
    spread = [(x, y, y) for x, y in points]
    drawn = panel_svg(Panel("<t>&", {"<a>&": Line(points), "b": Line(points, spread)}))
    pairs = [
        pair for name in ("line", "band") for node in marks(drawn, name) for pair in points_of(node)
    ]
    pairs += [(float(n.get("cx")), float(n.get("cy"))) for n in marks(drawn, "dot")[2:]]
    assert pairs and all(20 <= x <= 286 and 46 <= y <= 164 for x, y in pairs)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.1, 0.93), (-3e-7, 5e-7), (12, 12), (0, 0), (1e6, 9.3e6)]
)
def test_ticks_cover_the_values_with_few_round_marks(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 6


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.25, "0.25"), (12_000, "12k"), (3.1e6, "3.1M"), (2e-5, "2e-5"), (-2e9, "-2G")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize("count, lines, dots", [(3, 1, 3), (FEW + 1, 1, 0), (NOISY + 1, 2, 0)])
def test_few_points_are_points_and_many_have_their_running_mean(count, lines, dots):
    drawn = panel_svg(Panel("loss", {"loss": Line([(i, i % 3) for i in range(count)])}))
    assert (len(marks(drawn, "line")), len(marks(drawn, "dot"))) == (lines, dots)
    assert len(marks(drawn, "faint")) == lines - 1


@pytest.mark.parametrize("count", [0, 1, 299, 300, 301, 599, 600, 601, 4000])
def test_a_long_line_is_thinned_evenly_and_keeps_its_ends(count):
    points = [(i, -i) for i in range(count)]
    kept = thin(points)
    assert len(kept) <= 301 and kept == sorted(set(kept) & set(points))
    assert kept[:1] + kept[-1:] == points[:1] + points[-1:]
    apart = [b[0] - a[0] for a, b in zip(kept, kept[1:])]
    assert len(set(apart[:-1])) <= 1 and max(apart, default=0) <= -(-count // 300)


def test_panels_that_share_their_axes_put_the_same_value_at_the_same_place():
    panels = [Panel("a", {"": Line([(1, 0.2), (4, 0.9)])}), Panel("b", {"": Line([(1, 0.2)])})]
    share_axes(panels)
    a, b = (points_of(marks(panel_svg(panel), "line")[0]) for panel in panels)
    assert a[0] == b[0]


def test_the_mean_over_seeds_stands_between_the_lowest_and_the_highest():
    line = mean_line([[(1, 0.0), (2, 1.0), (3, 1.0)], [(1, 1.0), (2, 2.0)]], per=16)
    assert line.points == [(16, 0.5), (32, 1.5)]
    assert line.spread == [(16, 0.0, 1.0), (32, 1.0, 2.0)]
    assert mean_line([[(1, 0.0)]]).spread == []


def test_marks_that_are_given_are_drawn_with_their_labels():
    given = dict(x_marks={0: "one", 1: "ten"}, y_marks={-1: "low", 2: "high"})
    drawn = panel_svg(Panel("t", {"": Line([(0, 0.0), (1, 1.0)])}, **given))
    assert all(f">{label}</text>" in drawn for label in ("one", "ten", "low", "high"))
    assert ">step<" not in drawn


def test_a_picture_is_as_wide_as_a_readme_and_its_labels_stay_inside_their_panels():
    lines = {f"a rather long label {i}": Line([(0, i), (1, i)]) for i in range(6)}
    panels = [Panel("a title that is far too long for the panel that it stands over", lines)] * 5
    root = ElementTree.fromstring(picture_svg(panels))
    assert root.get("width") == str(PICTURE)
    cells = [node for node in root if node.tag.endswith("svg")]
    assert len(cells) == 5
    for cell in cells:
        wide = float(cell.get("width"))
        assert float(cell.get("x")) + wide <= PICTURE
        for text in (node for node in cell.iter() if node.tag.endswith("text")):
            if text.get("text-anchor", "start") == "start":
                assert float(text.get("x")) + 5.2 * len(text.text) <= wide, text.text
