"""The page of a run: data/page.py makes it and its tables, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "data" / "page.py"
SECONDS = 120  # most that a run waits for its page
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def make_page(run: Path) -> None:
    """`python evaluate.py page RUN`, which prints the report of an evaluation. A run does not fail
    for its page: what went wrong is a line.

    The process has no card and is no rank, and hears no Ctrl-C that is meant for the run."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(TORCHRUN)}
    given = dict(env=own | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}, timeout=SECONDS)
    given |= dict(encoding="utf-8", errors="replace", capture_output=True)
    given |= dict(stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        done = subprocess.run([sys.executable, SCRIPT, run], **given)
        said = done.stderr.splitlines() or [f"exit {done.returncode}"]
        problem = said[-1] if done.returncode else ""
        print(done.stdout, end="", flush=True)
    except (OSError, subprocess.SubprocessError) as error:
        problem = error
    if problem:
        told = f"no page of {run}: {problem}; python evaluate.py page {run} makes it again"
        print(told, file=sys.stderr, flush=True)
