"""The memory estimate of a training step against the measured peak, on shapes where each part in
turn is the largest.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from transformers import Qwen3Config

from reagent.config import parse_config
from reagent.policy import memory_estimate
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
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(
    tmp_path, what, layers, hidden, vocab, tokens, checkpoint_activations
):
    import torch
    from transformers import Qwen3ForCausalLM

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
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
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
    estimate = memory_estimate(config, 1, tokens, checkpoint_activations, width=4)
    print(
        f"measured {peak / 1e6:.0f} MB, estimated",
        {name: round(size / 1e6) for name, size in estimate.items()},
    )
    assert max(estimate, key=lambda name: estimate[name] * (name != "total")) == what
    assert 0.8 < estimate["total"] / peak < 1.25


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
    "8b": dict(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}


def qwen3(size: str) -> Qwen3Config:
    return Qwen3Config(vocab_size=151_936, num_key_value_heads=8, head_dim=128, **QWEN3[size])


def test_eight_ranks_share_what_is_sharded():
    one, eight = (memory_estimate(qwen3("8b"), ranks, 28_000, True, width=2) for ranks in (1, 8))
    assert (
        one["shards"] == 8 * eight["shards"] and abs(one["shards"] / 16 - 8.19e9) < 2e7
    )  # Qwen3-8B: 8.19 G parameters
    assert eight["activations"] == one["activations"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config").glob("*reagent*.py")), ids=lambda path: path.stem
)
def test_the_memory_that_a_recipe_names_is_the_estimate(path):
    script = load(path.name.partition("_reagent")[0] + ".py")
    cfg, size = parse_config(script.Config, [str(path)]), path.stem.rpartition("_")[2]
    shape = (cfg.tokens_per_microbatch, cfg.checkpoint_activations)
    estimate = (
        memory_estimate(qwen3(size), 8 if size == "8b" else 1, *shape, width=2)["total"] / 1e9
    )
    told = re.search(r"About ([\d.]+) (# )?GB to train", path.read_text().replace("\n", " "))
    assert float(told[1]) == round(estimate, 1)
