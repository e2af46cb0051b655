"""The memory plan of a trainer, by phase and part of a rank's card; printed before any loading."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from reagent.policy import HEAD_CHUNK, keeps_softmax, load_config

# of a card: CUDA's context, its libraries, and what an engine keeps asleep (graphs, buffers);
# measured on one H200 with vLLM 0.25, without the buffers of NCCL
CONTEXT = 2.5e9
ROOM = 0.9  # of the card, up to which what only saves time may be kept
DENSE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
CURES = {
    "rollout": "lower engine.memory_share or rrm.memory_share, or serve the reward model elsewhere",
    "training": "lower policy.tokens_per_microbatch, set policy.checkpoint_activations, add ranks",
    "host": "more memory, fewer ranks a host, without a card lower policy.tokens_per_microbatch",
}


def is_dense(config) -> bool:
    return all(hasattr(config, k) for k in DENSE) and not getattr(config, "num_experts", 0)


def widths(config) -> tuple[int, int, int, int]:
    """Numbers of a token: hidden, inner of the MLP, queries, keys."""
    hidden, head = config.hidden_size, getattr(config, "head_dim", None)
    head = head or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return hidden, config.intermediate_size, queries, keys


def model_sizes(config) -> tuple[int, int, int]:
    """Parameters of a block, of an embedding table, and of the whole Llama-like model."""
    hidden, inner, queries, keys = widths(config)
    block = hidden * (2 * (queries + keys) + 3 * inner)
    table = config.vocab_size * hidden
    tables = table if config.tie_word_embeddings else 2 * table
    return block, table, config.num_hidden_layers * block + tables


def lora_size(config, rank: int) -> int:
    """Parameters of the adapters: `rank` times inputs and outputs of seven layers in each block."""
    hidden, inner, queries, keys = widths(config)
    sides = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return config.num_hidden_layers * rank * sides


def step_parts(
    config, *, ranks: int, tokens: int, width: int, checkpoint_activations, lora_rank=0, group=1
) -> dict[str, float]:
    """Bytes that the forward and backward of a micro-batch add to what is resident, by part.
    tokens: all of them in the loss; width: bytes of a computed number (2: bf16 on a card, 4: fp32
    on a CPU). fp32 copies that norms make are counted where numbers are computed in bf16.
    group: continuations of a tree, which all read the keys and values of its prefix, copied."""
    block, table, total = model_sizes(config)
    (hidden, inner, queries, keys), layers = widths(config), config.num_hidden_layers
    # of a token in a block, what backward reads: of both norms input (fp32), normed and scaled; of
    # queries and keys before their norm (fp32), after it and after rotation; values; attention's
    # output; gate, its activation, up and their product
    saved = 4 * (2 * hidden + queries + keys) + width * (4 * hidden + 3 * (queries + keys))
    read = width * 2 * keys * (group if group > 1 else 0)
    saved += width * (4 * inner + 7 * lora_rank) + read
    kept = layers * width * hidden + saved if checkpoint_activations else layers * saved
    # two blocks and the tables whole, a block's gradient in fp32; one CPU rank has them anyway
    trained = lora_size(config, lora_rank) or total
    gathered = width * (2 * block + total - layers * block) + 4 * min(block, trained / layers)
    cuda = width == 2  # logits and their gradient in bf16; on a CPU three of these in fp32
    chunks = (1.5 * HEAD_CHUNK["cuda"] if cuda else 3 * HEAD_CHUNK["cpu"]) * config.vocab_size
    keeps = not cuda and keeps_softmax(tokens, config.vocab_size)
    softmax = tokens * config.vocab_size if keeps else 0
    return {
        "gradients": 4 * trained / ranks,
        "gathered": 0 if ranks == 1 and width == 4 else gathered,
        "activations": tokens * (kept + 4 * width * hidden + read),
        "head": 4 * (chunks + softmax + (0 if lora_rank else table)),
    }


def memory_plan(
    config,
    *,
    engine: float = 0.0,
    rrm: float = 0.0,
    rrm_sleeps: bool = False,
    sleep: bool = True,
    reference: bool = False,
    offload: bool = False,
    **shape,
) -> dict[str, dict[str, float]]:
    """phase of a step -> part -> bytes on the card of one of the ranks that share parameters.
    engine, rrm: bytes that the policy's engine has in a rollout and with `sleep` only there, and
    that a reward model in this process has always, or its server on the card in a rollout alone
    with `rrm_sleeps`. reference: a second policy, for forwards only.
    offload: parameters, gradients and moments stay on the host. shape: what step_parts takes."""
    parts, width, ranks = step_parts(config, **shape), shape["width"], shape["ranks"]
    total, adapters = model_sizes(config)[2], lora_size(config, shape.get("lora_rank", 0))
    weights = width * total + 4 * adapters if adapters else 4 * total
    resident = {} if offload else {"shards": weights / ranks, "moments": 2 * parts["gradients"]}
    second = reference and not adapters  # the base is the reference
    asleep = CONTEXT if rrm_sleeps else rrm
    resident |= {"reward model": asleep, "reference": width * total / ranks if second else 0}
    resident |= {"context": CONTEXT if width == 2 else 0}
    plan = {"rollout": resident | {"engine": engine, "reward model": rrm}} if engine else {}
    awake = resident if sleep else resident | {"engine": engine}
    return plan | {"training": awake | parts | ({"gradients": 0} if offload else {})}


def too_large(plan: dict, room: dict[str, float]) -> str:
    """Says which phase does not fit, or "". room: phase -> bytes, "card" for those not named."""
    for phase, parts in plan.items():
        need, there = sum(parts.values()), room.get(phase, room["card"])
        if there and need > there:
            where = "memory" if phase == "host" else "the card"
            has = f"{where} has {there / 1e9:.1f} GB free"
            return f"{phase} needs {need / 1e9:.1f} GB ({told(parts)}), {has}: {CURES[phase]}"
    return ""


def told(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)


def plan_memory(cfg, run, *, longest: int, engine=None, rrm=None, group: int = 1) -> bool:
    """Prints the plan of a trainer's `cfg` and ends the program where it cannot fit. -> whether
    there is room for attention's outputs where other activations are computed again.
    longest: tokens of a row that stands alone. engine, rrm: the EngineConfig and RewardModelConfig
    of what runs beside the policy. group: see step_parts."""
    config, cuda, own = load_config(cfg.model), torch.cuda.is_available(), cfg.policy
    if not is_dense(config):
        print(f"no memory plan for a model of the kind {config.model_type}", flush=True)
        return False
    free, card = torch.cuda.mem_get_info() if cuda else (0, 0)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ranks, total = own.shard_ranks or run.world, model_sizes(config)[2]
    options = dict(tokens=max(own.tokens_per_microbatch, longest), width=2 if cuda else 4)
    if engine and cuda:
        options["engine"] = engine_size(engine, config, card)
        options["sleep"] = engine.kind == "vllm" and engine.sleep
    if rrm and cuda and (rrm.sleep or Path(rrm.source).is_dir()):
        options |= dict(rrm=rrm.memory_share * card, rrm_sleeps=rrm.sleep)
        free = card if rrm.sleep else free  # its servers may be awake
    options |= dict(ranks=ranks, checkpoint_activations=own.checkpoint_activations)
    options |= dict(lora_rank=own.lora_rank, offload=own.cpu_offload, group=group)
    plan = memory_plan(config, reference=bool(getattr(cfg, "kl_coef", 0)), **options)
    # of all blocks, in bf16, with the logs of the softmax's sums in fp32
    kept = config.num_hidden_layers * (2 * widths(config)[2] + 4 * config.num_attention_heads)
    training = plan["training"] | {"attention's outputs": options["tokens"] * kept}
    keeps = cuda and own.checkpoint_activations and sum(training.values()) < ROOM * free
    plan["training"] = training if keeps else plan["training"]
    adapters = lora_size(config, own.lora_rank)
    here = 16 * adapters + 2 * total if adapters else 16 * total
    here *= local / ranks if own.cpu_offload else 0
    if not cuda:  # the ranks themselves are on the host
        here = local * max(sum(parts.values()) for parts in plan.values())
    read = (2 if adapters and cuda else 4) * total  # as load_policy does
    plan["host"] = {"ranks": here, "rank 0 reads the model": read if run.rank < local else 0}
    if run.rank == 0:
        lines = [f"{phase} {sum(p.values()) / 1e9:.1f} = {told(p)}" for phase, p in plan.items()]
        print("memory of a rank, GB: " + "; ".join(lines), flush=True)
    if why := too_large(plan, {"card": free, "host": host_memory()}):
        raise SystemExit(f"it cannot fit: {why}")
    return keeps


def host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def engine_size(engine, config, card: float, key: str = "engine") -> float:
    """Bytes that an engine takes of a card of so many, or of the host where there is none."""
    weights = (2 if card else 4) * model_sizes(config)[2] / engine.tensor_parallel
    size = engine.memory_share * card if card and engine.kind == "vllm" else weights
    if size < weights:
        share = f"{key}.memory_share = {engine.memory_share} of {card / 1e9:.1f} GB"
        raise SystemExit(f"{share} does not hold its weights, {weights / 1e9:.1f} GB: raise it")
    return size


def plan_engines(engine, folder: str, rrm) -> None:
    """The plan where nothing is trained: the engine of the agent in `folder`, or of a server, and
    that of a reward model in a folder."""
    free, card = torch.cuda.mem_get_info() if torch.cuda.is_available() else (host_memory(), 0)
    beside = replace(engine, memory_share=rrm.memory_share, tensor_parallel=1)
    parts = {"context": CONTEXT if card else 0}
    for name, source, one in (("engine", folder, engine), ("rrm", rrm.source, beside)):
        local = source and not source.startswith("http") and not source.endswith(".py")
        if local and is_dense(config := load_config(source)):
            parts[name] = engine_size(one, config, card, name)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"memory of a rank, GB: {told(parts)}", flush=True)
    if why := too_large({"rollout" if card else "host": parts}, {"card": free}):
        raise SystemExit(f"it cannot fit: {why}")
