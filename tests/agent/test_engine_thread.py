"""The thread of engines, with recorders in place of vLLM and of the device calls: one thread, on
the right card, for everything; late requests join, errors reach who waits, the end is clean.
"""

import asyncio
import json
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

from reagent import engines
from reagent.engines import EngineConfig, EngineThread, Sample, VLLMEngine
from tests.helpers.tiny import ROOT, tiny_model
from tests.loss.test_model import torchrun


class Recorder:
    """Stands for vllm.LLM and its LLMEngine: a request is whole after as many steps as it has
    tokens; notes where each call ran.
    """

    def __init__(self, folder, **options):
        self.calls, self.running, self.kept = [], {}, None
        self.llm_engine = self.engine_core = self.model_executor = self.scheduler = self
        self._finalizer, self.options, self.parameters = self, options, []
        self.seconds, self.broken = 0.002, None
        self.vllm_config = types.SimpleNamespace(cache_config=types.SimpleNamespace())
        self.vllm_config.cache_config.kv_cache_max_concurrency = 2.5
        self.note("build")

    def note(self, what):
        self.calls.append((what, threading.get_ident(), DEVICES.device, DEVICES.stream))

    def add_request(self, name, prompt, parameters):
        self.note("add")
        if not prompt["prompt_token_ids"]:
            raise ValueError("an empty prompt")
        self.running[name] = [parameters.max_tokens, []]
        self.parameters.append(parameters)

    def step(self):
        self.note("step")
        time.sleep(self.seconds)
        if self.broken:
            raise self.broken
        outputs = []
        for name, (tokens, ids) in list(self.running.items()):
            ids.append(len(self.running))  # how many ran together
            if len(ids) == tokens:
                del self.running[name]
                entry = [{token: types.SimpleNamespace(logprob=-1.0)} for token in ids]
                one = types.SimpleNamespace(token_ids=ids, logprobs=entry, finish_reason="length")
                outputs.append(types.SimpleNamespace(request_id=name, outputs=[one], finished=True))
        return outputs

    def abort_request(self, names):
        self.note("abort")
        for name in names:
            self.running.pop(name, None)

    def collective_rpc(self, method, kwargs):
        self.note("load")
        self.kept = dict(kwargs["weights_iterator"])

    def sleep(self, level):
        self.note(f"sleep {level}")

    def wake_up(self, tags):
        self.note(f"wake {tags}")

    def reset_prefix_cache(self):
        self.note("reset")
        return True

    def detach(self):
        self.note("detach")

    def shutdown(self):
        self.note("shutdown")


class Devices(threading.local):
    """What CUDA keeps for each thread: a new one is on device 0 and on the default stream."""

    device, stream = 0, "default"


class Stream:
    made = 0

    def __init__(self):
        Stream.made += 1
        self.name = f"stream {Stream.made} of device {DEVICES.device}"


DEVICES = Devices()


def fake(patch):
    """Puts recorders in place of vLLM and torch.cuda; `patch(object, name, value)` sets them."""

    def set_device(device):
        DEVICES.device = torch.device(device).index

    def set_stream(stream):
        DEVICES.stream = stream.name

    def parameters(**options):
        return types.SimpleNamespace(**options)

    vllm = types.SimpleNamespace(LLM=Recorder, SamplingParams=parameters)
    kinds = types.SimpleNamespace(RequestOutputKind=types.SimpleNamespace(FINAL_ONLY=2))
    patch(sys, "modules", sys.modules | {"vllm": vllm, "vllm.sampling_params": kinds})
    patch(torch.cuda, "is_available", lambda: True)
    patch(torch.cuda, "set_device", set_device)
    patch(torch.cuda, "Stream", Stream)
    patch(torch.cuda, "set_stream", set_stream)
    patch(torch.cuda, "current_stream", lambda: types.SimpleNamespace(synchronize=int))
    patch(torch.cuda, "empty_cache", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(EngineThread, "current", None)
    fake(monkeypatch.setattr)
    made = VLLMEngine(folder, [], max_context=64)
    yield made
    made.thread.stop()
    assert not made.thread.is_alive()


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("sleep", [False, True])
@pytest.mark.parametrize("rank", ["", "1"])
def test_what_an_engine_is_told_reaches_vllm(folder, cuda, sleep, rank, monkeypatch):
    built = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(EngineThread, "shared", lambda: "thread")
    monkeypatch.setattr(VLLMEngine, "_build", lambda _, *told: built.append(told))
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    config = EngineConfig(tensor_parallel=2, memory_share=0.35, sleep=sleep)
    made = VLLMEngine(folder, iter([7, 9]), config=config, max_context=77, tp_group="group")
    ((of, options),) = built
    wanted = dict(max_model_len=77, tensor_parallel_size=2, seed=0, enable_prefix_caching=True)
    wanted |= dict(logprobs_mode="processed_logprobs", generation_config="vllm")
    wanted |= dict(trust_remote_code=False, dtype="bfloat16" if cuda else "float32")
    wanted |= dict(distributed_executor_backend="external_launcher") if rank else {}
    gpu = dict(gpu_memory_utilization=0.35, enable_sleep_mode=sleep)
    gpu |= dict(hf_overrides={"head_dtype": "float32"}, disable_custom_all_reduce=True)
    wanted |= gpu if cuda else dict(enforce_eager=True, enable_chunked_prefill=False)
    assert of == folder and options == wanted | {"use_tqdm_on_load": False}
    assert (made.stop_ids, made.group, made.asleep) == ([7, 9], "group", False)
    assert made.sleeps is (sleep and cuda) and "lm_head.weight" in made.names


def ask(engine, new, ids=(1, 2)):
    return engine.generate(list(ids), max_new_tokens=new, temperature=1.0, seed=0)


def weights(engine):
    return iter([(name, torch.zeros(1)) for name in engine.names])


async def together(*asked):
    return await asyncio.gather(*asked, return_exceptions=True)


def test_vllm_samples_as_it_was_asked_and_tells_log_probs_of_that_distribution(engine):
    """Nothing of the model folder's own settings, nothing of vLLM's, may change what is sampled."""
    engine.stop_ids = [7, 9]
    options = dict(max_new_tokens=3, temperature=0.7, top_p=0.9)
    asyncio.run(together(*(engine.generate([1, 2], seed=seed, **options) for seed in (5, 6))))
    for parameters, seed in zip(engine.llm.parameters, (5, 6), strict=True):
        told = dict(vars(parameters))
        assert told.pop("logprobs") == 0 and told.pop("ignore_eos") is True
        assert (told.pop("detokenize"), told.pop("output_kind")) == (False, 2)
        wanted = dict(max_tokens=3, temperature=0.7, top_p=0.9, seed=seed, stop_token_ids=[7, 9])
        assert told == wanted
    built = engine.llm.options
    assert built["logprobs_mode"] == "processed_logprobs" and built["max_model_len"] == 64
    assert built["generation_config"] == "vllm" and built["trust_remote_code"] is False
    # https://github.com/vllm-project/vllm/issues/42609: else tensor-parallel ranks end at start
    assert built["enable_sleep_mode"] and built["disable_custom_all_reduce"]


# --------------------------------------------------------------------------------------------------
# one thread, one device


RANK = """
import asyncio, json, os, sys
sys.path[:0] = [{root!r}]
import torch.distributed as dist
from reagent import run
from reagent.engines import EngineConfig
run.init_distributed(60)
gloo = dist.new_group(backend="gloo")
from tests.agent import test_engine_thread as t
t.fake(setattr)
rank, engine = dist.get_rank(), t.VLLMEngine({folder!r}, [], max_context=64)
engine.sleep()
engine.load_weights(t.weights(engine))
asyncio.run(t.together(*(t.ask(engine, n) for n in range(1, 20))))
engine.sleep()
engine.load_weights(t.weights(engine))
config = EngineConfig(tensor_parallel=2, sleep=False)
pair = t.VLLMEngine({folder!r}, [], config=config, max_context=64, tp_group=gloo)
if rank == 0:
    samples = asyncio.run(t.together(*(t.ask(pair, n) for n in (3, 5))))
    pair.finish()
else:
    pair.follow()
calls = [list(call) for e in (engine, pair) for call in e.llm.calls]
main = t.threading.get_ident()
json.dump(dict(calls=calls, main=main), open({out!r} + str(rank), "w"))
dist.barrier()
dist.destroy_process_group()
"""


def test_every_rank_drives_vllm_from_one_thread_on_its_own_card(folder, tmp_path):
    """Built, stepped, loaded, put to sleep and woken, alone and as a tensor-parallel pair."""
    script, out = tmp_path / "rank.py", str(tmp_path / "calls")
    script.write_text(RANK.format(root=str(ROOT), folder=folder, out=out))
    torchrun(script)
    for rank in (0, 1):
        found = json.load(open(out + str(rank)))
        names = [name for name, *_ in found["calls"]]
        assert {"build", "add", "step", "load", "sleep 2", "wake ['weights']"} <= set(names)
        places = {tuple(place) for _, *place in found["calls"]}
        assert len(places) == 1, places
        (thread, device, stream) = places.pop()
        assert thread != found["main"] and device == rank
        assert stream == f"stream 1 of device {rank}"
        assert names[names.index("build") + 1 :].count("step") == 19 + 5


def test_two_engines_of_one_process_share_the_thread_and_take_turns(engine, folder):
    other = VLLMEngine(folder, [], max_context=64)
    asyncio.run(together(ask(engine, 30), ask(other, 30)))
    places = {call[1:] for e in (engine, other) for call in e.llm.calls}
    assert len(places) == 1 and places.pop()[1] == 3
    other.close()
    assert asyncio.run(ask(engine, 2)).finish_reason == "length"


# --------------------------------------------------------------------------------------------------
# requests, errors, the end


def test_late_requests_join_the_next_step_and_samples_go_back_when_they_are_whole(engine):
    ended = []

    async def one(name, new, after):
        await asyncio.sleep(after)
        sample = await ask(engine, new)
        ended.append(name)
        return sample.ids

    async def go():
        return await asyncio.gather(one("long", 60, 0), one("late", 3, 0.03), one("a", 2, 0))

    long, late, _ = asyncio.run(go())
    assert ended == ["a", "late", "long"]
    assert late == [2, 2, 2] and long[-1] == 1  # it ran beside the long one


def test_the_loop_steps_on_while_the_event_loop_is_busy(engine):
    engine.llm.seconds = 0.001

    async def go():
        asked = asyncio.ensure_future(ask(engine, 40))
        await asyncio.sleep(0.01)
        before = len(engine.llm.calls)
        time.sleep(0.1)  # a tool that blocks
        stepped = len(engine.llm.calls) - before
        await asked
        return stepped

    assert asyncio.run(go()) > 20


def test_a_step_that_fails_reaches_every_chain_and_the_next_rollout_is_not_hurt(engine):
    async def go():
        asked = asyncio.gather(*(ask(engine, 50) for _ in range(5)), return_exceptions=True)
        await asyncio.sleep(0.02)
        engine.llm.broken = RuntimeError("out of memory")
        return await asked

    assert [str(e) for e in asyncio.run(go())] == ["out of memory"] * 5
    engine.llm.broken = None
    assert asyncio.run(ask(engine, 2)).ids == [1, 1]  # nothing of before runs beside it


def test_a_request_that_vllm_refuses_fails_alone(engine):
    bad, good = asyncio.run(together(ask(engine, 3, ids=()), ask(engine, 3)))
    assert "empty prompt" in str(bad) and len(good.ids) == 3


def test_a_chain_that_gave_up_and_a_loop_that_closed_do_no_harm(engine):
    async def go():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(engine, 20), 0.01)

    asyncio.run(go())
    engine.finish()  # what the chain left runs no more: the engine may sleep, its cache be reset
    assert not engine.llm.running
    assert len(asyncio.run(ask(engine, 25)).ids) == 25


def test_chains_that_fit_the_cache_may_live_at_a_time(engine):
    assert engine.holds == 5  # 2.5 at their longest, of which they have half on average


def test_a_failed_rollout_leaves_nothing_that_steps(engine):
    async def go():
        asked = asyncio.ensure_future(ask(engine, 1000))
        await asyncio.sleep(0.02)
        asked.cancel()

    asyncio.run(go())
    engine.finish()
    steps = len(engine.llm.calls)
    time.sleep(0.03)
    assert len(engine.llm.calls) == steps and not engine.llm.running


def test_an_error_of_a_job_is_raised_where_it_was_asked_for(engine):
    with pytest.raises(ValueError, match="left out"):
        engine.load_weights(iter([]))


def test_an_engine_that_sleeps_refuses_requests_until_the_sync_that_wakes_it(folder, engine):
    other = VLLMEngine(folder, [], max_context=64)
    other.sleep()
    with pytest.raises(RuntimeError, match="load_weights comes before"):
        asyncio.run(ask(other, 2))
    other.load_weights(weights(other))
    assert len(asyncio.run(ask(other, 2)).ids) == 2
    names = [name for name, *_ in other.llm.calls]
    assert names[:5] == ["build", "sleep 2", "wake ['weights']", "load", "wake ['kv_cache']"]


def test_a_closed_engine_frees_vllm_and_leaves_torch_distributed_alone(engine, folder):
    llm = engine.llm
    engine.close()
    names = [name for name, *_ in llm.calls]
    assert names[-3:] == ["detach", "shutdown", "shutdown"]
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(ask(engine, 2))


END = """
import asyncio, sys, threading
sys.path[:0] = [{root!r}]
from tests.agent import test_engine_thread as t
t.fake(setattr)
engine = t.VLLMEngine({folder!r}, [], max_context=64)
engine.llm.seconds = 0.5
step = engine.llm.step

def told():
    out = step()
    print("step ended", flush=True)
    return out

engine.llm.step = told

async def go():
    asyncio.ensure_future(t.ask(engine, 1000))
    await asyncio.sleep(0.1)
asyncio.run(go())
raise SystemExit("the run failed")
"""


def test_a_process_that_ends_in_mid_step_lets_the_step_finish(folder, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", END.format(root=str(ROOT), folder=folder)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "the run failed" in done.stderr
    assert "step ended" in done.stdout and "Traceback" not in done.stderr
    assert time.monotonic() - began < 50


@pytest.mark.parametrize(
    ("told", "reason"),
    [("stop", "stop"), ("length", "length"), ("abort", "abort"), ("error", "abort"), (None,) * 2],
)
def test_a_sample_of_vllm_has_its_ids_their_log_probs_and_says_how_it_ended(told, reason):
    entries = [{7: types.SimpleNamespace(logprob=-1.5), 3: types.SimpleNamespace(logprob=-0.2)}]
    entries.append({4: types.SimpleNamespace(logprob=-2.5)})
    output = types.SimpleNamespace(token_ids=[7, 4], logprobs=entries, finish_reason=told)

    async def settled():
        done = asyncio.get_running_loop().create_future()
        engines._answer(asyncio.get_running_loop(), done, output)
        return await done

    assert asyncio.run(settled()) == Sample([7, 4], [-1.5, -2.5], reason or "abort")
