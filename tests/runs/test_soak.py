"""Three hundred steps of Reagent-U with a tool that starts processes: nothing that a run holds
grows with its steps.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.judge_server import judge_server
from tests.helpers.tiny import ROOT, toy_world
from tests.runs.test_jobs import GRPO
from tests.runs.test_survival import SMALL

# an untrained agent calls no tool: the first turn of every other attempt is a call of python
CALLS = """
import itertools, sys
sys.path[:0] = [{root!r}]
import grpo_unified
import rollout
from reagent import engines
from reagent.calls import HERMES
from reagent.chat import Chat
from reagent.config import parse_config
cfg = parse_config(grpo_unified.Config, sys.argv[1:])
chat = Chat(model.load_tokenizer(cfg.model))
code = "open('f', 'w').write('x' * 1000); print(6 * 7)"
call = [*chat.text(HERMES.write("python", {{"code": code}})), chat.closer_id]
generate, turns = engines.HFEngine.generate, itertools.count()

async def calling(self, ids, **options):
    sample = await generate(self, ids, **options)
    return engines.Sample(call, [-1.0] * len(call), "stop") if next(turns) % 4 == 0 else sample

engines.HFEngine.generate = calling
grpo_unified.main(cfg)
"""


def held(pid: int, temporary: Path) -> dict:
    """What a process holds: MB of memory, open files, threads, child processes, temporary files."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    children = [
        pid for task in (proc / "task").iterdir() for pid in (task / "children").read_text().split()
    ]
    found = dict(
        megabytes=int(status["VmRSS"].split()[0]) // 1024, files=len(os.listdir(proc / "fd"))
    )
    return found | dict(
        threads=int(status["Threads"]),
        processes=len(children),
        temporary=len(os.listdir(temporary)),
    )


@pytest.mark.slow
def test_three_hundred_steps_hold_no_more_than_a_hundred(tmp_path, monkeypatch):
    world, script, temporary, log = (
        toy_world(tmp_path),
        tmp_path / "calls.py",
        tmp_path / "tmp",
        tmp_path / "run" / "log.jsonl",
    )
    script.write_text(CALLS.format(root=str(ROOT)))
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    seen, began = {}, time.monotonic()
    with (
        judge_server() as (url, _),
        open(tmp_path / "output", "w+") as output,
    ):  # a pipe would fill up
        command = [
            sys.executable,
            str(script),
            *GRPO,
            *SMALL,
            "--tools=python",
            "--max_dlogp=100",
            "--steps=301",
            "--save_interval=50",
            "--keep_last=1",
            f"--model={world}/model",
            f"--data={world}/rl.jsonl",
            f"--rrm={url}",
            f"--out_dir={tmp_path}/run",
        ]
        run = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        while run.poll() is None and 300 not in seen:
            step = len(log.read_bytes().splitlines()) if log.exists() else 0
            if step // 50 * 50 not in {0, *seen}:
                seen[step // 50 * 50] = held(run.pid, temporary)
            time.sleep(0.05)
        assert run.wait(120) == 0, (tmp_path / "output").read_text()[-3000:]
    lines = [json.loads(line) for line in open(log)]
    calls = sum(
        '"status": "ok"' in line
        for path in (tmp_path / "run" / "episodes").glob("*.jsonl")
        for line in open(path)
    )
    print(
        f"\n{time.monotonic() - began:.0f} s, {calls} chains with a call of python, "
        f"{sum(x['updates'] for x in lines)} updates"
    )
    for step, figures in seen.items():
        print(f"step {step}: " + "  ".join(f"{name} {figure}" for name, figure in figures.items()))
    assert sorted(seen) == [50, 100, 150, 200, 250, 300] and calls > 100
    assert seen[300]["megabytes"] - seen[100]["megabytes"] < 20  # the log itself is 300 kB
    for name in ("files", "threads", "processes", "temporary"):
        assert seen[300][name] <= seen[100][name] + 3, name  # a call may be under way
    assert not os.listdir(temporary)
