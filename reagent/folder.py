"""The folder of a run: one run at a time, files that are whole or not there, digests beside shards.

No torch at import. Whatever is wrong with a folder is told in a sentence, as SystemExit.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import sqlite3
import sys
import time
import urllib.request
from collections.abc import Iterable
from functools import cache
from pathlib import Path


@contextlib.contextmanager
def writing(what: str | Path):
    """SystemExit where what is done here fails: a full disk, one that is read-only or damaged."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise SystemExit(f"{what} cannot be written: {why}") from error


def claim(folder: str | Path, rank: int = 0, reads: bool = False):
    """Makes the folder of a run and locks it for this process: keep what is returned until its end.
    Each `rank` has a lock, which says who holds it; `reads` only tells what claim would refuse."""
    path = Path(folder) / f"lock-{rank}"
    there = next(parent for parent in path.parents if parent.exists())
    with writing(f"out_dir {folder}"):
        if not os.access(there, os.W_OK) or not there.is_dir():
            raise OSError(f"{there} is no folder of yours")
        if reads and not path.exists():
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "r" if reads else "a+", errors="replace")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if reads else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            told = f"{folder} is being written by {file.read().strip() or 'another run'}"
            raise SystemExit(f"{told}: give another --out_dir") from error
        except OSError as error:  # some network file systems
            told = f"{folder} cannot be locked ({error.strerror}): one run at a time"
            print(told, file=sys.stderr)
        if reads:
            return file.close()
        file.truncate(0)
        told = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}"
        print(told, file=file, flush=True)
        return file


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Writes a file beside its name and renames it: a kill or a full disk leaves the old one."""
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        with open(part, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object with `keys`, of a file that decides how a run goes on."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in found]
        problem = f"it lacks {', '.join(missing)}" if missing else ""
    except (OSError, ValueError, TypeError, RecursionError) as error:
        empty = path.is_file() and not path.stat().st_size
        problem = "it is empty" if empty else f"{type(error).__name__}: {error}"
    if problem or not isinstance(found, dict):
        problem = problem or f"it holds a {type(found).__name__}"
        raise SystemExit(f"{path} cannot be read ({problem}): restore it, or take another folder")
    return found


def refuse_code(folder: str | Path) -> None:
    """SystemExit for a model folder that brings Python of its own: it is never run."""
    for path in sorted(Path(folder).glob("*config.json")):
        if "auto_map" in read_json(path):
            cure = "take a model that transformers knows, or remove that key if it does"
            told = f"{path} names code of its own (auto_map), which is never run"
            raise SystemExit(f"{told}: {cure}")


@cache
def hub_answers() -> bool:
    """Whether the hub takes a connection within 5 s; behind a proxy, where nobody knows, True."""
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    with contextlib.suppress(OSError):
        if not urllib.request.getproxies():
            socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
        return True
    return False


def write_digest(path: Path) -> None:
    """PATH.sha256 beside a file, as `sha256sum --check` reads it."""
    path.with_name(f"{path.name}.sha256").write_text(f"{_digest(path)}  {path.name}\n")


def check_digest(path: Path) -> None:
    """SystemExit where a file is not what it was when it was written."""
    try:
        changed = path.with_name(f"{path.name}.sha256").read_text().split()[:1] != [_digest(path)]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be checked: {error}") from error
    if changed:
        raise SystemExit(f"{path} is damaged: it is not what its .sha256 says")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
