"""An hour of sixteen calls in flight, harmless code among all the attacks: nothing is forged, the
harmless answer right, and nothing is left behind. SOAK_SECONDS sets another time.
"""

import os
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.boxes import RUNGS, make_box
from tests.tools.test_fences import HARM, HOSTILE, SCAN
from tests.tools.test_sandbox import ATTACKS
from tests.tools.test_sandbox_limits import LIMITS

SECONDS = float(os.environ.get("SOAK_SECONDS", 3600))
IN_FLIGHT = 16
HARMLESS = (
    "print('{n}', 6 * 7)",
    "import math\nmath.comb(10, 3) * 1000 + {n} % 1000",
    "open('f', 'w').write('{n}')\nprint(open('f').read(), 42)",
    "import sqlite3\nc = sqlite3.connect('d')\nprint({n}, c.execute('select 42').fetchone()[0])",
    "import threading\nt = threading.Thread(target=print, args=('{n}', 42))\nt.start(); t.join()",
)


def answers(n: int, which: int) -> str:
    return f"{120_000 + n % 1000}\n" if which == 1 else f"{n} 42\n"


def left_over() -> tuple[int, int, int, set]:
    """Processes below this one, its threads and descriptors, and folders of ours."""
    pid, below = os.getpid(), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            below += path.read_text().rpartition(")")[2].split()[1] == str(pid)
        except OSError:
            pass
    folders = {name for name in os.listdir(tempfile.gettempdir()) if "python-tool-" in name}
    return below, threading.active_count(), len(os.listdir("/proc/self/fd")), folders


@pytest.mark.slow
@pytest.mark.parametrize("rung", RUNGS)
def test_an_hour_of_harmless_code_among_all_attacks(rung, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_box(rung, "this user").close()  # or skip
    before = left_over()
    box = make_box(rung, "this user", seconds=3.0, memory_mb=500, scratch_mb=16)
    attacks = [code for code, _ in ATTACKS.values()] + list(LIMITS.values())
    attacks += [HOSTILE, HARM % os.getpid(), SCAN]
    wrong, counts, ends = [], Counter(), time.monotonic() + SECONDS / len(RUNGS)

    def work(seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < ends:
            n = dice.randrange(10**9)
            if dice.random() < 0.2:
                result = box.run(dice.choice(attacks))
                counts["attacks"] += 1
                if result.status == "fault":
                    counts["faults"] += 1
                continue
            which = n % len(HARMLESS)
            result = box.run(HARMLESS[which].format(n=n), 60.0)
            counts["harmless"] += 1
            if result.status == "timeout":  # after 60 s: the machine is busy with other things
                counts["late"] += 1
            elif (result.status, result.text) != ("ok", answers(n, which)):
                wrong.append((HARMLESS[which], result))

    workers = [threading.Thread(target=work, args=[seed]) for seed in range(IN_FLIGHT)]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    spent = time.monotonic() - began
    box.close()
    rate = (counts["attacks"] + counts["harmless"]) / spent
    print(f"\n{rung}: {rate:.1f} calls a second over {spent:.0f} s at {IN_FLIGHT} in flight:")
    print(f"{dict(counts)}, {len(wrong)} wrong")
    assert not wrong, "\n".join(map(str, wrong[:3]))
    assert counts["late"] <= counts["harmless"] / 100
    assert left_over() == before
