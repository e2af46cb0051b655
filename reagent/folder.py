"""The folder of a run: one run at a time, files that are whole or not there, digests beside shards.

No torch at import. Whatever is wrong with a folder is told in a sentence, as SystemExit.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
import urllib.request
from functools import cache
from pathlib import Path


def claim(folder: str | Path, rank: int = 0):
    """Makes the folder of a run and locks it for this process: keep what is returned until its end.
    `rank`: each writes files of its own. Who holds the lock is written inside."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f"lock-{rank}", "a+")
    except OSError as error:
        raise SystemExit(f"out_dir {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another run"
        told = f"{folder} is being written by {holder}: give another --out_dir"
        raise SystemExit(told) from error
    except OSError as error:  # some network file systems
        print(f"{folder} cannot be locked ({error.strerror}): start one run in it", file=sys.stderr)
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"process {os.getpid()} on {socket.gethostname()}, since {since}", file=file, flush=True)
    return file


def check_free(folder: Path) -> None:
    """SystemExit where `claim` would end, as far as that is known without writing."""
    lock, there = folder / "lock-0", folder
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise SystemExit(f"out_dir {folder} cannot be written: {there} is no folder of yours")
    if lock.exists():
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SystemExit(f"{folder} is being written by {file.read().strip()}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its name and renames it: a kill or a full disk leaves the old one."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
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
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        path = Path(folder) / name
        if path.is_file() and "auto_map" in read_json(path):
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
        kept = path.with_name(f"{path.name}.sha256").read_text().split()[:1]
        changed = kept != [_digest(path)]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be checked: {error}") from error
    if changed:
        raise SystemExit(f"{path} is damaged: it is not what its .sha256 says")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
