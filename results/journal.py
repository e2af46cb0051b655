"""The journal of an evaluation: finished chains, faults, verdicts; and results.jsonl of it."""

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from reagent.folder import claim, read_json, write_whole, writing
from reagent.rows import drop_cut_line

# ------------------------------------------- encrypted rows: their texts lie on no disk in the open

SEALED = ("question", "gold", "messages", "attempts")  # of a record of an encrypted row


def _xor(data: bytes, key: str) -> bytes:
    return bytes(a ^ b for a, b in zip(data, cycle(key.encode())))


def sealed(text: str, canary: str) -> str:
    """As xbench publishes its texts: UTF-8, XOR with the canary repeated, base64."""
    return base64.b64encode(_xor(text.encode("utf-8", "replace"), canary)).decode()


def unsealed(text: str, canary: str) -> str:
    return _xor(base64.b64decode(text, validate=True), canary).decode()


def opened(line: dict) -> dict:
    """A record with its encrypted texts in memory."""
    return line | json.loads(unsealed(line["sealed"], line["canary"])) if "sealed" in line else line


def closed(line: dict, canary: str) -> dict:
    """A record with its texts encrypted."""
    texts = json.dumps({name: line[name] for name in SEALED})
    kept = {name: value for name, value in line.items() if name not in SEALED}
    return kept | {"sealed": sealed(texts, canary), "canary": canary}


# --------------------------------------- the journal: append-only, one writer, safe against kill -9


@dataclass
class Entry:
    """What statistics need of a finished chain, lists by attempt; its record is at `offset`."""

    path: str
    offset: int
    digest: str
    status: str  # answered | no_answer | prompt_too_long
    answers: list[str | None]
    correct: list[bool | None]  # None: a judge must say
    f1: list[float | None]
    ended: list[str]
    calls: int
    tokens: int
    pace: float | None = None  # seconds a chain of the run so far, all ranks together


def entry_of(line: dict, path: str, offset: int) -> Entry:
    attempts = line["attempts"]
    names = dict(answers="answer", correct="correct", ended="termination")
    lists = {name: [attempt[key] for attempt in attempts] for name, key in names.items()}
    lists["f1"] = [attempt.get("f1") for attempt in attempts]
    calls = sum(len(a["calls"]) for a in attempts)
    same = dict(status=line["status"], tokens=line["tokens"], pace=line.get("pace"), calls=calls)
    return Entry(path, offset, line["row"], **lists, **same)


class Journal:
    """OUT/journal-<rank>.jsonl of all ranks, and the right to write this rank's. A line is a record
    of a finished chain, a {"fault"} of the infrastructure that ended it, or a {"verdict"} of a
    judge; one without its end is none. One that only `reads` writes nothing and takes no lock."""

    def __init__(self, folder: str, rank: int = 0, reads: bool = False):
        self.folder, self.path = Path(folder), Path(folder) / f"journal-{rank}.jsonl"
        self.lock = claim(folder, rank, reads)
        self.entries: dict[tuple, Entry] = {}
        self.faults: dict[tuple, str] = {}
        self.verdicts: dict[tuple, list] = {}  # (*key, attempt, about(...)) -> [(judge, correct)]
        if not reads:
            drop_cut_line(self.path)
        self.file = None if reads else open(self.path, "ab", buffering=0)
        if self.path.is_file():
            self._read(self.path)
        self.read_other_ranks()

    def read_other_ranks(self) -> None:
        """What the others have written by now; to read a line twice changes nothing."""
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            if path != self.path:
                self._read(path)

    def _read(self, path: Path) -> None:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    try:
                        self._take(json.loads(line), str(path), offset)
                    except (ValueError, KeyError, TypeError) as error:
                        what = f"not a line of a journal ({error!r})"
                        raise SystemExit(f"{path}:{number}: {what}") from error
                offset += len(line)

    def _take(self, line: dict, path: str, offset: int) -> None:
        key = (line["dataset"], line["id"], line["rollout"])
        if "verdict" in line:
            said = (line["judge"], line["verdict"])
            self.verdicts.setdefault((*key, line["attempt"], line["about"]), []).append(said)
        elif "fault" in line:
            self.faults[key] = line["fault"]
        else:
            self.entries[key] = entry_of(opened(line), path, offset)
            self.faults.pop(key, None)

    def append(self, line: dict) -> None:
        """One write a line; after a torn one, dropped at the next start, none comes: SystemExit."""
        data = json.dumps(line).encode() + b"\n"
        offset = self.file.seek(0, os.SEEK_END)
        with writing(self.path):
            while data:
                data = data[self.file.write(data) :]
        self._take(line, str(self.path), offset)

    def record(self, key: tuple) -> dict:
        entry = self.entries[key]
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            return json.loads(file.readline())

    def done(self, key: tuple, row: dict) -> bool:
        """Whether the chain is finished, and of this version of the row."""
        return key in self.entries and self.entries[key].digest == row["digest"]

    def said(self, key: tuple, attempt: int, judge: str) -> tuple[str, bool | None]:
        """(who judged, what was said), where no judge is named of the last one; ("none", None):
        unscored."""
        said = self.verdicts.get((*key, attempt, about(self.entries[key], attempt)), [])
        return next((one for one in reversed(said) if judge in ("", one[0])), ("none", None))

    def close(self) -> None:
        for held in filter(None, (self.file, self.lock)):
            held.close()


def named(key: tuple) -> dict:
    return dict(zip(("dataset", "id", "rollout"), key))


def about(entry: Entry, attempt: int) -> str:
    """What a verdict is about: the row and the answer."""
    whole = json.dumps([entry.digest, entry.answers[attempt]])
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


# ---------------------------------------------------------------- files and tables


def final_line(journal: Journal, key: tuple, row: dict, judge: str) -> dict | None:
    """A row of results.jsonl: verdicts filled in, timings left out. None: the chain is missing."""
    if not journal.done(key, row):
        name = named(key) | {"row": row["digest"], "status": "fault", "correct": None}
        return name | {"fault": journal.faults[key]} if key in journal.faults else None
    entry, line = journal.entries[key], opened(journal.record(key))
    line.pop("pace", None)
    for i, attempt in enumerate(line["attempts"]):
        if entry.correct[i] is None:
            line["judge"], attempt["correct"] = journal.said(key, i, judge)
        for call in attempt["calls"]:
            call.pop("seconds", None)
    line["correct"] = line["attempts"][-1]["correct"] if line["attempts"] else False
    return closed(line, line["canary"]) if "sealed" in line else line


def check_served(path: Path, served: dict[str, str]) -> None:
    """A server may move, but what it serves may not change in mid-run: the answers of two models
    would stand under the name of one."""
    before = read_json(path, "config").get("served", {}) if path.is_file() else {}
    changed = [key for key in served if before.get(key, served[key]) != served[key]]
    if changed:
        what = ", ".join(f"{key}: {before[key]} -> {served[key]}" for key in changed)
        told = f"holds answers of other models ({what}): give another --out_dir"
        raise SystemExit(f"{path.parent} {told}")


def write_results(out: Path, tasks: list, journal: Journal, judge: str) -> None:
    """results.jsonl in the order of the data: the same bytes however often the run was killed."""
    lines = (final_line(journal, key, row, judge) for task in tasks for key, row in task.keys())
    write_whole(out / "results.jsonl", (json.dumps(line) + "\n" for line in lines if line))
