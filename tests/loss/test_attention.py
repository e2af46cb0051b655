"""Each kernel of attention against the dense oracle, how one is chosen and dropped, and how often
compiled blocks compile again.
"""

import math
import random
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import library
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from reagent import attention, run
from reagent.attention import choose_attention, distance, problem, trial
from reagent.policy import Policy, collate, compile_blocks, load_policy, shard
from tests.helpers.tiny import random_rows, tiny_model, tree_of
from tests.loss.test_model import CPU

HEADS = 4, 2, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), heads=4, kv_heads=2)


def policy_of(folder, **options):
    run.init_distributed(60)
    torch.manual_seed(0)
    return load_policy(folder, **dict(checkpoint_activations=False) | options)


def calls_a_row(folder, backend: str | None, **options):
    """A sharded policy whose rows each have an attention call, its blocks compiled by `backend`."""
    policy = policy_of(folder, **options)
    policy.cudnn_from = 0
    if backend:
        compile_blocks(policy, backend)
    return shard(policy, CPU)


def by_hand(q, k, v, lengths):
    """Softmax over the tokens of the same row up to its own, one row and one head at a time."""
    group, out, start = q.shape[1] // k.shape[1], torch.zeros_like(q), 0
    for n in lengths:
        span = slice(start, start + n)
        for head in range(q.shape[1]):
            scores = q[0, head, span] @ k[0, head // group, span].T / q.shape[-1] ** 0.5
            far = torch.ones(n, n, dtype=torch.bool).triu(1)
            out[0, head, span] = (
                scores.masked_fill(far, -math.inf).softmax(-1) @ v[0, head // group, span]
            )
        start += n
    return out.transpose(1, 2)


@pytest.mark.parametrize("kernel", ["torch", "cudnn"])
@pytest.mark.parametrize("lengths", [[7], [5, 5, 1, 12, 5], [33, 2], [512, 515]])
def test_a_kernel_is_attention_within_rows(kernel, lengths):
    torch.manual_seed(0)
    sides, attend = trial(kernel, lengths, HEADS, CPU)
    expected, got = by_hand(*sides, lengths), attend()
    assert torch.allclose(got, expected, atol=1e-5)
    towards = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(x, sides, towards) for x in (got, expected))):
        assert torch.allclose(a, b, atol=1e-5)


def as_the_kernel_computes(q, k, v, ends, key_ends, longest, most_keys, *, scale, window_size, **_):
    """In place of torch's varlen kernel, which has no CPU, by its contract: no row has more queries
    or keys than it was told, and a window counts the tokens before a query, and behind it.
    """
    out = torch.full_like(q, math.nan)
    rows = zip(*(pairwise(each.tolist()) for each in (ends, key_ends)))
    for (a, b), (c, d) in rows:
        n, m = min(b - a, longest), min(d - c, most_keys)
        places = torch.arange(m) - (torch.arange(n)[:, None] + m - n)  # from each query's own
        near = (places >= -window_size[0]) if window_size[0] >= 0 else places <= 0
        mask = near & (places <= window_size[1])
        parts = [x.transpose(0, 1) for x in (q[a : a + n], k[c : c + m], v[c : c + m])]
        o = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
        out[a : a + n] = o.transpose(0, 1)
    return out


TREE = [3, 9, 2, 4], [slice(0, 0), slice(0, 0), slice(3, 9), slice(15, 15)]


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("lengths, prefixes", [([3, 9, 1, 4], ()), TREE], ids=["rows", "tree"])
def test_a_gpu_is_told_rows_prefixes_and_windows_as_a_cpu_computes_them(
    lengths, prefixes, window, monkeypatch
):
    monkeypatch.setattr(attention, "varlen_attn", as_the_kernel_computes)
    torch.manual_seed(0)
    sides, told = trial("torch", lengths, HEADS, CPU)[0], attention.row_ends(lengths, CPU, prefixes)
    found = []
    for devices in (("cuda",), ("cpu",)):
        monkeypatch.setattr(attention, "DEVICES", devices)
        options = dict(kernel="torch", sliding_window=window, scaling=0.3)
        found.append(attention.varlen_attention(torch.nn.Module(), *sides, None, **options, **told))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)


def test_cudnn_is_asked_for_few_lengths(monkeypatch):
    """torch keeps the plan that cuDNN makes for a length as long as the process lives: with one a
    row of a run, steps are slow and the host's memory fills."""
    ragged, seen, aten = [3, 70, 411, 512, 700, 1024], set(), attention.aten

    def kernel(q, *more, **options):
        seen.add(q.shape[2])
        return aten._scaled_dot_product_flash_attention_for_cpu(q, *more, **options)

    def backward(grad, q, *more, **options):
        seen.add(q.shape[2])
        work = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return work(grad, q, *more, **options)

    spy = types.SimpleNamespace(_scaled_dot_product_flash_attention_for_cpu=kernel)
    spy._scaled_dot_product_flash_attention_for_cpu_backward = backward
    monkeypatch.setattr(attention, "aten", spy)
    sides, attend = trial("cudnn", ragged, HEADS, CPU)
    torch.autograd.grad(attend().sum(), sides)
    assert seen == {512, 1024}


def test_the_operation_of_a_call_a_row_is_what_it_says_it_is():
    """Its fake kernels, which a compiler believes, against its real ones."""
    (q, k, v), _ = trial("cudnn", [5, 9], HEADS, CPU)
    sides = [x[0].transpose(0, 1).detach().requires_grad_() for x in (q, k, v)]
    ends = torch.tensor([0, 5, 14], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(attention.row_attention, (*sides, ends, 0.25), test_utils=checks)


def test_the_check_at_start_knows_attention_from_what_is_none():
    for kernel in ("torch", "cudnn"):
        assert distance(kernel, HEADS, CPU) < 1e-5 and not problem(kernel, HEADS, CPU)


def test_the_check_at_start_knows_a_kernel_that_is_causal_from_the_top_left(monkeypatch):
    """Where a row of a tree has more keys than queries: they would not see what is before them."""

    def top_left(query, key, value, lengths, *, window, scale):
        parts = [query.split([n for n, _ in lengths], 1)]
        parts += [x.split([n for _, n in lengths], 1) for x in (key, value)]
        options = dict(is_causal=True, enable_gqa=True)
        rows = [F.scaled_dot_product_attention(*row, **options) for row in zip(*parts)]
        return torch.cat(rows, 1).transpose(0, 1)

    monkeypatch.setattr(attention, "run_attention", top_left)
    assert "from dense fp32" in problem("torch", HEADS, CPU)


def no_mask(q, k, v, host_ends, scale):
    out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), enable_gqa=True)
    return (out.transpose(0, 1),)


def broken_backward(q, k, v, host_ends, scale):
    out = attention.row_attention.planted(q, k, v, host_ends, scale)[0]
    return (out + 0.5 * (q - q.detach()),)


def not_built(*_):
    raise NotImplementedError("no kernel image\nis available")


def not_a_number(q, k, v, host_ends, scale):
    return ((q + k.sum() + v.sum()) * math.nan,)


@pytest.mark.parametrize(
    "plant, told",
    [
        (no_mask, r"it is [\d.]+ from dense fp32, more than 0.02"),
        (broken_backward, r"it is [\d.]+ from dense fp32, more than 0.02"),
        (not_built, r"it fails here \(NotImplementedError: no kernel image\)"),
        (not_a_number, "it is nan from dense fp32"),
    ],
    ids=["no-mask", "backward", "not-built", "nan"],
)
def test_a_kernel_that_is_wrong_is_dropped_with_a_sentence(plant, told, monkeypatch, capsys):
    broken_backward.planted = attention.row_attention
    monkeypatch.setattr(attention, "row_attention", plant)
    assert choose_attention("cudnn", HEADS, CPU) == math.inf
    printed = capsys.readouterr().out
    assert re.search("attention: cudnn is dropped for torch's: " + told, printed), printed


def test_a_sound_kernel_is_taken(capsys):
    assert choose_attention("cudnn", HEADS, CPU) == 0
    assert capsys.readouterr().out == "attention: cudnn is taken\n"


def test_on_a_cpu_auto_is_torchs_and_flash_says_what_it_lacks(capsys):
    assert choose_attention("auto", HEADS, CPU) == choose_attention("torch", HEADS, CPU) == math.inf
    assert not capsys.readouterr().out
    assert choose_attention("flash", HEADS, CPU) == math.inf
    assert "flash is dropped for torch's: it fails here (RuntimeError: there is no GPU)" in (
        capsys.readouterr().out
    )
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.parametrize(
    "torchs, flash, cudnn, taken, cudnn_from",
    [
        ((4, 9), (3, 5), 6, {"flash"}, math.inf),
        ((4, 9), (3, 7), 6, {"flash", "cudnn"}, 8192),
        ((4, 9), (5, 9), 6, {"cudnn"}, 8192),
        ((4, 9), (5, 9), 10, set(), math.inf),
    ],
)
def test_auto_takes_what_was_faster(torchs, flash, cudnn, taken, cudnn_from, monkeypatch, capsys):
    flash_is_on = []
    monkeypatch.setattr(attention, "use_flash", lambda: flash_is_on.append(1))
    monkeypatch.setattr(attention, "leave_flash", flash_is_on.clear)
    monkeypatch.setattr(attention, "distance", lambda *_: 0.0)

    def seconds(kernel, lengths, *_):
        long = len(lengths) == 1
        return (cudnn if kernel == "cudnn" else (flash if flash_is_on else torchs)[long]) / 1e3

    monkeypatch.setattr(attention, "seconds", seconds)
    assert choose_attention("auto", HEADS, torch.device("cuda")) == cudnn_from
    printed = capsys.readouterr().out
    assert {name for name in ("flash", "cudnn") if f"{name} is taken" in printed} == taken
    assert bool(flash_is_on) == ("flash" in taken)
    if "flash" not in taken:
        assert "flash is dropped for torch's: 14.00 ms against 13.00" in printed


@pytest.mark.parametrize("asked", ["auto", "torch", "flash", "cudnn"])
def test_a_card_that_torchs_kernel_is_not_built_for_is_told_at_the_start(asked, monkeypatch):
    """Before Ampere, or with heads of a width that FlashAttention has not."""

    def distance(kernel, *_):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(attention, "distance", distance)
    told = (
        r"attention: torch's kernel, .* it fails here \(RuntimeError: FlashAttention only supports"
    )
    with pytest.raises(SystemExit, match=told):
        choose_attention(asked, HEADS, torch.device("cuda"))


def test_torchs_kernel_asked_for_is_taken_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(attention, "distance", lambda *_: 0.03)  # of a GPU with rough numbers
    monkeypatch.setattr(attention, "seconds", lambda *_: 0.0)
    assert choose_attention("torch", HEADS, torch.device("cuda")) == math.inf
    assert not capsys.readouterr().out


def test_a_kernel_that_fails_in_a_long_row_alone_is_dropped_with_a_sentence(monkeypatch, capsys):
    def seconds(kernel, lengths, *_):
        if kernel == "cudnn" and len(lengths) == 1:
            raise RuntimeError("No valid execution plans built.")
        return 0.0

    monkeypatch.setattr(attention, "distance", lambda *_: 0.0)
    monkeypatch.setattr(attention, "seconds", seconds)
    assert choose_attention("cudnn", HEADS, torch.device("cuda")) == math.inf
    told = (
        "cudnn is dropped for torch's: it fails here (RuntimeError: No valid execution plans built"
    )
    assert told in capsys.readouterr().out


def test_kernels_are_tried_on_numbers_that_lie_as_a_block_has_them():
    """In memory a token after the other; cuDNN's plan of a backward goes by that of queries, not by
    that of the gradient: both must be as in training."""
    sides, attend = trial("torch", [5, 9], HEADS, CPU)
    assert all(side.transpose(1, 2).is_contiguous() for side in sides)
    assert attend().is_contiguous()


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_that_time_kernels_differently_take_the_same(fails, monkeypatch):
    """Alone rank 0 would take FlashAttention-4, rank 1 torch's and cuDNN's."""
    monkeypatch.setattr(attention, "use_flash", lambda: setattr(here, "flash", True))
    monkeypatch.setattr(attention, "leave_flash", lambda: setattr(here, "flash", False))
    here, meeting, shared = threading.local(), threading.Barrier(2, timeout=20), [None, None]

    def distance(kernel, *_):
        if fails and here.rank and here.flash:
            raise RuntimeError("no kernel image")
        return 0.0

    def seconds(kernel, *_):
        flash, torchs, cudnn = (1, 5, 3) if here.rank == 0 else (9, 5, 4)
        return cudnn if kernel == "cudnn" else flash if here.flash else torchs

    def all_gather_object(found, own):
        shared[here.rank] = own
        meeting.wait()
        found[:] = shared
        meeting.wait()

    def rank(number):
        here.rank, here.flash = number, False
        return choose_attention("auto", HEADS, torch.device("cuda")), here.flash

    fake = dict(is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: here.rank)
    fake |= dict(all_gather_object=all_gather_object)
    monkeypatch.setattr(attention, "dist", types.SimpleNamespace(**fake))
    monkeypatch.setattr(attention, "seconds", seconds)
    monkeypatch.setattr(attention, "distance", distance)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == [(8192, False)] * 2


def test_flash_attn_4_answers_as_torch_expects(monkeypatch):
    """torch 2.13 takes two values of its forward and three of its backward; it gives five."""
    cute = types.SimpleNamespace(
        _flash_attn_fwd=lambda *a, **o: (1, 2, None, None, None),
        _flash_attn_bwd=lambda *a, **o: (1, 2, 3, 4),
    )
    package = types.ModuleType("flash_attn.cute")
    package.interface = cute
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    assert attention._flash_attn_fwd() == (1, 2) and attention._flash_attn_bwd() == (1, 2, 3)


# --------------------------------------------------------------------------------------------------
# compiled blocks


def batches(count, seed=0):
    """Ragged ones of one to six rows, a single row among them early and late."""
    rng = random.Random(seed)
    counts = [3, 1] + [rng.randint(1, 6) for _ in range(count - 3)] + [1]
    return [
        collate(random_rows([rng.randint(3, 40) for _ in range(n)], i), (), CPU)
        for i, n in enumerate(counts)
    ]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def stand_in(q, k, v, ends, _, longest, __, scale, window_size, enable_gqa):
    """In place of torch's varlen kernel, which has no CPU: its integer is used as one."""
    out = attention.row_attention(q, k, v, ends, scale)[0]
    return out + 0 * torch.full((), longest, dtype=torch.long)


@pytest.mark.parametrize("kernel", ["torch", "cudnn"])
@pytest.mark.parametrize("again, lora_rank", [(False, 0), (True, 2)], ids=["kept", "again-lora"])
def test_twenty_ragged_batches_do_not_compile_twenty_times(
    folder, dynamo, kernel, again, lora_rank, monkeypatch
):
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "DEVICES", ("cpu",))
    policy = policy_of(folder, checkpoint_activations=again, lora_rank=lora_rank)
    policy.cudnn_from = 0 if kernel == "cudnn" else math.inf
    compile_blocks(policy, backend="eager")
    policy = shard(policy, CPU)
    for batch in batches(20):
        policy(batch)[0].sum().backward()
    most = 3 if lora_rank else 2  # below the first block of a frozen base nothing has a gradient
    assert 1 <= dynamo["unique_graphs"] <= most, dict(dynamo)
    assert not counters["graph_break"], dict(counters["graph_break"])


def test_the_thread_of_backward_may_compile_as_often_as_the_main_one(folder, dynamo):
    """torch's config is a thread's own since 2.13: on a GPU, where backward has a thread and blocks
    are computed again in it, it would go on without what is compiled after eight graphs."""
    policy, batch, before = calls_a_row(folder, "eager"), batches(3)[0], torch.get_num_threads()

    def compute():
        for threads in range(1, 13):  # what a graph is compiled for, among much else
            torch.set_num_threads(threads)
            policy(batch)
        torch.set_num_threads(before)

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert dynamo["unique_graphs"] == 12


def test_trees_do_not_compile_again_and_leave_cudnn_to_plain_rows(
    folder,
    dynamo,
    monkeypatch,
):
    """Keys beyond a row's queries are more than a call a row can take: torch's kernel does."""
    rng, policy = random.Random(0), policy_of(folder)
    monkeypatch.setattr(attention, "varlen_attn", with_integers)
    monkeypatch.setattr(attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(attention, "row_attention", None)
    policy.cudnn_from = 0
    compile_blocks(policy, backend="eager")
    for _ in range(20):
        groups = [[rng.randint(1, 9) for _ in range(rng.randint(2, 8))] for _ in range(3)]
        trees = [tree_of(rng.randint(1, 30), group, rng) for group in groups[: rng.randint(1, 3)]]
        policy(collate(trees, (), CPU))[0].sum().backward()
    assert 1 <= dynamo["unique_graphs"] <= 2, dict(dynamo)
    assert not counters["graph_break"], dict(counters["graph_break"])


def with_integers(q, k, v, ends, key_ends, longest, _, *more, **options):
    """In place of torch's varlen kernel: what it is given is used, nothing is attention."""
    return q + 0 * (k.sum() + v.sum() + key_ends.sum() + ends.sum() + longest)


def test_compiled_blocks_have_the_gradient_of_plain_ones(folder, dynamo):
    found = []
    for backend in (None, "aot_eager"):
        policy, logps = calls_a_row(folder, backend), []
        for batch in batches(4):
            logps.append(policy(batch)[0])
            (logps[-1] * torch.linspace(-1, 1, len(logps[-1]))).sum().backward()
        gradients = {n: p.grad.full_tensor() for n, p in policy.named_parameters()}
        found.append((torch.cat(logps), gradients))
    (a, grads_a), (b, grads_b) = found
    assert dynamo["unique_graphs"] >= 1 and torch.allclose(a, b, atol=1e-5)
    assert all(torch.allclose(grads_a[name], grads_b[name], atol=1e-4) for name in grads_a)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_kept_outputs_of_attention_are_not_computed_again(folder, dynamo, backend, monkeypatch):
    """Of two blocks: two forwards in place of four, and the same gradient to the bit."""
    found, outputs, calls = [], attention._outputs, []
    monkeypatch.setattr(attention, "_outputs", lambda *args: calls.append(1) or outputs(*args))
    for keeps in (False, True):
        policy = calls_a_row(folder, backend, checkpoint_activations=True, keep_attention=keeps)
        for batch in batches(3):
            calls.clear()
            policy(batch)[0].sum().backward()
            assert len(calls) == (2 if keeps else 4)
        found.append([p.grad.full_tensor() for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert bool(backend) == bool(dynamo["unique_graphs"]) and dynamo["unique_graphs"] <= 4


def test_what_is_kept_is_what_a_gpu_calls():
    names = ["reagent.row_attention.default", "torch_attn._varlen_attn.default"]
    assert list(map(str, attention.KEPT)) == names


def test_code_that_is_kept_between_runs_knows_how_our_operation_is_declared(folder, monkeypatch):
    """The cache of inductor goes by the graph: it would call what another version declared."""
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    compile_blocks(policy_of(folder), backend="eager")
    assert "row_attention_backward(Tensor grad" in torch.compiler.config.cache_key_tag


@pytest.mark.slow
def test_inductor_calls_the_operation_of_a_call_a_row(folder, dynamo, monkeypatch, tmp_path):
    """As on a GPU, with the cache of nobody: gradients of plain and of compiled blocks, and where
    attention's outputs are kept."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for backend, keeps in ((None, False), ("inductor", False), ("inductor", True)):
        policy = calls_a_row(folder, backend, checkpoint_activations=True, keep_attention=keeps)
        for batch in batches(3):
            policy(batch)[0].sum().backward()
        found.append([p.grad.full_tensor() for p in policy.parameters()])
    assert dynamo["unique_graphs"] >= 1
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found[0], other))


# --------------------------------------------------------------------------------------------------
# what only a GPU calls, on the meta device


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The meta device takes the branches of a GPU: arguments, shapes and types are checked as the
    installed torch declares them, and nothing is computed."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.is_meta), raising=False)
    monkeypatch.setattr(attention, "DEVICES", ("meta",))
    monkeypatch.setattr("reagent.policy._compiled", lambda function: function)
    monkeypatch.setattr("reagent.policy.HEAD_CHUNK", {"meta": 7})


@pytest.mark.parametrize("kernel", ["torch", "cudnn"])
@pytest.mark.parametrize("kind", ["rows", "trees"])
def test_what_a_gpu_calls_is_what_the_installed_torch_has(folder, kernel, kind, as_on_a_gpu):
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        options = dict(attn_implementation="varlen", dtype=torch.bfloat16)
        hf = AutoModelForCausalLM.from_config(config, **options)
    policy, rng = Policy(hf).train(), random.Random(0)
    policy.cudnn_from = 0 if kernel == "cudnn" else math.inf
    trees = [tree_of(5, [3, 2], rng), tree_of(7, [1, 2], rng)]
    rows = trees if kind == "trees" else random_rows([9, 14])
    logps, entropy = policy(collate(rows, (), torch.device("meta")))
    trained = sum(sum(row.mask) for row in rows)
    assert logps.shape == entropy.shape == (trained,) and logps.dtype == torch.float32
    logps.sum().backward()
    for parameter in policy.parameters():
        assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == torch.bfloat16


def test_a_row_of_cudnn_has_the_shapes_that_its_fake_promises(as_on_a_gpu):
    options = dict(device="meta", dtype=torch.bfloat16)
    q, k = torch.empty(12, 4, 64, **options), torch.empty(12, 2, 64, **options)
    ends = torch.tensor([0, 5, 12])
    work, back = attention.row_attention._init_fn, attention.row_attention_backward._init_fn
    out, lse = work(q, k, k, ends, 0.25)
    assert (out.shape, out.dtype) == (q.shape, q.dtype) and lse.shape == (4, 12)
    grads = back(out, [q, k, k, ends, out, lse], 0.25)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, k)]
