"""Rows in, tokens out: the config parser, JSONL files, and the append-only renderer of
conversations. No torch at import.
"""

import hashlib
import json
import os
import random
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

# --------------------------------------------------------------------------------------------------
# JSONL


_decode = json.JSONDecoder().decode  # json.loads guesses the encoding first, which takes as long


class JsonlRows:
    """A JSONL file by byte offsets: every line is checked at opening, none is kept; `rows[i]` reads
    one.

    `check(row)` returns an error text or None. Errors name file and line; two rows with one id are
    an error.
    """

    def __init__(
        self, path: str, check: Callable[[dict], str | None] | None = None, hint: str = ""
    ):
        self.path, self.offsets = str(path), array("q")
        if not Path(path).is_file():
            raise SystemExit(f"no file {path}" + (f": {hint}" if hint else ""))
        keys, offset = array("q"), 0  # of the ids: 8 bytes, however long they are
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    row = self._parse(line, number)
                    problem = check(row) if check else None
                    if problem:
                        raise ValueError(f"{path}:{number}: {problem}")
                    keys.append(hash(repr(row["id"]) if "id" in row else (number,)))
                    self.offsets.append(offset)
                offset += len(line)
        if not self.offsets:
            raise SystemExit(f"{path} is empty" + (f": {hint}" if hint else ""))
        self._check_unique(keys)

    def _parse(self, line: bytes, number: int) -> dict:
        try:
            row = _decode(str(line, "utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}:{number}: not a JSON line ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.path}:{number}: a row is a JSON object, not {type(row).__name__}"
            )
        return row

    def _check_unique(self, keys: array) -> None:
        import numpy as np

        keys = np.frombuffer(keys, np.int64)
        firsts = np.unique(keys, return_index=True)[1]
        if len(firsts) < len(keys):
            again = int(np.setdiff1d(np.arange(len(keys)), firsts)[0])
            first = int(np.flatnonzero(keys == keys[again])[0])
            where = f"{self.path}:{self._line(again)}: id {self[again]['id']!r}"
            raise ValueError(f"{where} stands in line {self._line(first)} too")

    def _line(self, i: int) -> int:
        with open(self.path, "rb") as file:
            ends = (file.tell() for _ in iter(file.readline, b""))
            return next(number for number, end in enumerate(ends, 1) if end > self.offsets[i])

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return json.loads(file.readline())


def read_appended(path: str | Path) -> list[dict]:
    """The rows of a file that only grows; [] if there is none. A last line that a kill cut short is
    cut off.
    """
    drop_cut_line(Path(path))
    return list(whole_rows(path))


def whole_rows(path: str | Path) -> Iterator[dict]:
    """The rows of a file that may be growing at this moment, none if there is none; a last line
    without its end is left out.
    """
    if Path(path).is_file():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}:{number}: not a JSON line ({error})") from error


def drop_cut_line(path: Path) -> None:
    """Cuts off the last line of a file that only grows, if a kill left it without its end."""
    if path.is_file():
        with open(path, "rb+") as file:
            at = end = file.seek(0, os.SEEK_END)
            while at > 0:  # back to the last line end
                start = max(0, at - (1 << 16))
                file.seek(start)
                found = file.read(at - start).rfind(b"\n")
                if found >= 0:
                    at = start + found + 1
                    break
                at = start
            if at < end:
                file.truncate(at)


def batch_indices(step: int, batch: int, n: int, seed: int) -> list[int]:
    """Rows of a step: the stream of seeded permutations of n rows, cut in batches. No state, so
    resume is exact.

    A batch at the seam of two epochs (or larger than n) takes rows from both, so it can hold a row
    twice.
    """
    picked: list[int] = []
    at = step * batch
    while len(picked) < batch:
        epoch, start = divmod(at + len(picked), n)
        picked += _permutation(n, seed, epoch)[start : start + batch - len(picked)]
    return picked


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> array:
    order = array("q", range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def check_rl_row(row: dict) -> str | None:
    """RL row: {"id", "question", "answer", "kind", "docs"?, "files"?} (README, records)."""
    for key in ("id", "question", "answer"):
        value = row.get(key)
        if value is None or value == "" or value == []:
            return f"an RL row needs {key!r}; found the keys {sorted(row)}"
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not _texts(row["question"], *answers) or not all(map(str.strip, answers)):
        return "'question' is a text, 'answer' a text or a list of texts"
    if row.get("kind") not in ("math", "qa", "gaia", "choice"):
        return f"'kind' is {row.get('kind')!r}: math, qa, gaia or choice"
    docs = row.get("docs", [])
    if not isinstance(docs, list) or not all(
        isinstance(d, dict) and _texts(d.get("title"), d.get("text")) for d in docs
    ):
        return "'docs' is a list of {'title', 'text'}"
    files = row.get("files", [])
    if not isinstance(files, list) or not _texts(*files):
        return "'files' is a list of paths"
    return None


def _texts(*values) -> bool:
    return set(map(type, values)) <= {str}


def seed_of(*parts) -> int:
    """A seed below 2^62 from (run seed, step, sibling, task, stage, turn, role, retry): all
    different, repeatable.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def shown_question(row: dict) -> str:
    """The question as the agent reads it, with the names of its files."""
    return row["question"] + "".join(f"\nFile: {name}" for name in row.get("files", []))
