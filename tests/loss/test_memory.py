"""The memory plan against measured peaks, on shapes where each part in turn is the largest, and
what it refuses.
"""

import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from transformers import GPT2Config, Qwen3Config, Qwen3ForCausalLM

from reagent.config import parse_config
from reagent.engines import EngineConfig
from reagent.lora import add_lora
from reagent.memory import (
    CONTEXT,
    engine_size,
    lora_size,
    memory_plan,
    model_sizes,
    plan_engines,
    plan_memory,
    too_large,
)
from reagent.reward_model import RewardModelConfig
from reagent.run import init_distributed
from tests.helpers.tiny import ROOT, load

MEASURE = """
import json, sys, torch
sys.path[:0] = [{root!r}]
from reagent import run
from reagent.policy import Sequence, backward, collate, load_policy, shard
from tests.helpers.tiny import random_rows
torch.set_num_threads(1)

def memory(kind):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

run.init_distributed(60)
policy = load_policy({folder!r}, {checkpoint_activations})
parameters, before = 4 * sum(p.numel() for p in policy.parameters()), memory("VmRSS")
policy = shard(policy, torch.device("cpu"))
optimizer = torch.optim.AdamW(policy.parameters())
for _ in range(2):
    rows = random_rows([512] * ({tokens} // 512))
    batch = collate([Sequence(row.ids, [0] + [1] * 511) for row in rows], (), torch.device("cpu"))
    backward(policy(batch)[0].mean())
    optimizer.step()
    optimizer.zero_grad()
print("peak", memory("VmHWM") - before + parameters)
"""


@pytest.mark.parametrize(
    ("what", "layers", "hidden", "vocab", "tokens", "checkpoint_activations"),
    [
        ("activations", 4, 256, 1000, 2048, False),
        pytest.param("shards", 4, 512, 1000, 512, True, marks=pytest.mark.slow),
        pytest.param("activations", 6, 256, 1000, 16384, True, marks=pytest.mark.slow),
        pytest.param("head", 2, 128, 60_000, 512, False, marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(
    tmp_path, what, layers, hidden, vocab, tokens, checkpoint_activations
):
    heads = dict(num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        **heads,
    )
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(tmp_path)  # read into memory, not mapped
    options = dict(
        root=str(ROOT),
        folder=str(tmp_path),
        tokens=tokens,
        checkpoint_activations=checkpoint_activations,
    )
    # large pieces go back to the system at once: what the allocator keeps for later is not what the
    # step needs
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(**options)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = json.loads(re.search(r"peak (\d+)", done.stdout)[1])
    shape = dict(tokens=tokens, checkpoint_activations=checkpoint_activations, width=4)
    parts = memory_plan(config, ranks=1, **shape)["training"]
    print(f"measured {peak / 1e6:.0f} MB, planned", {k: round(v / 1e6) for k, v in parts.items()})
    parts["shards"] += parts.pop("moments") + parts.pop("gradients")
    assert max(parts, key=parts.get) == what
    assert 0.85 < sum(parts.values()) / peak < 1.15


QWEN3 = {
    "06b": dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "17b": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "4b": dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "8b": dict(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}
CARD = 85.1e9  # what an H100 of 80 GB has


def qwen3(size: str) -> Qwen3Config:
    return Qwen3Config(vocab_size=151_936, num_key_value_heads=8, head_dim=128, **QWEN3[size])


def peak(config, **options) -> float:
    return max(sum(parts.values()) for parts in memory_plan(config, **options).values())


@pytest.mark.parametrize(
    ("checkpoint_activations", "measured"), [(False, 44.2e9), (True, 12.7e9)], ids=["kept", "again"]
)
def test_the_plan_is_within_15_percent_of_a_peak_measured_on_a_gpu(
    checkpoint_activations, measured, monkeypatch
):
    """One H200, Qwen3-0.6B, micro-batches of 16,384 tokens; the peak is the allocator's. The head
    had three chunks of 256 tokens in fp32 then."""
    monkeypatch.setattr("reagent.memory.HEAD_CHUNK", {"cuda": 512})
    shape = dict(tokens=16_384, checkpoint_activations=checkpoint_activations, width=2)
    assert 0.85 < (peak(qwen3("06b"), ranks=1, **shape) - CONTEXT) / measured < 1.15


def test_eight_ranks_share_what_is_sharded():
    shape = dict(tokens=28_000, checkpoint_activations=True, width=2)
    one, eight = (memory_plan(qwen3("8b"), ranks=n, **shape)["training"] for n in (1, 8))
    assert all(one[part] == 8 * eight[part] for part in ("shards", "moments", "gradients"))
    assert abs(eight["shards"] + eight["moments"] - 12.3e9) < 1e8  # Qwen3-8B: 8.19 G parameters
    assert eight["activations"] == one["activations"]


def test_ranks_that_share_a_copy_hold_what_so_many_ranks_alone_would(card, monkeypatch, capsys):
    told = []
    for world, more in ((2, []), (8, []), (8, ["--policy.shard_ranks=2"])):
        planned(monkeypatch, "sft.py", more, "17b", world)
        told.append(capsys.readouterr().out.partition("; host")[0])
    assert told[2] == told[0] != told[1]


def test_the_headline_recipe_fits_and_the_old_share_did_not():
    """Eight cards of 80 GB, Qwen3-8B: a rollout beside shards and moments, a step while the engine
    sleeps.
    """
    shape = dict(ranks=8, tokens=32_768, checkpoint_activations=True, width=2)
    assert not too_large(memory_plan(qwen3("8b"), engine=0.6 * CARD, **shape), {"card": CARD})
    why = too_large(memory_plan(qwen3("8b"), engine=0.85 * CARD, **shape), {"card": CARD})
    assert why.startswith("rollout needs 87") and "engine 72.3" in why
    assert "85.1 GB free: lower engine.memory_share" in why
    why = too_large(
        memory_plan(qwen3("8b"), engine=0.6 * CARD, sleep=False, **shape), {"card": CARD}
    )
    assert why.startswith("training needs") and "tokens_per_microbatch" in why


class Ranks:
    def __init__(self, world):
        self.rank, self.world = 0, world


@pytest.fixture
def card(monkeypatch):
    """A machine with eight cards of 80 GB and 512 GB of memory, as the plan sees it."""
    put_cards(monkeypatch, CARD, 8)


def put_cards(monkeypatch, card: float, cards: int):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 512e9 // 4096}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card - 6e8, card))
    monkeypatch.setattr("os.sysconf", sizes.get)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cards))


def planned(monkeypatch, script, argv, size, world):
    """The plan of a script with a config, as its main asks for it."""
    cfg = parse_config(load(script).Config, argv)
    monkeypatch.setattr("reagent.memory.load_config", lambda folder: qwen3(size))
    longest = cfg.max_tokens_per_row if script == "sft.py" else cfg.max_context
    beside = dict(engine=getattr(cfg, "engine", None), rrm=getattr(cfg, "rrm", None))
    if script == "train_rrm.py":  # a tree: a prompt and its judgments
        beside["group"] = cfg.group_size
        longest += (cfg.group_size - 1) * cfg.max_judgment_tokens
    return plan_memory(cfg, Ranks(world), longest=longest, **beside)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config").glob("*reagent*.py")), ids=lambda path: path.stem
)
def test_every_recipe_fits_the_cards_that_it_names(path, card, monkeypatch, capsys):
    size = path.stem.rpartition("_")[2]
    script = path.name.partition("_reagent")[0] + ".py"
    planned(monkeypatch, script, [str(path)], size, 8 if size == "8b" else 1)
    line = capsys.readouterr().out
    print(line)
    assert line.startswith("memory of a rank, GB: ") and line.count("\n") == 1
    assert all(word in line for word in ("training", "activations", "head", "host"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config").glob("*hotpotqa*.py")), ids=lambda path: path.stem
)
def test_a_recipe_of_one_card_fits_it_as_its_comment_says(path, monkeypatch, capsys):
    _, size, card = path.stem.rsplit("_", 2)
    put_cards(monkeypatch, {"80gb": CARD, "24gb": 25.3e9}[card], 1)
    planned(monkeypatch, "grpo_unified.py", [str(path)], size, 1)
    line = capsys.readouterr().out
    totals = re.findall(r"(rollout|training) ([\d.]+) =", line)
    comment = ", ".join(f"{phase} {total} GB" for phase, total in totals)
    assert f"# Memory by plan: {comment}.\n" in path.read_text(), line


@pytest.mark.parametrize("rank", [1, 32])
def test_adapters_are_counted_as_they_are_made(rank):
    config = Qwen3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=64)
    config.update(dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    with torch.device("meta"):
        hf = Qwen3ForCausalLM(config)
    add_lora(hf, rank)
    made = sum(p.numel() for p in hf.parameters() if p.requires_grad)
    assert lora_size(config, rank) == made > 0


def test_lora_leaves_gradients_and_moments_of_the_adapters_only():
    shape = dict(ranks=1, tokens=16_384, checkpoint_activations=True, width=2)
    plan = memory_plan(qwen3("4b"), lora_rank=32, reference=True, **shape)["training"]
    adapters = lora_size(qwen3("4b"), 32)
    assert plan["gradients"] == 4 * adapters and plan["moments"] == 8 * adapters
    assert plan["shards"] == 2 * model_sizes(qwen3("4b"))[2] + 4 * adapters
    assert not plan["reference"]  # it is the base


def test_the_copied_keys_of_a_tree_are_counted():
    """Eight judgments on one prompt: keys and values of 1,024 numbers for each, in bf16, kept by
    the blocks whose activations are, and their gradients once."""
    shape = dict(ranks=1, tokens=10_000, width=2)
    for again, blocks in ((True, 1), (False, 36)):
        plans = [
            memory_plan(qwen3("8b"), group=n, checkpoint_activations=again, **shape) for n in (1, 8)
        ]
        plain, tree = (plan["training"]["activations"] for plan in plans)
        assert tree - plain == (blocks + 1) * 10_000 * 8 * 2 * 1024 * 2


def test_a_reference_is_weights_in_bf16_shared_by_the_ranks():
    shape = dict(tokens=16_384, checkpoint_activations=True, width=2)
    plan = memory_plan(qwen3("4b"), ranks=8, reference=True, **shape)["training"]
    assert plan["reference"] == 2 * model_sizes(qwen3("4b"))[2] / 8
    assert not memory_plan(qwen3("4b"), ranks=8, **shape)["training"]["reference"]


def test_a_frozen_base_is_read_in_bf16(card, monkeypatch, capsys):
    planned(monkeypatch, "sft.py", ["--policy.lora_rank=32"], "8b", 8)
    assert "rank 0 reads the model 16.4" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["sft.py", "train_rrm.py", "grpo_unified.py"])
def test_the_host_of_a_run_with_offload_holds_what_the_card_does_not(
    script, card, monkeypatch, capsys
):
    planned(monkeypatch, script, ["--policy.cpu_offload"], "8b", 8)
    assert "host 163.8 = ranks 131.0, rank 0 reads the model 32.8" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["sft.py", "train_rrm.py", "grpo_unified.py"])
def test_the_defaults_fit_eight_cards_and_a_longer_microbatch_does_not(
    script, card, monkeypatch, capsys
):
    planned(monkeypatch, script, [], "8b", 8)
    assert "rank 0 reads the model 32.8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="it cannot fit: .* needs .* GB free: "):
        planned(monkeypatch, script, ["--policy.tokens_per_microbatch=400000"], "8b", 8)


def test_outputs_of_attention_are_kept_where_there_is_room(card, monkeypatch, capsys):
    """8B, 32,768 tokens, 36 blocks of 4,096 numbers in bf16 and 32 in fp32: 9.8 GB; what is not
    computed again is kept anyway, and on a CPU nothing is."""
    assert planned(monkeypatch, "grpo_unified.py", [], "8b", 8)
    assert "attention's outputs 9.8" in capsys.readouterr().out
    assert planned(monkeypatch, "sft.py", ["--policy.tokens_per_microbatch=40000"], "8b", 8)
    assert not planned(monkeypatch, "sft.py", ["--policy.tokens_per_microbatch=60000"], "8b", 8)
    assert not planned(monkeypatch, "sft.py", ["--policy.checkpoint_activations=false"], "06b", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not planned(monkeypatch, "sft.py", [], "06b", 1)
    assert capsys.readouterr().out.count("attention's outputs") == 1


def test_a_reward_model_in_the_process_has_a_share_of_its_own(card, monkeypatch, tmp_path):
    folder = f"--rrm={tmp_path}"
    with pytest.raises(SystemExit, match="rollout needs .*reward model 25.5"):
        planned(monkeypatch, "grpo_unified.py", [folder], "8b", 8)
    planned(monkeypatch, "grpo_unified.py", [folder, "--engine.memory_share=0.4"], "8b", 8)


def test_a_model_whose_shapes_are_not_understood_has_no_plan_and_runs(monkeypatch, capsys):
    monkeypatch.setattr("reagent.memory.load_config", lambda folder: GPT2Config())
    plan_memory(parse_config(load("sft.py").Config, []), Ranks(1), longest=10)
    assert "no memory plan for a model of the kind gpt2" in capsys.readouterr().out


def test_a_share_that_does_not_hold_the_weights_is_refused(card, monkeypatch):
    with pytest.raises(SystemExit, match="memory_share = 0.1 of 85.1 GB does not hold its weights"):
        planned(monkeypatch, "grpo_unified.py", ["--engine.memory_share=0.1"], "8b", 8)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_engine_takes_its_share_of_a_card_or_its_part_of_the_weights(ranks):
    """In bf16 on a card, in fp32 on the host; adjacent ranks share them."""
    config = qwen3("8b")
    weights = model_sizes(config)[2] / ranks

    def size(kind, share, card):
        shape = dict(memory_share=share, tensor_parallel=ranks)
        return engine_size(EngineConfig(kind, **shape), config, card)

    assert size("vllm", 0.6, CARD) == 0.6 * CARD and size("hf", 0.6, CARD) == 2 * weights
    assert size("vllm", 0.6, 0) == size("hf", 0.6, 0) == 4 * weights
    assert size("vllm", 1.01 * 2 * weights / CARD, CARD) > 2 * weights
    with pytest.raises(SystemExit, match="does not hold its weights"):
        size("vllm", 0.99 * 2 * weights / CARD, CARD)


def test_shards_on_the_host_must_fit_the_host(card, monkeypatch):
    planned(monkeypatch, "sft.py", ["--policy.cpu_offload"], "8b", 8)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 128e9 // 4096}
    monkeypatch.setattr("os.sysconf", sizes.get)
    with pytest.raises(SystemExit, match="host needs 163.8 GB .ranks 131.0, rank 0 reads"):
        planned(monkeypatch, "sft.py", ["--policy.cpu_offload"], "8b", 8)


@pytest.fixture
def one_card(monkeypatch):
    """A process that believes to have one card, on which nothing is computed."""
    init_distributed(60)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_segments_of_a_cards_memory_may_grow_unless_the_user_says_otherwise(one_card, monkeypatch):
    for given, kept in ((None, "expandable_segments:True"), ("max_split_size_mb:64",) * 2):
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        if given:
            monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
        init_distributed(60)
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == kept
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("hidden", [False, True])
def test_a_card_that_torch_cannot_use_is_no_silent_cpu(hidden, monkeypatch, capsys):
    """As with a driver that is older than the CUDA of torch; an empty list means the CPU."""
    init_distributed(60)
    there = types.SimpleNamespace(exists=lambda: True)
    monkeypatch.setattr("reagent.run.Path", lambda path: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    init_distributed(60)
    assert ("there is a card, but torch cannot use it" in capsys.readouterr().out) is not hidden


def test_a_rank_without_a_card_of_its_own_is_told_so(one_card, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="LOCAL_RANK 1 has no card here: a rank each, of 1"):
        init_distributed(60)


@pytest.mark.parametrize("given, kept", [(None, "1"), ("8", "8")])
def test_all_threads_of_a_process_with_a_card_have_as_many_threads(
    one_card, given, kept, monkeypatch
):
    """vLLM sets one for the engine's and later ones: backward's would compile blocks again."""
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    init_distributed(60)
    assert os.environ["OMP_NUM_THREADS"] == kept and told == ([] if given else [1])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_two_engines_on_one_card_must_leave_room(card, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reagent.memory.load_config", lambda folder: qwen3("8b"))
    beside = RewardModelConfig(source=str(tmp_path))
    plan_engines(EngineConfig(memory_share=0.6), "agent", beside)
    assert "context 2.5, engine 51.1, rrm 25.5" in capsys.readouterr().out
    plan_engines(EngineConfig(memory_share=0.85), "agent", RewardModelConfig("http://a/v1"))
    plan_engines(EngineConfig(memory_share=0.85), "agent", RewardModelConfig("judge.py"))
    plan_engines(EngineConfig(memory_share=0.85), "http://a/v1", beside)
    with pytest.raises(SystemExit, match="rollout needs .*engine 72.3, rrm 25.5.*memory_share"):
        plan_engines(EngineConfig(memory_share=0.85), "agent", beside)
    with pytest.raises(SystemExit, match="rrm.memory_share = 0.1 of 85.1 GB does not hold"):
        plan_engines(EngineConfig(), "agent", RewardModelConfig("folder", memory_share=0.1))
