"""Files of rows for the tests of data/*/prepare.py, and the rows that a prepare script wrote."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepared(script, out, path, *arguments):
    """The rows that a prepare.main wrote for one input file; `out` is its file, or its folder."""
    script.main([f"--input={path}", f"--out={out}", *arguments])
    return read(out if out.suffix else next(out.glob("*.jsonl")))
