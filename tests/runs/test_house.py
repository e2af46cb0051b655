"""The house itself: six doors at the root, arrows one way, sizes, and a README that is true."""

import ast
import dataclasses
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.tiny import ROOT

DOORS = ("sft", "train_rrm", "grpo_unified", "rollout", "tools", "evaluate")
TRAINERS = ("sft", "train_rrm", "grpo_unified")
ROOMS = ("results", "reagent", "toolkit")  # an arrow goes to the right only
README = (ROOT / "README.md").read_text()
MODULES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
SCRIPTS = [ROOT / f"{door}.py" for door in DOORS]


def lines(path: Path) -> int:
    return path.read_text().count("\n")


def imported(path: Path) -> set[str]:
    """The first words of all that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_the_root_has_six_doors_and_no_other_script():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(DOORS)


def test_no_file_is_too_long_to_read():
    assert max(map(lines, SCRIPTS)) < 800 and sum(map(lines, SCRIPTS)) < 3400
    assert max(map(lines, MODULES)) <= 650
    assert sum(map(lines, SCRIPTS + MODULES)) <= 11_000


@pytest.mark.parametrize("door", ["sft", "train_rrm", "grpo_unified", "evaluate"])
def test_a_config_can_be_read_at_one_sitting(door):
    cfg = importlib.import_module(door).Config()
    values = [getattr(cfg, field.name) for field in dataclasses.fields(cfg)]
    assert len(values) <= 45
    for nested in filter(dataclasses.is_dataclass, values):
        assert len(dataclasses.fields(nested)) <= 12, type(nested)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_arrows_go_one_way(path):
    above = ROOMS[: ROOMS.index(path.parent.name)]
    assert not imported(path) & {*above, *DOORS, "tests", "data"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_door_imports_a_trainer(path):
    assert not imported(path) & set(TRAINERS)


def test_modules_of_a_room_have_no_circle():
    edges = {}
    for path in MODULES:
        text, room = path.read_text(), path.parent.name
        found = re.findall(rf"^from {room}\.(\w+) import|^from {room} import (\w+)", text, re.M)
        edges[path.stem] = {name for pair in found for name in pair if name}
    while edges:
        leaves = [name for name, needs in edges.items() if not needs & set(edges)]
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: needs for name, needs in edges.items() if name not in leaves}


def test_the_toy_lives_in_its_own_rooms():
    for path in SCRIPTS + MODULES:
        assert not re.search(r"\btoy\b(?!/)", path.read_text()), path


def test_the_readme_is_short_and_narrow():
    assert README.count("\n") <= 140
    for line in README.splitlines():
        if line.startswith("|"):
            cells = line.strip("|").split("|")
            assert len(cells) <= 5 and max(map(len, cells)) <= 130, line


def test_every_path_that_the_readme_names_exists():
    named = set(re.findall(r"[\w./-]+\.(?:py|md|svg|png|txt|sh|html)\b", README))
    kept = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout
    for name in named - {"preset.py", "report.html", "FILE.py"}:
        if not name.startswith(("out/", "path/", "//")):
            assert any(line.endswith(name) for line in kept.splitlines()), name


def test_make_knows_every_target_that_the_readme_names():
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert targets and targets <= rules


def test_line_counts_of_the_file_map_are_true():
    for name, count in re.findall(r"\| `([\w/]+\.py)` \| (\d+) \|", README):
        assert abs(lines(ROOT / name) - int(count)) <= 25, name
