"""Files that a run may be writing at this moment: its log, its episodes, judgments so far."""

import json
from collections.abc import Iterator
from pathlib import Path


def whole_rows(path: str | Path) -> Iterator[dict]:
    """The rows of a file that may be growing, none without it; a line without its end is none."""
    if not Path(path).is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.endswith(b"\n"):
                    yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a JSON line ({error})") from error
