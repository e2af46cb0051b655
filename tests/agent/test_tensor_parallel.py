"""Reagent-U over tensor-parallel engines, with tools and a judge that answer after random times:
nobody hangs, all agree.
"""

import importlib.util
import json
import random
import time

import pytest

from tests.helpers.judge_server import hashed_judgment, judge_server
from tests.helpers.tiny import ROOT
from tests.loss.test_model import torchrun
from tests.runs.test_faults import calling_agent
from tests.runs.test_jobs import GRPO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed"),
]

LATE_TOOLS = """
import asyncio, os, random, sys
sys.path[:0] = [{root!r}]
import grpo_unified
import rollout
import tools
from reagent import engines
from reagent.config import parse_config
rng, call, step = random.Random(os.environ["RANK"]), tools.Toolbox.call, engines.VLLMEngine._step

async def late(self, *args, **options):
    await asyncio.sleep(rng.expovariate(10))
    return await call(self, *args, **options)

def told(self, added):
    names.extend(name for name, _ in added)
    return step(self, added)

names, tools.Toolbox.call, engines.VLLMEngine._step = [], late, told
grpo_unified.main(parse_config(grpo_unified.Config, sys.argv[1:]))
open({folder!r} + "/requests-" + os.environ["RANK"], "w").write(" ".join(names))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return calling_agent(tmp_path_factory.mktemp("world"), heads=2, kv_heads=2)


@pytest.mark.parametrize("ranks", [2, 4], ids=["tp2", "dp2-tp2"])
def test_twenty_steps_over_engines_of_two_ranks_do_not_hang_and_stay_in_step(
    world, tmp_path, ranks
):
    rng, script = random.Random(0), tmp_path / "late.py"
    script.write_text(LATE_TOOLS.format(root=str(ROOT), folder=str(tmp_path)))

    def late_judgment(text):
        time.sleep(rng.expovariate(10))
        return hashed_judgment(text)

    began = time.monotonic()
    with judge_server(late_judgment) as (url, _):
        torchrun(
            script,
            *GRPO,
            "--engine=vllm",
            "--engine.tensor_parallel=2",
            f"--model={world}/model",
            f"--data={world}/rl.jsonl",
            f"--rrm={url}",
            "--prompts_per_step=4",
            "--prompts_per_minibatch=2",
            "--max_new_tokens_per_turn=24",
            "--max_tokens_per_attempt=300",
            "--max_context=900",
            "--steps=20",
            "--save_interval=100",
            f"--out_dir={tmp_path}/run",
            ranks=ranks,
            timeout=900,
        )
    log = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    asked = [(tmp_path / f"requests-{rank}").read_text().split() for rank in range(ranks)]
    paths = sorted((tmp_path / "run" / "episodes").glob("*.jsonl"))
    calls = [
        call
        for path in paths
        for line in open(path)
        for a in json.loads(line)["attempts"]
        for call in a["calls"]
    ]
    print(
        f"{ranks} ranks: {time.monotonic() - began:.0f} s, {len(calls)} calls, "
        f"{[len(names) for names in asked]} requests, "
        f"|dlogp| mean {max(line['dlogp/mean'] for line in log):.1e}, max "
        f"{max(line['dlogp/max'] for line in log):.1e}"
    )
    assert (
        len(log) == 20
        and max(line["dlogp/mean"] for line in log) < 1e-4
        and any(line["updates"] for line in log)
    )
    assert len(calls) > 20 and all(names for names in asked)
    assert all(
        asked[rank] == asked[rank + 1] for rank in range(0, ranks, 2)
    )  # those that follow ran what the leader ran
