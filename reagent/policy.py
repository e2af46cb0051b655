"""What the trainers share and a test must pin: packing, loading, sharding, log-probs, gradients.

Letters in shapes: B rows, T tokens of a packed micro-batch, M tokens in the loss, H hidden size, V
vocabulary. A packed row is one sequence (1, T) that holds several rows end to end; position ids
restart at 0 at each of them, and attention never crosses a border. Only the M tokens whose mask is
1 go through the head. A row may be a tree: continuations of one prefix, which is computed once.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise, zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reagent.attention import KEPT, choose_attention, row_attention_backward, row_ends
from reagent.chat import Chat
from reagent.folder import check_digest, hub_answers, refuse_code
from reagent.lora import ADAPTERS, add_lora, base_of, merged

# tokens that pass the head at once: V = 152k in fp32 is 0.6 MB a token; a CPU has small caches
HEAD_CHUNK = {"cpu": 256, "cuda": 2048}
HEAD_KEPT = 1 << 26  # numbers (M V) up to which a softmax is kept for backward: 256 MB


@dataclass(frozen=True)
class PolicyConfig:
    """How the policy computes and lies in memory; `--policy.lora_rank=32`."""

    attention: str = "auto"  # torch | flash | cudnn | auto: on a GPU what is faster when it starts
    lora_rank: int = 0  # of adapters beside all linear layers of the blocks; 0: all weights train
    tokens_per_microbatch: int = 28_000  # that a rank packs into one forward
    checkpoint_activations: bool = True  # computed again in backward
    cpu_offload: bool = False  # parameters, gradients and moments on the host
    shard_ranks: int = 0  # HSDP: ranks that share one copy of the parameters; 0: all
    save_dtype: str = "auto"  # of a Hugging Face folder: bf16 | fp32 | auto: bf16 on a GPU


POLICY_RULES = """policy.tokens_per_microbatch>0 policy.attention=auto|torch|flash|cudnn
policy.save_dtype=auto|bf16|fp32"""

# --------------------------------------------------------------------------------------------------
# pools of rewards


def normalised(pools: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Rewards (N, K) -> (R - mean) / (std + eps) of their own pool, in fp64: the std is unbiased,
    over those that are there. 0 where a reward is missing (NaN), in pools with one or none, and in
    pools whose max - min is under 1e-6: the std of equal fp32 numbers is not 0."""
    flat, there = pools.double().nan_to_num(0.0), ~pools.isnan()
    count = there.sum(1, keepdim=True)
    mean = flat.sum(1, keepdim=True) / count.clamp(min=1)
    centred = (flat - mean) * there
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    varies = (count > 1) & (spread(pools.double())[:, None] >= 1e-6)
    return torch.where(varies, centred / (std + eps), 0.0)


def spread(pools: torch.Tensor) -> torch.Tensor:
    """max - min of each pool (N, …), NaN left out -> (N,)."""
    flat = pools.flatten(1)
    return flat.nan_to_num(-math.inf).amax(1) - flat.nan_to_num(math.inf).amin(1)


# --------------------------------------------------------------------------------------------------
# packing


@dataclass
class Sequence:
    """A token row. `mask` is 1 at trained tokens (not the first); `columns`: a number for each.
    forks: where each continuation of the tokens before the first fork begins, if it is a tree."""

    ids: list[int]
    mask: list[int]
    columns: dict[str, list[float]] = field(default_factory=dict)
    forks: list[int] = field(default_factory=list)


@dataclass
class Batch:
    """A packed micro-batch. Column tensors (M,) follow the order of the trained tokens."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    lengths: list[int]  # tokens of each row, sum T; of trees the first continuation has the prefix
    prefixes: list[slice]  # of T, what each row reads before its own; [] without trees
    index: torch.Tensor  # (M,) position in T of the token BEFORE each trained token
    targets: torch.Tensor  # (M,) the trained tokens
    columns: dict[str, torch.Tensor]


def balance(rows: list[Sequence], ranks: int, tokens_per_microbatch: int) -> list[list[list]]:
    """Deals rows to ranks for equal work, then into micro-batches: result[rank][microbatch][row].
    Longest first to the rank with the fewest tokens; then first fit. Every rank gets the same
    number of micro-batches (FSDP would hang otherwise), so some may be empty. Deterministic: the
    same rows give the same deal."""
    dealt: list[list[Sequence]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        rank = tokens.index(min(tokens))
        dealt[rank].append(row)
        tokens[rank] += len(row.ids)
    bins = [_first_fit(mine, tokens_per_microbatch) for mine in dealt]
    count = max(len(mine) for mine in bins)
    return [mine + [[] for _ in range(count - len(mine))] for mine in bins]


def _first_fit(rows: list[Sequence], room: int) -> list[list[Sequence]]:
    bins: list[list] = []  # [free tokens, rows]
    for row in rows:
        fit = next((one for one in bins if one[0] >= len(row.ids)), None)
        if fit is None:  # a row longer than the room stands alone
            fit = [room, []]
            bins.append(fit)
        fit[0] -= len(row.ids)
        fit[1].append(row)
    return [each for _, each in bins]


def collate(rows: list[Sequence], columns: tuple[str, ...], device: torch.device) -> Batch:
    """Packs rows into a (1, T) sequence; without rows two tokens without loss, to keep step."""
    ids, positions, index, targets, lengths, prefixes = [], [], [], [], [], []
    for row in rows or [Sequence([0, 0], [0, 0])]:
        fits = not row.mask[0] and len(row.ids) == len(row.mask)
        assert fits, "the first token of a row has nothing before it"
        start, trained = len(ids), [t for t, mark in enumerate(row.mask) if mark]
        before = {fork: row.forks[0] - 1 for fork in row.forks}  # all follow the same token
        index += [start + before.get(t, t - 1) for t in trained]
        targets += [row.ids[t] for t in trained]
        for a, b in pairwise([0, *row.forks[1:], len(row.ids)]):
            seen = row.forks[0] if a else 0
            positions += range(seen, seen + b - a)
            prefixes.append(slice(start, start + seen))
            lengths.append(b - a)
        ids += row.ids
    values = {name: [x for row in rows for x in row.columns[name]] for name in columns}
    for name, column in values.items():
        told = f"column {name}: {len(column)} numbers for {len(index)} trained tokens"
        assert len(column) == len(index), told

    def tensor(data, dtype=torch.long):
        return torch.tensor(data, dtype=dtype).to(device, non_blocking=True)

    inputs = dict(input_ids=tensor(ids)[None], position_ids=tensor(positions)[None])
    trained = dict(index=tensor(index), targets=tensor(targets))
    moved = {name: tensor(column, torch.float32) for name, column in values.items()}
    read = prefixes if any(prefix.stop > prefix.start for prefix in prefixes) else []
    return Batch(**inputs, **trained, lengths=lengths, prefixes=read, columns=moved)


# --------------------------------------------------------------------------------------------------
# the policy


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(m, H) x (V, H) -> (m, V) in fp32; bf16 is multiplied as it is and accumulated in fp32."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return (hidden @ weight.t()).float()


def head_statistics(logits, targets, temperature: float, keep: bool):
    """logits (m, V), targets (m, 1) -> log-probs of targets and entropy (m,), log of the softmax's
    sum (m, 1), softmax (m, V) if `keep`. The logits are read for their largest, then for sums."""
    logits = logits / temperature
    top = logits.amax(-1, keepdim=True)
    probs = (logits - top).exp_()
    total = probs.sum(-1, keepdim=True)
    norm = top + total.log()
    entropy = norm[:, 0] - torch.linalg.vecdot(probs, logits) / total[:, 0]
    logps = (logits.gather(1, targets) - norm)[:, 0]
    return logps, entropy, norm, probs.div_(total) if keep else None


def head_gradient(logits, probs, targets, norm, scale, temperature: float, dtype: torch.dtype):
    """(one-hot minus softmax) * scale, (m, V) in `dtype`; of the logits where no softmax is kept.
    targets, norm, scale (m, 1)."""
    if probs is None:
        probs = (logits / temperature).sub_(norm).exp_()
    one_hot = (torch.arange(probs.shape[1], device=probs.device) == targets).float()
    return one_hot.sub_(probs).mul_(scale).to(dtype)


@cache
def _compiled(function):
    return torch.compile(function)  # read once, written once


class _ChunkedLogprobs(torch.autograd.Function):
    """Log-probs of targets and entropy, some tokens at a time; backward repeats them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        work = _compiled(head_statistics) if hidden.is_cuda else head_statistics
        logps, entropy = (torch.empty_like(targets, dtype=torch.float32) for _ in range(2))
        targets, norm = targets[:, None], torch.empty_like(logps)[:, None]
        kept, keep = [], not hidden.is_cuda and keeps_softmax(len(targets), len(weight))
        for part in _parts(hidden):
            *found, probs = work(_logits(hidden[part], weight), targets[part], temperature, keep)
            logps[part], entropy[part], norm[part] = found
            kept += [probs] if keep else []
        ctx.save_for_backward(hidden, weight, targets, norm, *kept)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, _):
        hidden, weight, targets, norm, *kept = ctx.saved_tensors
        work = _compiled(head_gradient) if hidden.is_cuda else head_gradient
        grad_hidden, trains = torch.empty_like(hidden), ctx.needs_input_grad[1]  # not with LoRA
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains else None
        scales = grad_logps[:, None] / ctx.temperature
        for part, probs in zip_longest(_parts(hidden), kept):
            logits = _logits(hidden[part], weight) if probs is None else None
            rest = targets[part], norm[part], scales[part], ctx.temperature, hidden.dtype
            grad = work(logits, probs, *rest)
            grad_hidden[part] = grad @ weight
            if trains and hidden.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), hidden[part])
            elif trains:
                grad_weight += grad.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype) if trains else None, None, None


def keeps_softmax(tokens: int, vocab: int) -> bool:
    """Whether the head's softmax of so many tokens is kept for backward, on a CPU."""
    return tokens * vocab <= HEAD_KEPT


def _parts(hidden: torch.Tensor) -> list[slice]:
    n, chunk = len(hidden), HEAD_CHUNK[hidden.device.type]
    return [slice(a, min(a + chunk, n)) for a in range(0, n, chunk)]


class ChunkedHead(torch.nn.Module):
    """In place of lm_head, with its parameter: (M, H) -> log-probs and entropy (M,)."""

    def __init__(self, weight: torch.nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden, targets, temperature):
        return _ChunkedLogprobs.apply(hidden, self.weight, targets, temperature)


class Policy(torch.nn.Module):
    """A causal LM that returns log-probs of the trained tokens, never the full (T, V) logits."""

    def __init__(self, hf):
        super().__init__()
        head = getattr(hf, "lm_head", None)
        if head is None or not hasattr(getattr(hf, "model", None), "layers"):
            raise ValueError("it has no model.layers and lm_head, as decoders like Llama have")
        if getattr(head, "bias", None) is not None:
            raise ValueError("its head has a bias")
        self.hf, self.cudnn_from = hf, math.inf  # tokens a row, on average
        hf.lm_head = ChunkedHead(hf.lm_head.weight)

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (logps (M,) with gradient, entropy (M,) without), both in nats at `temperature`."""
        long = sum(batch.lengths) >= self.cudnn_from * len(batch.lengths) and not batch.prefixes
        rows = row_ends(batch.lengths, batch.input_ids.device, batch.prefixes)
        inputs = dict(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        found = self.hf.model(**inputs, **rows, kernel="cudnn" if long else "torch")
        hidden = found.last_hidden_state[0]  # (T, H)
        return self.hf.lm_head(hidden[batch.index], batch.targets, temperature)


def _read(loader, folder: str, what: str, **options):
    # a folder or a hub's name; a library's error is shortened to what a person can act on
    path = Path(folder)
    if path.exists() and not (path / "config.json").is_file():
        raise SystemExit(f"{folder} is not a model folder: it has no config.json")
    if not path.exists() and (len(path.parts) > 2 or Path(path.parts[0]).is_dir()):
        raise SystemExit(f"no model in {folder}: run the stage or prepare.py for it (README)")
    refuse_code(path)
    options["local_files_only"] = not path.exists() and not hub_answers()
    try:
        return loader.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        text = str(error).strip().splitlines()[0]
        if options["local_files_only"]:
            text = "no such folder here, nothing in the hub's cache, and the hub does not answer"
        raise SystemExit(f"no {what} in {folder}: {text}") from error


def load_config(folder: str):
    """The shapes of a language model, or of the one inside a model of several kinds."""
    return _read(AutoConfig, folder, "model").get_text_config()


def load_tokenizer(folder: str):
    return _read(AutoTokenizer, folder, "tokenizer")


def load_chat(folder: str, chat_template: str = "", tools: bool = True) -> Chat:
    """The renderer of a model, tried before work starts. chat_template: a file in place of the
    model's own; without `tools` (a reward model) calls need no known format."""
    tokenizer, own = load_tokenizer(folder), f"chat_template = {chat_template}: "
    try:
        if chat_template:
            tokenizer.chat_template = Path(chat_template).read_text("utf-8")
        return Chat(tokenizer, tools)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{own if chat_template else ''}{error}") from error


def make_policy(cfg, device: torch.device, keep_attention: bool = False) -> Policy:
    """The policy of a run's `cfg`, sharded, on a GPU compiled; keep_attention: plan_memory's."""
    options = dict(lora_rank=cfg.policy.lora_rank, keep_attention=keep_attention)
    policy = load_policy(cfg.model, cfg.policy.checkpoint_activations, **options)
    config = policy.hf.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads, head
    policy.cudnn_from = choose_attention(cfg.policy.attention, heads, device)
    return _placed(policy, cfg, device)


def make_reference(cfg, policy: Policy, device: torch.device):
    """The policy as it was before training, for forwards only: with LoRA its own base."""
    if cfg.policy.lora_rank:
        return base_of(policy)
    reference = load_policy(cfg.model, False, frozen=True)
    reference.cudnn_from = policy.cudnn_from
    return _placed(reference, cfg, device)


def _placed(policy: Policy, cfg, device: torch.device) -> Policy:
    if device.type == "cuda":
        compile_blocks(policy)
    return shard(policy, device, cfg.policy.shard_ranks, cfg.policy.cpu_offload)


def compile_blocks(policy: Policy, backend: str = "inductor") -> None:
    """Compiles each block's forward, without the hooks of FSDP and of recomputation around it."""
    # with and without gradient, with either kernel, without adapters: one graph each. torch's
    # config would not do: a thread has its own, and a GPU's backward computes in another
    # compiled code is kept between runs, and calls our operation as it was declared then
    torch.compiler.config.cache_key_tag = str(row_attention_backward._opoverload._schema)
    for block in policy.hf.model.layers:
        block.forward = torch.compile(block.forward, backend=backend, recompile_limit=32)


@cache
def check_model(folder: str):
    """The config of a model that can be trained here; SystemExit for another or without weights."""
    config, path = _read(AutoConfig, folder, "model"), Path(folder)
    try:
        check_forward(config)
    except ValueError as error:
        raise SystemExit(f"{folder} ({config.model_type}) cannot be trained: {error}") from error
    if path.is_dir() and not [*path.glob("*.safetensors"), *path.glob("*.bin")]:
        raise SystemExit(f"{folder} has a config.json, but no weights")
    return config


def load_policy(
    folder: str, checkpoint_activations: bool, lora_rank=0, frozen=False, keep_attention=False
) -> Policy:
    """A Hugging Face folder in fp32: rank 0 reads it on its CPU, the other ranks know its shapes;
    `shard` gives each its part.
    What is `frozen`, as all but the adapters is with LoRA, is in bf16 where there is a GPU.
    keep_attention: of what is computed again in backward, its outputs are not."""
    config = check_model(folder)
    frozen = frozen or lora_rank > 0
    dtype = torch.bfloat16 if frozen and torch.cuda.is_available() else torch.float32
    options = dict(dtype=dtype, attn_implementation="varlen")
    if dist.is_initialized() and dist.get_rank() > 0:
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    else:
        for digest in Path(folder).glob("*.safetensors.sha256"):  # a checkpoint of ours
            check_digest(digest.with_suffix(""))
        hf = _read(AutoModelForCausalLM, folder, "model", **options)
    hf.requires_grad_(not frozen)
    if lora_rank:
        add_lora(hf, lora_rank)
    if checkpoint_activations:
        again = dict(use_reentrant=False)
        if keep_attention:
            again["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
        hf.gradient_checkpointing_enable(again)
    return Policy(hf).train()


def check_forward(config) -> None:
    """Compares log-probs of a packed ragged batch with those of transformers, a row at a time, on a
    small model of the same kind with random weights: a difference is a ValueError that names it."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(SMALL["vocab_size"], (n,), generator=generator) for n in (9, 2, 9, 17)]
    rows = [Sequence(row.tolist(), [0] + [1] * (len(row) - 1)) for row in ids]
    try:
        with torch.random.fork_rng(devices=[]):  # a run's own random numbers stay as they are
            exact = dict(attn_implementation="eager", dtype=torch.float32)
            hf = AutoModelForCausalLM.from_config(_small(config), trust_remote_code=False, **exact)
        for weight in hf.eval().parameters():  # so large that softcaps bite
            weight.data.normal_(0, 4 / weight.shape[-1] ** 0.5, generator=generator)
            weight.data += float(weight.dim() == 1)
        with torch.no_grad():
            logps = [hf(row[None]).logits[0, :-1].float().log_softmax(-1) for row in ids]
            expected = [logps[i].gather(1, row[1:, None])[:, 0] for i, row in enumerate(ids)]
            hf.set_attn_implementation("varlen")
            got, _ = Policy(hf)(collate(rows, (), torch.device("cpu")))
    except (AttributeError, RuntimeError, TypeError) as error:  # another kind of model altogether
        raise ValueError(f"packed rows do not pass it ({error})") from error
    worst = (got - torch.cat(expected)).abs().max().item()
    if not worst < 1e-2:
        told = {k: v for k, v in config.to_dict().items() if v and _TELLING.search(k)}
        raise ValueError(f"log-probs differ by {worst:.2g} from transformers' own; it has {told}")


SMALL = dict(num_hidden_layers=2, vocab_size=128, sliding_window=5, attention_chunk_size=5)
_TELLING = re.compile("logit|softcap|multiplier|_scal|window|chunk|alibi|conv|ssm|mamba|linear_")


def _small(config):
    """The config with one layer of each kind, at least two, few heads of their own width, a few
    tokens and short windows: what is computed stays, its size goes."""
    small = copy.deepcopy(config.get_text_config())
    small.update({k: v for k, v in SMALL.items() if getattr(small, k, None) is not None})
    small.update({k: min(v, 16) for k, v in vars(small).items() if k.endswith("intermediate_size")})
    if kinds := list(dict.fromkeys(vars(small).get("layer_types") or [])):
        small.layer_types = kinds if len(kinds) > 1 else kinds * 2
        small.num_hidden_layers = len(small.layer_types)
    heads = small.num_attention_heads
    keys = getattr(small, "num_key_value_heads", None) or heads
    width = getattr(small, "head_dim", None) or small.hidden_size // heads
    small.num_attention_heads, small.hidden_size = 4, 4 * width
    small.num_key_value_heads = 4 if keys == heads else 2 if keys > 1 else 1
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, key, None)
    return small


def shard(policy: Policy, device: torch.device, shard_ranks: int = 0, cpu_offload=False) -> Policy:
    """FSDP2: fp32 shards and reduction, bf16 compute on a GPU; a unit each block, then the root.
    `shard_ranks` > 0: HSDP, sharded over so many adjacent ranks, replicated over others."""
    world = dist.get_world_size()
    inner = shard_ranks or world
    if world % inner:
        raise SystemExit(f"policy.shard_ranks = {inner} does not divide {world} ranks")
    shape, names = (world,), ("shard",)
    if inner < world:
        shape, names = (world // inner, inner), ("replicate", "shard")
    options = dict(mesh=init_device_mesh(device.type, shape, mesh_dim_names=names))
    if device.type == "cuda":
        dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options["mp_policy"] = MixedPrecisionPolicy(**dtypes)
        if cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy()
    base, head = policy.hf.model, policy.hf.lm_head
    untied = [base.embed_tokens, head] if head.weight is not base.embed_tokens.weight else []
    for unit in [*base.layers, *untied, policy]:  # tied: both live in the root
        _receive(unit, device)
        fully_shard(unit, **options)
    return policy


def _receive(unit: torch.nn.Module, device: torch.device) -> None:
    """Puts rank 0's values on `device` of every rank, of all in `unit` that is not sharded yet: no
    rank but 0 ever holds more than a unit."""
    made: dict[int, tuple] = {}  # by the id of what stood there (kept, so that ids stay): ties stay
    for module in unit.modules():
        for slots in (module._parameters, module._buffers):
            for name, old in slots.items():
                if old is None or isinstance(old, DTensor):
                    continue
                if id(old) not in made:
                    own = old.detach()
                    whole = torch.empty_like(own, device=device) if old.is_meta else own.to(device)
                    dist.broadcast(whole, src=0)
                    if isinstance(old, torch.nn.Parameter):
                        whole = torch.nn.Parameter(whole, old.requires_grad)
                    made[id(old)] = old, whole
                slots[name] = made[id(old)][1]


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then a cosine down to lr_end * lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def make_optimizer(policy: Policy, *, lr: float, weight_decay: float, betas=(0.9, 0.999)):
    """AdamW whose moments exist from the start: their memory is taken before the first rollout. On
    a GPU it is fused: no copy of the parameters is made in a step. Another takes these
    `weights`, DTensors without the frozen ones of LoRA: SGD can, torch's Adafactor cannot."""
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    fused = torch.cuda.is_available() or None  # with cpu_offload on the host: a third of the time
    options = dict(lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    optimizer = torch.optim.AdamW(weights, **options)
    for weight in weights:
        step = torch.zeros((), device=weight.device)
        moments = dict(exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        optimizer.state[weight] = dict(step=step, **moments)
    return optimizer


# --------------------------------------------------------------------------------------------------
# gradients and weights


def each_microbatch(policy: Policy, microbatches: list) -> Iterator:
    """The micro-batches in turn; HSDP's replicas add up their gradients once, at the last."""
    for i, microbatch in enumerate(microbatches, 1):
        policy.set_requires_all_reduce(i == len(microbatches))
        yield microbatch


def backward(loss: torch.Tensor) -> None:
    """Backward of this rank's share of a loss over all ranks' tokens: FSDP's mean is undone."""
    (loss * dist.get_world_size()).backward()


def clip_gradients(policy: Policy, max_norm: float) -> float:
    """Clips by the global norm over all ranks; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def take_step(policy: Policy, optimizer, loss: float, *, max_norm, dlogp=0.0, max_dlogp=math.inf):
    """An optimizer step; none where the loss (over all ranks) or the gradient is not finite, or the
    mean |dlogp| of sampler and trainer beyond its limit. -> (norm before clipping, why skipped)."""
    norm, skipped = clip_gradients(policy, max_norm), ""
    if not math.isfinite(norm + loss):
        skipped = f"loss {loss}, gradient norm {norm}"
    elif dlogp > max_dlogp:
        skipped = f"sampler and trainer differ: mean |dlogp| {dlogp:.4f} > max_dlogp = {max_dlogp}"
    else:
        optimizer.step()
    optimizer.zero_grad()
    return norm, skipped


def full_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of the model's state dict, a tied lm_head included, adapters merged into
    their weights; all ranks walk it together.
    Each in memory of its own: vLLM keeps references until a fused weight is whole."""
    state = policy.hf.state_dict()
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        pair = [state.get(f"{layer}.{adapter}") for adapter in ADAPTERS]
        if kind == "weight" and pair[0] is not None:
            parts = [_whole(part, part.dtype) for part in (value, *pair)]
            yield name, merged(*parts).to(dtype)
        elif kind not in ADAPTERS:
            yield name, _whole(value, dtype)


def _whole(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = value.detach()
    if not isinstance(value, DTensor):
        return value.to(dtype, copy=True)
    # cast the shard, then gather: half the bytes; on the card, also where shards are on the host
    return value.to(value.device_mesh.device_type, dtype).full_tensor()
