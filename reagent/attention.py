"""Causal attention within the rows of a packed sequence, and which kernel computes it.

    torch   torch's varlen kernel on a GPU, in whose place flash-attn-4's is where it was activated;
            on a CPU one SDPA call for each run of rows of equal length
    cudnn   one call of SDPA's cuDNN kernel a row, for long rows; on a CPU of SDPA's own

Letters in shapes: T tokens of all rows, D width of a head. Into a compiled block go tensors, one
integer and the kernel's name, so that no batch makes it compile again.
"""

import functools
import math
import time
from itertools import groupby, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn import attention as flash
from torch.nn.attention._fa4 import register_flash_attention_fa4
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

LONG = 8192  # tokens a row, on average, from which auto takes cuDNN: its calls are one a row
ROUND = 512  # a length of cuDNN is a multiple: torch keeps a plan a length for good, and makes each
LIMIT = 0.02  # relative distance from dense fp32 that bf16 may have
RAGGED, SHORT_ROWS, LONG_ROW = [70, 2, 300, 47, 300], [512] * 32, [16_384]
BEFORE = [slice(0), slice(70), slice(40), slice(0), slice(40)]  # what RAGGED reads as a tree
DEVICES = ("cuda",)  # that torch's varlen kernel is built for
LACKING = {"softcap": "a softcap", "s_aux": "sinks"}
aten = torch.ops.aten
Two, Three = tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]


def varlen_attention(
    module, query, key, value, _, *, kernel, ends, scaling=None, sliding_window=None, **more
):
    """Causal attention within each row, over the last `sliding_window` tokens if given; query
    (1, heads, T, D) -> (1, T, heads, D). ends and more: see row_ends. What no kernel has (a
    softcap, sinks) is a ValueError."""
    for name, what in LACKING.items():
        if more.get(name) is not None:
            raise ValueError(f"its attention has {what}")
    if not getattr(module, "is_causal", True):
        raise ValueError("its attention is not causal")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    scale, read = scaling or q.shape[-1] ** -0.5, more.get("read")
    if read is not None:  # (keys, heads, D): those of a prefix stand before each of its rows
        k, v = k[read], v[read]
    if kernel == "cudnn" and not sliding_window:
        out = row_attention(q, k, v, more["host_ends"], scale)[0]
    elif q.device.type in DEVICES:
        longest, window = more["longest"], (sliding_window - 1 if sliding_window else -1, 0)
        options = dict(scale=scale, window_size=window, enable_gqa=True)
        out = varlen_attn(q, k, v, ends, more.get("key_ends", ends), longest, longest, **options)
    else:
        both = (more["host_ends"], more.get("host_key_ends", more["host_ends"]))
        lengths = list(zip(*(each.diff().tolist() for each in both)))
        parts = [x.transpose(0, 1) for x in (q, k, v)]
        out = run_attention(*parts, lengths, window=sliding_window, scale=scale)
    return out[None], None


AttentionInterface.register("varlen", varlen_attention)


def row_ends(lengths: list[int], device: torch.device, prefixes: list[slice] | tuple = ()) -> dict:
    """What attention must know of a batch: where rows begin and end in T (rows + 1,), on the device
    and on the CPU, and the tokens of the longest. prefixes: what of T each row reads before its
    own; then `read` holds the places in T of all rows' keys, which end at `key_ends`."""
    host_ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ends = host_ends.to(device, non_blocking=True)
    found = dict(ends=ends, host_ends=host_ends, longest=max(lengths))
    if prefixes:
        places = torch.arange(sum(lengths))
        rows = [torch.cat((places[p], own)) for p, own in zip(prefixes, places.split(lengths))]
        keys = row_ends(list(map(len, rows)), device)
        found |= dict(read=torch.cat(rows).to(device, non_blocking=True), longest=keys["longest"])
        found |= dict(key_ends=keys["ends"], host_key_ends=keys["host_ends"])
    return found


def run_attention(query, key, value, lengths: list[tuple], *, window: int | None, scale: float):
    """query (heads, T, D) -> (T, heads, D), lengths: queries and keys of each row, causal from the
    bottom right; a dense block mask would cost T^2."""
    runs = [(len(list(run)), *row) for row, run in groupby(lengths)]
    # split, not slices: the backward of a slice fills a tensor of all T with zeros
    parts = [query.split([n * queries for n, queries, _ in runs], dim=1)]
    parts += [x.split([n * keys for n, _, keys in runs], dim=1) for x in (key, value)]
    out = []
    for (n, queries, keys), *qkv in zip(runs, *parts):
        # (heads, n * L, D) -> (n, heads, L, D)
        q, k, v = (x.unflatten(1, (n, -1)).transpose(0, 1) for x in qkv)
        mask = dict(is_causal=True)
        if keys > min(queries, window or keys):
            near = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            mask = dict(attn_mask=near.triu(keys - queries + 1 - (window or keys)))
        o = F.scaled_dot_product_attention(q, k, v, **mask, scale=scale, enable_gqa=True)
        out.append(o.transpose(1, 2).flatten(0, 1))  # (n * L, heads, D)
    return torch.cat(out)


# --------------------------------------------------------------------------------------------------
# a call a row, as one operation: torch.compile does not look into it


@library.custom_op("reagent::row_attention", mutates_args=())
def row_attention(q: Tensor, k: Tensor, v: Tensor, host_ends: Tensor, scale: float) -> Two:
    """q, k, v (T, heads, D) -> out (T, heads, D) and the log of the softmax's sum (heads, T)."""
    out, lse = _outputs(q, k, v)
    for a, b in pairwise(host_ends.tolist()):
        parts = [_row(x[a:b], q.shape[1]) for x in (q, k, v)]
        options = dict(is_causal=True, scale=scale)
        if q.is_cuda:
            found = aten._scaled_dot_product_cudnn_attention(*parts, None, True, **options)
        else:
            found = aten._scaled_dot_product_flash_attention_for_cpu(*parts, **options)
        out[a:b] = found[0][0, :, : b - a].transpose(0, 1)
        lse[:, a:b] = found[1][0, :, : b - a].flatten(1)
    return out, lse


@library.custom_op("reagent::row_attention_backward", mutates_args=())
def row_attention_backward(grad: Tensor, saved: list[Tensor], scale: float) -> Three:
    """saved: q, k, v, host_ends, out and the log of the softmax's sum."""
    q, k, v, host_ends, out, lse = saved
    heads, keys = q.shape[1], k.shape[1]
    grads = [x.new_empty(len(x), heads, x.shape[2]) for x in (q, k, v)]
    for a, b in pairwise(host_ends.tolist()):
        parts = [_row(x[a:b], heads) for x in (grad, q, k, v, out)]
        length = parts[0].shape[2]
        part = F.pad(lse[None, :, a:b], (0, length - b + a))
        if q.is_cuda:
            none = torch.zeros((), dtype=torch.long, device=q.device)  # of a dropout's generator
            more = (part[..., None], none, none, None, None, None, length, length, 0.0, True)
            found = aten._scaled_dot_product_cudnn_attention_backward(*parts, *more, scale=scale)
        else:
            work = aten._scaled_dot_product_flash_attention_for_cpu_backward
            found = work(*parts, part, 0.0, True, scale=scale)
        for whole, row in zip(grads, found):
            whole[a:b] = row[0, :, : b - a].transpose(0, 1)
    return grads[0], *(x.unflatten(1, (keys, -1)).sum(2) for x in grads[1:])


def _row(x: Tensor, heads: int) -> Tensor:
    """A row (n, some heads, D) -> (1, heads, L, D): heads repeated, zeros behind."""
    x = x[:, :, None].expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2)
    rest = -len(x) % ROUND
    return (F.pad(x, (0, 0, 0, 0, 0, rest)) if rest else x).transpose(0, 1)[None]


def _outputs(q, k, v, *_):
    # shape[0], not len(): a compiler would take that for a constant
    out = v.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, grad, _):
    return *row_attention_backward(grad, list(ctx.saved_tensors), ctx.scale), None, None


row_attention.register_fake(_outputs)
row_attention_backward.register_fake(
    lambda grad, saved, _: tuple(x.new_empty(x.shape) for x in saved[:3])
)
row_attention.register_autograd(_gradients, setup_context=_keep)


# what a GPU's attention calls: their outputs can be kept where the rest is computed again
KEPT = [torch.ops.reagent.row_attention.default, torch.ops.torch_attn._varlen_attn.default]

# --------------------------------------------------------------------------------------------------
# which kernel


def _cute(name: str, values: int):
    """A kernel of flash-attn-4, which returns more values than torch 2.13 takes."""

    def call(*args, **options):
        from flash_attn.cute import interface

        return getattr(interface, name)(*args, **options)[:values]

    return call


# the names that torch looks for in the module of its FlashAttention-4
_flash_attn_fwd, _flash_attn_bwd = _cute("_flash_attn_fwd", 2), _cute("_flash_attn_bwd", 3)


def use_flash() -> None:
    """From here on torch's varlen kernel is FlashAttention-4 (Hopper and newer), in all threads."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU")
    own = functools.partial(register_flash_attention_fa4, __name__)
    flash.register_flash_attention_impl("FA4", register_fn=own)
    flash.activate_flash_attention_impl("FA4")


def leave_flash() -> None:
    flash.restore_flash_attention_impl(_raise_warn=False)


def choose_attention(asked: str, heads: tuple[int, int, int], device: torch.device) -> float:
    """Tokens a row, on average, from which cuDNN computes (inf: never); FlashAttention-4 is on
    where it is taken. heads: of queries, of keys, their width. asked: see PolicyConfig. A kernel
    that fails or differs from dense fp32 is dropped, with a sentence; without torch's own no run
    starts on a GPU. What fails on one rank is dropped by all, and the slowest one's time counts."""
    timed, dropped = asked == "auto", {}
    if device.type == "cpu" and asked in ("auto", "torch"):
        return math.inf

    def clock(kernel: str) -> list[float]:
        own = [seconds(kernel, n, heads, device) for n in (SHORT_ROWS, LONG_ROW) if timed]
        return [max(each) for each in zip(*of_all_ranks(own))]

    def fault(kernel: str) -> str:
        return next(filter(None, of_all_ranks(problem(kernel, heads, device))), "")

    if device.type == "cuda" and (why := fault("torch")).startswith("it fails"):
        raise SystemExit(f"attention: torch's kernel, which trees and short rows need: {why}")
    best = clock("torch")
    if asked in ("auto", "flash"):
        dropped["flash"] = fault("flash") or _slower(own := clock("torch"), best)
        if dropped["flash"]:
            leave_flash()
        else:
            best = own
    if asked in ("auto", "cudnn"):
        dropped["cudnn"] = fault("cudnn") or _slower(clock("cudnn")[1:], best[1:])
    for name, why in dropped.items():
        if not dist.is_initialized() or dist.get_rank() == 0:
            what = f"dropped for torch's: {why}" if why else "taken"
            print(f"attention: {name} is {what}", flush=True)
    return math.inf if dropped.get("cudnn", "no") else LONG if timed else 0


def of_all_ranks(own) -> list:
    found = [own] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(found) > 1:
        dist.all_gather_object(found, own)
    return found


def _slower(own: list[float], other: list[float]) -> str:
    own, other = sum(own), sum(other)
    return f"{1e3 * own:.2f} ms against {1e3 * other:.2f}" if own > other else ""


def problem(name: str, heads: tuple[int, int, int], device: torch.device) -> str:
    """Why a kernel cannot be taken, or "": it is tried on a small ragged batch with trees."""
    kernel = "torch" if name == "flash" else name
    try:
        if name == "flash":
            use_flash()
        far = distance(kernel, heads, device)
        if device.type == "cuda":  # what fails in a long row alone is told here
            seconds(kernel, LONG_ROW, heads, device)
    except Exception as error:  # foreign kernels fail in any way
        text = str(error).strip().splitlines() or [""]
        return f"it fails here ({type(error).__name__}: {text[0]})"
    return "" if far <= LIMIT else f"it is {far:.2g} from dense fp32, more than {LIMIT}"


def distance(kernel: str, heads: tuple[int, int, int], device: torch.device) -> float:
    """The largest relative distance of outputs and gradients from dense attention in fp32."""
    prefixes = [] if kernel == "cudnn" else BEFORE  # it is asked for no trees
    sides, attend = trial(kernel, RAGGED, heads, device, prefixes)
    row = torch.repeat_interleave(torch.arange(len(RAGGED)), torch.tensor(RAGGED)).to(device)
    mask = (row[:, None] == row[None]).tril()
    for i, prefix in enumerate(prefixes):
        mask[row == i, prefix] = True
    dense = [side.detach().float().requires_grad_() for side in sides]
    expected = F.scaled_dot_product_attention(*dense, attn_mask=mask, enable_gqa=True)
    expected, got = expected.transpose(1, 2), attend()
    towards = torch.randn(expected.shape, device=device)
    expected = [expected, *torch.autograd.grad(expected, dense, towards)]
    got = [got, *torch.autograd.grad(got, sides, towards.to(got.dtype))]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, expected))


def seconds(kernel: str, lengths: list[int], heads, device: torch.device) -> float:
    """Of a forward and a backward on a GPU, the best of three after one."""
    sides, attend = trial(kernel, lengths, heads, device)
    found = []
    for _ in range(4):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.autograd.grad(out := attend(), sides, out.detach())
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])


def trial(kernel: str, lengths: list[int], heads, device: torch.device, prefixes=()):
    """Random sides (1, heads, T, D), T outermost in memory as in a block, and what attends."""
    (q, k, width), total = heads, sum(lengths)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    options = dict(device=device, dtype=dtype, requires_grad=True)
    sides = [torch.randn(1, total, n, width, **options).transpose(1, 2) for n in (q, k, k)]
    more = dict(kernel=kernel, **row_ends(lengths, device, prefixes))
    return sides, lambda: varlen_attention(torch.nn.Module(), *sides, None, **more)[0]
