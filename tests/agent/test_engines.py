"""Both engines against the trainer: the sampler's log-probs are the policy's, before and after a
weight sync.
"""

import asyncio
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from reagent import engines
from reagent.chat import Chat
from reagent.engines import HFEngine, run_together
from reagent.policy import Sequence, collate, full_weights, load_tokenizer
from tests.helpers.tiny import ROOT, tiny_model
from tests.loss.test_model import policy_of, torchrun

needs_vllm = pytest.mark.skipif(
    not importlib.util.find_spec("vllm"), reason="vLLM is not installed"
)


def sample(engine, prompts, temperature=0.9, new=12):
    chains = [
        engine.generate(ids, max_new_tokens=new, temperature=temperature, seed=i)
        for i, ids in enumerate(prompts)
    ]
    return asyncio.run(run_together(chains))


PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [1, 2], [40] * 30]


def trainer_logps(policy, prompt, sampled, temperature=0.9):
    row = Sequence(prompt + sampled.ids, [0] * len(prompt) + [1] * len(sampled.ids))
    with torch.no_grad():
        return policy(collate([row], (), torch.device("cpu")), temperature)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_the_transformers_engine_returns_the_trainers_logps(folder):
    samples = sample(HFEngine(folder, [258]), PROMPTS)
    policy = policy_of(folder)
    for prompt, got in zip(PROMPTS, samples):
        assert torch.allclose(
            torch.tensor(got.logps), trainer_logps(policy, prompt, got), atol=1e-4
        )


def test_a_machine_without_vllm_is_told_so_before_work_starts(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="engine = 'vllm': it is not installed .make gpu."):
        engines.engine_class("vllm")
    assert engines.engine_class("hf") is HFEngine


def test_temperature_zero_is_greedy_decoding_in_transformers(folder):
    samples = sample(HFEngine(folder, []), PROMPTS, temperature=0.0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, got in zip(PROMPTS, samples):
        out = plain.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert out[0, len(prompt) :].tolist() == got.ids


@pytest.mark.parametrize("top_p, kept", [(1.0, 4), (0.95, 3), (0.75, 2), (0.69, 1), (0.01, 1)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    """Of probabilities .7, .2, .07 and .03, in another order."""
    logits = torch.tensor([0.07, 0.7, 0.03, 0.2]).log()[None]
    request = SimpleNamespace(temperature=1.0, top_p=top_p)
    drawn = set()
    for i in range(400):
        tokens, logps = engines._sample(
            logits, [request], torch.tensor([i / 400], dtype=torch.float64)
        )
        drawn.add(tokens[0])
    assert drawn == set([1, 3, 0, 2][:kept])


def test_a_sync_of_vllm_throws_its_prefix_cache_away(monkeypatch):
    """Keys and values of the old weights would answer for the new ones."""
    done, engine = [], object.__new__(engines.VLLMEngine)
    engine.asleep, engine.names = False, {"w"}
    engine.thread = SimpleNamespace(call=lambda work, *args: work(*args))
    engine.llm = SimpleNamespace(
        collective_rpc=lambda name, kwargs: done.append((name, dict(kwargs["weights_iterator"]))),
        reset_prefix_cache=lambda: done.append("reset") or len(done) < 3,
    )
    engine.load_weights([("w", 1)])
    assert done == [("reload_weights", {"w": 1}), "reset"]
    with pytest.raises(RuntimeError, match="kept its prefix cache"):
        engine.load_weights([("w", 2)])


def test_a_round_can_be_repeated_to_the_bit(folder):
    def once():
        return sample(HFEngine(folder, [258]), PROMPTS)

    assert once() == once()


def test_a_left_out_weight_is_an_error_and_a_sync_changes_the_sampler(folder, tmp_path):
    engine = HFEngine(folder, [])
    other = policy_of(tiny_model(tmp_path, seed=1))
    before = sample(engine, PROMPTS)
    pairs = list(full_weights(other, torch.float32))
    with pytest.raises(ValueError, match="left out"):
        engine.load_weights(iter(pairs[:-1]))
    engine.load_weights(iter(pairs))
    after = sample(engine, PROMPTS)
    assert after != before
    assert torch.allclose(
        torch.tensor(after[3].logps), trainer_logps(other, PROMPTS[3], after[3]), atol=1e-4
    )


VLLM = """
import asyncio, json, sys
sys.path[:0] = [{root!r}]
import torch
from reagent import run
from reagent.policy import full_weights, load_policy, load_tokenizer, shard
from reagent.policy import Sequence, backward, collate
from reagent.engines import VLLMEngine
from tests.agent.test_engines import PROMPTS, trainer_logps
from tests.helpers.tiny import random_rows
rank, world, device = run.init_distributed(120)
engine = VLLMEngine({folder!r}, [258], max_context=512)
policy = shard(load_policy({folder!r}, False), device)
optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)

# the long ones fill blocks of the prefix cache, which a sync must throw away, and are more than a
# step of vLLM takes (4,096 tokens on a CPU)
prompts = PROMPTS + [[7 + k + i % 90 for i in range(400)] for k in range(12)]

def gap():
    async def go():
        options = dict(max_new_tokens=12, temperature=0.9)
        asked = [engine.generate(p, seed=i, **options) for i, p in enumerate(prompts)]
        return await asyncio.gather(*asked)
    samples = asyncio.run(go())
    pairs = zip(prompts, samples)
    gaps = [(torch.tensor(s.logps) - trainer_logps(policy, p, s)).abs() for p, s in pairs]
    return torch.cat(gaps).mean().item()

report = dict(before=gap())
rows = random_rows([9, 14, 30])
logps, _ = policy(collate(rows, ("advantage",), device))
backward(-logps.mean())
optimizer.step()
report["stale"] = gap()
engine.load_weights(full_weights(policy, torch.float32))
report["after"] = gap()

left_out = [pair for pair in full_weights(policy, torch.float32)][:-1]
try:
    engine.load_weights(iter(left_out))
except ValueError as error:
    report["error"] = str(error)
engine.load_weights(full_weights(policy, torch.float32))

async def late():
    ended = []
    async def one(name, new, wait):
        await asyncio.sleep(wait)
        await engine.generate(PROMPTS[0], max_new_tokens=new, temperature=0.9, seed=3)
        ended.append(name)
    engine.stop_ids = []
    await asyncio.gather(one("long", 200, 0), one("late", 4, 0.05))
    return ended
report["ended"] = asyncio.run(late())
if rank == 0:
    json.dump(report, open({out!r}, "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@needs_vllm
@pytest.mark.parametrize(
    "tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
def test_vllm_beside_fsdp_on_two_ranks(tied, tmp_path):
    """|dlogp| before a step, after it with a stale sampler, after the sync; a left-out weight; a
    late request.
    """
    folder, out, script = (
        tiny_model(tmp_path / "m", tied, heads=2, kv_heads=2, hidden=64),
        tmp_path / "out.json",
        tmp_path / "t.py",
    )
    script.write_text(VLLM.format(root=str(ROOT), folder=folder, out=str(out)))
    torchrun(script, timeout=400)
    report = json.loads(out.read_text())
    assert report["before"] < 1e-4 and report["after"] < 1e-4 and report["stale"] > 1e-2, report
    assert "left out" in report["error"]
    assert report["ended"] == ["late", "long"]


def test_the_byte_level_chat_stops_where_the_engines_do(folder):
    chat = Chat(load_tokenizer(folder))
    assert chat.closer_id in chat.stop_ids


def test_an_engine_of_ones_own_is_one_file(folder, tmp_path):
    from reagent.engines import EngineConfig, Sample, make_engine

    (tmp_path / "stub.py").write_text(
        "from reagent.engines import Sample\n"
        "class Stub:\n"
        "    def __init__(self, folder, stop_ids, *, config, max_context, tp_group):\n"
        "        self.context = max_context\n"
        "    async def generate(self, ids, **options):\n"
        "        return Sample([7], [-0.5], 'stop')\n"
        "    def load_weights(self, pairs):\n"
        "        list(pairs)\n"
    )
    config = EngineConfig(f"{tmp_path}/stub.py:Stub")
    engine = make_engine(config, folder, [], max_context=9)
    assert sample(engine, PROMPTS) == [Sample([7], [-0.5], "stop")] * len(PROMPTS)
    assert engine.context == 9
    with pytest.raises(SystemExit, match="stub.py has no Other"):
        make_engine(EngineConfig(f"{tmp_path}/stub.py:Other"), folder, [], max_context=9)
    with pytest.raises(SystemExit, match="Sample has no generate and no load_weights"):
        make_engine(EngineConfig(f"{tmp_path}/stub.py:Sample"), folder, [], max_context=9)


def test_a_chain_that_gives_up_does_not_hold_the_round_of_the_others(folder):
    engine = HFEngine(folder, [])

    async def ask(new):
        options = dict(max_new_tokens=new, temperature=1.0, seed=0)
        return await engine.generate([1, 2, 3], **options)

    async def gives_up():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(4), 0.1)
        return "gave up"

    async def late():  # waits for a tool while the other chain's time ends
        await asyncio.sleep(0.3)
        return await ask(2)

    gave_up, sample = asyncio.run(engines.run_together([gives_up(), late()]))
    assert gave_up == "gave up" and len(sample.ids) == 2 and not engine.queue
