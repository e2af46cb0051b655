"""Small faults, planted one at a time in a copy of the tree: does the fast suite notice them?

    make mutants                                # all of tests/mutants.txt
    python tests/mutants.py --only=^rollout.py  # where "FILE: what is wrong" fits this pattern
    python tests/mutants.py --stale             # runs nothing: does each still have its place?

The list has a section for each file, with the tests that cover it, and in it the faults:

    @ FILE: TESTS, below tests/
    # what is wrong
    - text that stands in the file exactly once, on one line or several
    + what stands there instead

The exit status is 1 where one is not noticed, has lost its place or has no end within LIMIT_S (is
the machine busy?). A test that also fails without the fault is sick. Where none fails, the last
line of pytest tells how many were skipped: what is skipped notices nothing.
"""

import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 240  # for the tests of a fault
LEFT_OUT = ".git .venv out model __pycache__ .*_cache"
# imported once, before the forks; nothing of our own
HEAVY = "pytest numpy mpmath h11 torch.distributed.checkpoint torch.distributed.fsdp "
HEAVY += "transformers.models.auto.modeling_auto transformers.models.qwen3.modeling_qwen3"
# whole vLLM processes: on a busy machine they fail, or take minutes, without any fault
UNSTEADY = "agent/test_engines.py::test_vllm_beside_fsdp_on_two_ranks "
UNSTEADY += "agent/test_engine_thread.py::test_a_process_that_ends_in_mid_step_lets_the_step_finish"
OPTIONS = ["-x", "-q", "-m", "not slow", "--tb=no", "-p", "no:cacheprovider"]
OPTIONS += [f"--deselect=tests/{name}" for name in UNSTEADY.split()]
SETTINGS = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1")


def read_faults(text: str):
    """(file, what is wrong, tests, what stands there, what stands there instead) of each."""
    for section in re.split("^@ ", text, flags=re.M)[1:]:
        head, *blocks = re.split("^# ", section, flags=re.M)
        file, _, names = head.strip().partition(": ")
        for name, *lines in map(str.splitlines, blocks):
            old, new = ("\n".join(x[2:] for x in lines if x[:1] == mark) for mark in "-+")
            yield file, name, [f"tests/{each}" for each in names.split()], old, new


def run_tests(tree: Path, tests: list[str]) -> tuple[str, str]:
    """(what came of it, the test that failed or the last line of pytest)."""
    said, began = tree / "said.txt", time.monotonic()
    if not (pid := os.fork()):
        os.setsid()
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.chdir(tree)
        sys.path[0] = str(tree)
        os._exit(sys.modules["pytest"].main(OPTIONS + tests))
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() - began < LIMIT_S:
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    if not ended[0]:
        os.waitpid(pid, 0)
        return "no end", f"after {LIMIT_S} s"
    text = said.read_text(encoding="utf-8", errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    last = text.strip().splitlines()[-1:] or [""]
    code = os.waitstatus_to_exitcode(ended[1])  # of pytest; 4 and 5: no such test
    outcome = {0: "NOT noticed", 4: "stale", 5: "stale"}.get(code, "noticed")
    return outcome, failed[1] if failed else last[0]


def main(argv: list[str]) -> int:
    only = next((arg.removeprefix("--only=") for arg in argv if arg.startswith("--only=")), "")
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    if unknown := [arg for arg in argv if arg != "--stale" and not arg.startswith("--only=")]:
        raise SystemExit(f"unknown: {' '.join(unknown)}\n\n{__doc__}")
    faults, outcomes = read_faults((ROOT / "tests" / "mutants.txt").read_text("utf-8")), Counter()
    healthy: dict[str, bool] = {}  # test -> does it pass without a fault?
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tree = ROOT
        if "--stale" not in argv:
            os.environ.update(SETTINGS)
            sys.dont_write_bytecode, tree = True, Path(folder) / "tree"
            os.chmod(folder, 0o755)  # the sandbox's tests read it as an ordinary user too
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT.split()))
            list(map(importlib.import_module, HEAVY.split()))
        for file, name, tests, old, new in faults:
            if not re.search(only, f"{file}: {name}"):
                continue
            sound, began = (tree / file).read_text("utf-8"), time.perf_counter()
            outcome, what = ("stale", "") if sound.count(old) != 1 else ("in place", "")
            if outcome == "in place" and tree != ROOT:
                (tree / file).write_text(sound.replace(old, new), "utf-8")
                outcome, what = run_tests(tree, tests)
                (tree / file).write_text(sound, "utf-8")
            test = what.partition("[")[0]
            if outcome == "noticed" and test not in healthy:
                healthy[test] = run_tests(tree, [test])[0] == "NOT noticed"
            if not healthy.get(test, True):
                outcome = "sick test"
            outcomes[outcome] += 1
            if outcome != "in place":
                took = f"{time.perf_counter() - began:4.0f} s"
                print(f"{outcome:12}{took}  {file}: {name}  [{what}]", flush=True)
    print(f"{outcomes.total()} faults: " + ", ".join(f"{n} {what}" for what, n in outcomes.items()))
    return bool(outcomes["stale"] + outcomes["NOT noticed"] + outcomes["no end"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
