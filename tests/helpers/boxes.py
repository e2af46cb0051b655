"""Sandboxes of this user and, where the tests run as root, of an ordinary one (in a process)."""

import contextlib
import ctypes
import functools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from toolkit.sandbox import RUNGS, Observation, Sandbox, SandboxUnavailable

ROOT = Path(__file__).parents[2]
ORDINARY = 12345  # a user that nobody is
WORKER = """
import json, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, {root!r})
from toolkit import sandbox
sandbox.JAIL = {jail} or sandbox.JAIL
try:
    box = sandbox.Sandbox(**{options!r})
except sandbox.SandboxUnavailable as why:
    sys.exit(f"unavailable: {{why}}")
print("ready", flush=True)
lock = threading.Lock()
def answer(line):
    number, code, seconds = json.loads(line)
    said = json.dumps([number, *vars(box.run(code, seconds)).values()])
    with lock:  # print writes a text and its end apart: threads would mix their lines
        print(said, flush=True)
with ThreadPoolExecutor(16) as pool:
    for line in sys.stdin:
        pool.submit(answer, line)
box.close()
"""


@functools.cache
def ordinary_python() -> str:
    """An interpreter that an ordinary user can start, with the checkout; "" where there is none."""
    check = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import toolkit.sandbox"
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            command = [python, "-B", "-c", check]
            if subprocess.run(command, capture_output=True, **as_ordinary()).returncode == 0:
                return python
    return ""


def as_ordinary() -> dict:
    return dict(user=ORDINARY, group=ORDINARY, extra_groups=[], cwd="/")


class OrdinaryBox:
    """A Sandbox of an ordinary user's, with `run` and `close` of its own."""

    def __init__(self, jail="", **options):
        self.rung, self.waiting, self.lock = options["rung"], {}, threading.Lock()
        self.user = as_ordinary()
        program = WORKER.format(root=str(ROOT), jail=repr(jail), options=options)
        self.process = subprocess.Popen(
            [ordinary_python(), "-B", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **self.user,
        )
        self.pid = self.process.pid
        if self.process.stdout.readline() != "ready\n":
            raise SandboxUnavailable(self.process.stderr.read()[-500:])
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            number, *result = json.loads(line)
            self.waiting.pop(number).set_result(Observation(*result))

    def run(self, code: str, seconds: float | None = None) -> Observation:
        answer = Future()
        with self.lock:
            number = len(self.waiting) + threading.get_ident() * 1000
            self.waiting[number] = answer
            self.process.stdin.write(json.dumps([number, code, seconds]) + "\n")
            self.process.stdin.flush()
        return answer.result(120)

    def close(self):
        self.process.communicate(timeout=60)


def machine_allows(rung: str) -> bool:
    """Whether the machine has what a rung stands on, by other means than ours."""
    landlock = ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
    command = {
        "bubblewrap": "bwrap --unshare-all --unshare-user --ro-bind / / true",
        "landlock+namespaces": "unshare --user --map-root-user --mount --net true",
        "landlock": "true",
    }[rung]
    with contextlib.suppress(OSError):
        done = subprocess.run(command.split(), capture_output=True)
        return done.returncode == 0 and (landlock or rung == "bubblewrap")
    return False


def make_box(rung: str, who: str, **options):
    """A box of "this user" or "an ordinary user"; skips, with the reason, where the machine allows
    none.
    """
    try:
        if who == "this user":
            box = Sandbox(rung=rung, **options)
            box.pid, box.user = os.getpid(), {}
            return box
        if os.getuid() or not ordinary_python():
            pytest.skip("needs root, and an interpreter that others may start")
        return OrdinaryBox(rung=rung, **options)
    except SandboxUnavailable as why:
        if machine_allows(rung):
            raise
        pytest.skip(str(why))


EVERYWHERE = [(rung, who) for rung in RUNGS for who in ("this user", "an ordinary user")]
