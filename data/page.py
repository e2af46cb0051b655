"""The page of a run or an evaluation, or an index over the runs in a folder.

    python evaluate.py page RUN_FOLDER  # RUN_FOLDER/report.html and curve.svg
    python evaluate.py page FOLDER      # FOLDER/index.html and curves.svg over the runs below it

A run calls it at its end (results/page.py). data/report/ has the curves, the pages, the script.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.report.index import write_index
from data.report.run import write_run_page


def is_run(folder: Path) -> bool:
    files = ("log.jsonl", "results.jsonl", "episodes")
    return any((folder / name).exists() for name in files)


def write_folder_page(folder: Path) -> str:
    """Writes the page of a run or an evaluation, or the index over those below; returns its tables
    and where it lies."""
    if is_run(folder):
        return f"{write_run_page(folder)}wrote {folder / 'report.html'}"
    below = {of.parent for name in ("log.jsonl", "results.jsonl") for of in folder.rglob(name)}
    if not below:
        raise SystemExit(
            f"{folder}: no log.jsonl, results.jsonl or episodes/ there or below: "
            "give the folder of a run, or one that holds runs"
        )
    write_index(folder, sorted(below))
    return f"wrote {folder / 'index.html'}"


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit(__doc__)
    try:
        print(write_folder_page(Path(argv[0])))
    except ValueError as error:  # names file and line
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
