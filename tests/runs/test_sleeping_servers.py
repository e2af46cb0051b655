"""The reward model's servers on the trainer's cards: asleep while it trains, awake in a rollout."""

import asyncio
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest
import torch

import grpo_unified
from reagent.memory import memory_plan, too_large
from reagent.reward_model import RewardModelConfig, served_rrm
from tests.helpers.judge_server import hashed_judgment, serving
from tests.helpers.tiny import toy_world
from tests.helpers.trainers import Seen, run_here
from tests.loss.test_memory import CARD, qwen3
from tests.runs.test_preflight import checked
from tests.runs.test_wiring import COMMON, U


@contextmanager
def sleepy_server(events, name, can_sleep=True, status=404):
    """As vLLM's server in development mode: POST /sleep?level=1 and /wake_up beside /v1."""
    asleep = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"data": [{"id": "rrm"}]})

        def do_POST(self):
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = self.path.lstrip("/")
            events.append((name, path))
            if path in ("sleep?level=1", "wake_up") and can_sleep:
                asleep[:] = [True] if "sleep" in path else []
                return self.send({"status": path})
            if path != "v1/chat/completions" or asleep:
                return self.send({"error": "not now"}, status)
            message = {"content": hashed_judgment(said["messages"][-1]["content"])}
            self.send({"choices": [{"finish_reason": "stop", "message": message}]})

        def send(self, body, status=200):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            """Quiet."""

    with serving(Handler) as url:
        yield url


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy_world(tmp_path_factory.mktemp("world"), heads=1, kv_heads=1)


def test_servers_sleep_while_the_policy_trains_and_are_awake_in_every_rollout(world, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        patch.setattr(torch.cuda, "empty_cache", lambda: seen.events.append(("emptied", "")))
        files = [f"--model={world}/model", f"--data={world}/rl.jsonl", f"--out_dir={tmp_path}"]
        files += ["--rrm.sleep", "--rrm.seconds=20", "--steps=2", "--fixed_critique="]
        with sleepy_server(seen.events, "a") as a, sleepy_server(seen.events, "b") as b:
            run_here(grpo_unified, [*COMMON, *U, *files, f"--rrm={a},{b}"])
    asleep, judged, steps = {"a": False, "b": False}, 0, 0
    keeps = False  # the trainer memory that a step took, which servers that wake up need
    for event in seen.events:
        keeps = event[0] == "step" or (keeps and event[0] != "emptied")
        assert not (keeps and event[1] == "wake_up")
        if event[0] in asleep and event[1] != "v1/chat/completions":
            asleep[event[0]] = event[1] == "sleep?level=1"
        elif event[0] in asleep:
            judged += 1
            assert not any(asleep.values())
        elif event[0] in ("step", "sync"):  # what needs the memory, or gives the engine's back
            steps += event[0] == "step"
            assert all(asleep.values())
    assert judged == 1 + 2 * 16 and steps == 4  # one of the preflight; two minibatches a step
    assert not any(asleep.values())  # and they are left awake


@pytest.mark.parametrize("source", ["server", "file"])
def test_a_reward_model_that_cannot_sleep_is_told_before_work(source, world, tmp_path):
    with sleepy_server([], "a", can_sleep=False) as url:
        rrm = url if source == "server" else "data/toy/prepare.py"
        told = "VLLM_SERVER_DEV_MODE=1" if source == "server" else "rrm.sleep is for servers"
        with pytest.raises(SystemExit, match=told):
            checked("grpo_unified", world, tmp_path / "out", f"--rrm={rrm}", "--rrm.sleep")


def test_a_server_that_died_holds_no_memory_and_the_others_sleep_and_wake():
    """As in a rollout: one server that is killed costs neither a judgment nor the run."""

    def tell(what):
        return asyncio.run(rrm.tell_servers(what))

    events = []
    with sleepy_server(events, "b") as b:
        with sleepy_server(events, "a") as a:
            rrm = served_rrm(RewardModelConfig(f"{a},{b}", model="rrm"))
            tell("sleep?level=1")
        tell("wake_up")
        assert sorted(events[:2]) == [("a", "sleep?level=1"), ("b", "sleep?level=1")]
        assert events[2:] == [("b", "wake_up")]
    with pytest.raises(SystemExit, match=r"wake_up: no server .* is there"):
        tell("wake_up")


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_that_is_there_and_does_not_sleep_stops_the_run(status):
    """It would hold the memory that the policy trains in, whatever the other server does."""
    with sleepy_server([], "a") as a, sleepy_server([], "b", can_sleep=False, status=status) as b:
        rrm = served_rrm(RewardModelConfig(f"{a},{b}", model="rrm"))
        with pytest.raises(SystemExit, match="VLLM_SERVER_DEV_MODE=1"):
            asyncio.run(rrm.tell_servers("sleep?level=1"))


def test_two_8b_models_share_eight_cards_where_one_sleeps():
    shape = dict(ranks=8, tokens=32_768, checkpoint_activations=True, width=2)
    shape |= dict(rrm=0.3 * CARD, rrm_sleeps=True)
    plan = memory_plan(qwen3("8b"), engine=0.5 * CARD, **shape)
    assert not too_large(plan, {"card": CARD})
    assert sum(plan["rollout"].values()) == pytest.approx(82.9e9, rel=0.005)  # docs/recipes.md
    assert plan["training"]["reward model"] == 2.5e9
    why = too_large(memory_plan(qwen3("8b"), engine=0.6 * CARD, **shape), {"card": CARD})
    assert why.startswith("rollout needs") and "reward model 25.5" in why
