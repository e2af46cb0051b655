"""The reward model behind real vLLM servers on loopback: two of them, one killed in mid-run."""

import asyncio
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from reagent.reward_model import RewardModelConfig, served_rrm
from tests.helpers.tiny import ROOT, tiny_model, toy
from tests.loss.test_model import torchrun
from tests.runs.test_jobs import GRPO
from tests.runs.test_survival import start, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy reward model that has learnt the format, a small agent and questions."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    toy.make_model(folder / "rrm0", toy.make_tokenizer(toy.toy_phrases()))
    tiny_model(folder / "agent", phrases=toy.toy_phrases())
    toy.write(folder / "rrm.jsonl", (toy.rrm_row(rng, i) for i in range(3000)))
    toy.write(folder / "rl.jsonl", (toy.rl_row(rng, i, "train") for i in range(16)))
    torchrun(
        "train_rrm.py",
        "config/train_rrm_toy_sft.py",
        f"--model={folder}/rrm0",
        f"--data={folder}/rrm.jsonl",
        "--eval_data=",
        "--steps=150",
        f"--out_dir={folder}/rrm",
        timeout=400,
    )
    return folder


def serve(folder, **more):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "rrm",
        "--override-generation-config",
        '{"max_new_tokens": 64}',
    ]  # a judgment that does not end costs minutes
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", **more}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=quiet, stderr=quiet, start_new_session=True
    ), port


def wait_until_healthy(process, port):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the vLLM server did not start")


@pytest.mark.parametrize("sleep", [(), ("--rrm.sleep",)], ids=["awake", "sleep"])
def test_one_of_two_servers_killed_in_mid_run_loses_no_judgment(world, tmp_path, sleep):
    rrm = world / "rrm" / "step-000150"
    servers = [serve(rrm, VLLM_SERVER_DEV_MODE="1") for _ in range(2)]
    run = None
    try:
        for server in servers:
            wait_until_healthy(*server)
        urls = ",".join(f"http://127.0.0.1:{port}/v1" for _, port in servers)
        run = start(
            [
                sys.executable,
                "grpo_unified.py",
                *GRPO,
                f"--model={world}/agent",
                f"--data={world}/rl.jsonl",
                f"--rrm={urls}",
                "--prompts_per_step=4",
                "--prompts_per_minibatch=4",
                "--max_new_tokens_per_turn=12",
                "--max_tokens_per_attempt=100",
                "--max_context=400",
                "--rrm.max_context=4000",
                "--rrm.max_tokens=400",
                "--rrm.max_failures=1.0",
                *sleep,
                "--steps=6",
                "--save_interval=100",
                f"--out_dir={tmp_path}/run",
            ]
        )
        wait_for(tmp_path / "run" / "episodes" / "step-000002.jsonl", run, 400)
        os.killpg(servers[0][0].pid, 9)
        text = run.communicate(timeout=300)[0]
        assert run.returncode == 0, text[-3000:]
    finally:
        if run:
            run.kill()
        for process, _ in servers:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    log = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    episodes = [
        [json.loads(line) for line in open(path)]
        for path in sorted((tmp_path / "run" / "episodes").glob("*.jsonl"))
    ]
    for line, step in zip(log, episodes, strict=True):
        attempts = [a for episode in step for a in episode["attempts"]]
        scored = [a for a in attempts if a["score"] is not None]
        assert (
            len(step) == 8
            and line["judge/asked"] == len(attempts) == len(scored) + line["judge/failed"]
        )
        assert (
            line["attempts"] == len(scored) == len([a for a in attempts if a["reward"] is not None])
        )
        assert all(
            a["critique"] for a in scored
        )  # a score comes with a judgment, never from a failure
    assert (
        "no answer from" not in text
    )  # no judgment waited in vain; those that failed were written badly
    assert sum(line["attempts"] for line in log[3:]) > 0


def test_a_real_server_sleeps_and_wakes_in_the_trainers_order_and_answers_again(tmp_path):
    """Three rounds of what a step does: asleep while the policy trains, awake in the rollout. What
    a judgment says is the same before and after. Only a card can show that memory goes back."""
    tiny_model(tmp_path / "rrm", hidden=128)  # vLLM's CPU attention wants heads of 32
    process, port = serve(tmp_path / "rrm", VLLM_SERVER_DEV_MODE="1")
    base = f"http://127.0.0.1:{port}"

    def asleep() -> bool:
        with urllib.request.urlopen(f"{base}/is_sleeping", timeout=30) as reply:
            return json.load(reply)["is_sleeping"]

    async def rounds(rrm) -> list:
        said = []
        await rrm.tell_servers("wake_up")  # as at the start: it never slept
        for _ in range(3):
            said.append(await rrm.ask("Who?", [], "nobody", 7, 60.0))
            assert not asleep()
            await rrm.tell_servers("sleep?level=1")
            assert asleep()
            await rrm.tell_servers("sleep?level=1")  # twice: the start of a run, then its end
            await rrm.tell_servers("wake_up")
        return said

    try:
        wait_until_healthy(process, port)
        rrm = served_rrm(RewardModelConfig(f"{base}/v1", max_context=3000, max_tokens=16))
        said = [choice["message"]["content"] for choice in asyncio.run(rounds(rrm))]
        assert said[0] and said == [said[0]] * 3
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
