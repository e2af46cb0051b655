"""The training step on a GPU: the rows of a table that was measured on one H200 before, again, and
those that came since. `bench.py --device=cuda` prints it, `--device=dry` runs the same steps on a
CPU with tiny shapes.
"""

import contextlib
import dataclasses
import gc
import io
import math
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

import grpo_unified
import sft
from reagent import policy as policies
from reagent.attention import choose_attention, leave_flash
from reagent.lora import add_lora
from reagent.policy import Policy, PolicyConfig, balance, compile_blocks, make_optimizer, shard
from tests.bench.bench import forward_flops
from tests.gpu.checks import ROOT, Alone, sequences_of, shape_of

BEFORE = "one NVIDIA H200, torch 2.11.0+cu130, commit 5a89d1f, 2026-11-26"
PEAK_FLOPS = 989e12  # bf16 of an H100 or H200, dense
EIGHT_B = dict(hidden_size=4096, intermediate_size=12_288, num_attention_heads=32)
LIMIT = float(os.environ.get("BENCH_SECONDS", 540))  # no row is begun that may end after it
QUIET = 180.0  # seconds of a row: the first compiles everything


@dataclass(frozen=True)
class Case:
    """A step over `rows` of `length` tokens, all in the loss, in micro-batches of 16,384 (or one
    row). before: (tokens/s, peak GB) of the same settings at BEFORE."""

    name: str
    length: int
    before: tuple[int, float] | None = None
    what: str = "rl"
    rows: int = 0  # 0: as many as 65,536 tokens hold
    compiled: bool = True
    attention: str = "auto"
    chunk: int = 2048
    again: bool = False
    lora_rank: int = 0
    eight_b: bool = False  # four layers of Qwen3-8B, else Qwen3-0.6B


OLD = dict(compiled=False, attention="torch", chunk=256)
COMPILED = OLD | dict(compiled=True)
CUDNN = dict(attention="cudnn")
CASES = [  # most important first
    Case("RL, rows of 16,384, now", 16_384),
    Case("RL, rows of 512, now", 512),
    Case("SFT, rows of 512, now", 512, what="sft"),
    Case("RL, rows of 16,384, as it was", 16_384, (21_460, 44.2), **OLD),
    Case("RL, rows of 512, as it was", 512, (36_588, 44.2), **OLD),
    Case("RL, rows of 16,384, flash", 16_384, attention="flash"),
    Case("RL, rows of 512, flash", 512, attention="flash"),
    Case("RL, rows of 16,384, recomputed, now", 16_384, again=True),
    Case("RL, rows of 16,384, LoRA of rank 32", 16_384, lora_rank=32),
    Case("four layers of 8B, RL, rows of 15,000", 15_000, rows=4, eight_b=True),
    Case("the same, recomputed", 15_000, rows=4, eight_b=True, again=True),
    Case("RL, rows of 16,384, compiled", 16_384, (27_272, 32.0), **COMPILED),
    Case("the same, cuDNN", 16_384, (38_945, 36.5), **COMPILED | CUDNN),
    Case("RL, rows of 512, compiled", 512, (65_273, 34.6), **COMPILED),
    Case("the same, chunks of 2,048", 512, (65_981, 34.6), **COMPILED | dict(chunk=2048)),
    Case("RL, rows of 512, chunks of 2,048", 512, (40_822, 46.8), **OLD | dict(chunk=2048)),
    Case("SFT, rows of 512, as it was", 512, (37_078, 44.2), what="sft", **OLD),
    Case("RL, rows of 16,384, recomputed, as it was", 16_384, (17_431, 12.7), again=True, **OLD),
    Case("RL, rows of 16,384, cuDNN, as it was", 16_384, (26_169, 48.0), **OLD | CUDNN),
]


def small(case: Case) -> Case:
    """The same settings for a CPU: rows of a hundredth, two of them."""
    return dataclasses.replace(case, length=max(case.length // 100, 16), rows=2)


def config_of(case: Case, dry: bool):
    eight = dict(EIGHT_B, num_hidden_layers=4) if case.eight_b and not dry else {}
    config = shape_of(dry, **eight)
    config.tie_word_embeddings = not case.eight_b
    return config


def stepper(case: Case, config, run):
    """-> (a function that makes one step, its rows, the kernel that was dropped or "")."""
    torch.manual_seed(0)
    with torch.device(run.device):
        options = dict(attn_implementation="varlen", dtype=torch.float32)
        hf = AutoModelForCausalLM.from_config(config, **options)
    if case.lora_rank:
        if run.device.type == "cuda":
            for weight in hf.parameters():
                weight.data = weight.data.bfloat16()
        add_lora(hf, case.lora_rank)
    if case.again:
        hf.gradient_checkpointing_enable(dict(use_reentrant=False))
    policy = Policy(hf).train()
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    with contextlib.redirect_stdout(io.StringIO()) as told:  # it would stand in the table
        policy.cudnn_from = choose_attention(case.attention, heads, run.device)
    print(told.getvalue(), end="", file=sys.stderr, flush=True)
    dropped = case.attention if f"{case.attention} is dropped" in told.getvalue() else ""
    if case.compiled:
        compile_blocks(policy, "inductor" if run.device.type == "cuda" else "eager")
    policy = shard(policy, run.device)
    optimizer = make_optimizer(policy, lr=1e-6, weight_decay=0.01)
    rows = sequences_of([case.length] * (case.rows or 65_536 // case.length), config.vocab_size)
    size = max(16_384, case.length)
    if case.what == "sft":
        cfg = sft.Config(policy=PolicyConfig(tokens_per_microbatch=size))
        return lambda: sft.update(policy, optimizer, rows, cfg, run), rows, dropped
    cfg = grpo_unified.Config(max_dlogp=math.inf, temperature=1.0)
    microbatches = balance(rows, 1, size)[0]
    return lambda: grpo_unified.update(policy, optimizer, [microbatches], cfg, run), rows, dropped


def measure(case: Case, run, dry: bool) -> dict:
    """tokens/s (best of three steps after one), share of PEAK_FLOPS and peak GB of a case; a note
    where it fails, or another kernel of attention computed than the one it names."""
    leave_flash()
    config, cuda = config_of(case, dry), run.device.type == "cuda"
    chunks = dict(policies.HEAD_CHUNK)
    policies.HEAD_CHUNK[run.device.type] = case.chunk
    torch._dynamo.reset()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        step, rows, dropped = stepper(case, config, run)
        seconds = []
        for _ in range(2 if dry else 4):
            began = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        if dropped:
            return dict(note=f"{dropped} was dropped for torch's")
    except (Exception, SystemExit) as error:  # of a row, not of the table
        text = str(error).strip().splitlines() or [""]
        return dict(note=f"{type(error).__name__}: {text[0][:80]}")
    finally:
        step = None  # what it holds must go before the next case
        policies.HEAD_CHUNK.update(chunks)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    lengths, best = [len(row.ids) for row in rows], min(seconds[1:])
    flops = 3 * forward_flops(config, lengths, sum(sum(row.mask) for row in rows))
    if not cuda:
        return dict(note=f"{len(seconds)} steps ran")
    peak = torch.cuda.max_memory_allocated() / 1e9
    return dict(tokens=round(sum(lengths) / best), mfu=flops / best / PEAK_FLOPS, peak=peak)


def line(case: Case, found: dict) -> str:
    """A row of the table: what, before, now, their ratio."""
    before = f"{case.before[0]:,} | {case.before[1]:.1f}" if case.before else " | "
    if "note" in found:
        return f"| {case.name} | {before} | {found['note']} | | | |"
    times = f"{found['tokens'] / case.before[0]:.2f}" if case.before else ""
    now = f"{found['tokens']:,} | {found['mfu']:.1%} | {found['peak']:.1f}"
    return f"| {case.name} | {before} | {now} | {times} |"


def rows(first: int, dry: bool = False) -> None:
    """Prints the table from that case on; a process whose card failed ends after its row."""
    began, run, longest = time.monotonic(), Alone(), 0.0
    if first == 0:
        card = torch.cuda.get_device_name() if run.device.type == "cuda" else "a CPU, tiny shapes"
        print(f"now: {card}, torch {torch.__version__}; before: {BEFORE}")
        head = "what | before, tokens/s | peak GB | now, tokens/s | MFU of 989 | peak GB | times"
        print(f"| {head} |\n|{'---|' * 7}", flush=True)
    for case in [small(case) if dry else case for case in CASES[first:]]:
        row_began = time.monotonic()
        if row_began - began + longest > LIMIT:
            print(f"| {case.name} | not begun: {LIMIT:.0f} s are over |", flush=True)
            continue
        found = measure(case, run, dry)
        print(line(case, found), flush=True)
        longest = max(longest, time.monotonic() - row_began)
        if "CUDA error" in found.get("note", ""):  # all that this process asked of it would fail
            return


def drive(command: list[str], names: list[str], limit: float, quiet: float) -> None:
    """Prints what a process prints, a row a name, begun as `command` and the number of a row: again
    at the next one where it has ended, or said nothing for `quiet` seconds. No row is lost by a
    kernel that hangs in another, or takes the process with it."""
    began, at = time.monotonic(), 0
    while at < len(names) and (left := limit - time.monotonic() + began) > 0:
        environment = os.environ | {"BENCH_SECONDS": str(left)}
        first, told, lines = at, "ended without a row", queue.SimpleQueue()
        pipe = dict(stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        child = subprocess.Popen([*command, str(at)], **pipe)
        reader = threading.Thread(target=read, args=(child.stdout, lines), daemon=True)
        reader.start()
        try:
            while (text := lines.get(timeout=min(quiet, left + 30))) is not None:
                print(text, end="", flush=True)
                at += at < len(names) and text.startswith(f"| {names[at]} |")
        except queue.Empty:
            first, told = at, f"not done in {quiet:.0f} s"
        child.kill()
        child.wait()
        if at == first:
            print(f"| {names[at]} | {told} |", flush=True)
            at += 1
    for name in names[at:]:
        print(f"| {name} | not begun: {limit:.0f} s are over |", flush=True)


def read(stream, lines: queue.SimpleQueue) -> None:
    """Passes on each line, then None."""
    for text in stream:
        lines.put(text)
    lines.put(None)


def main(dry: bool = False) -> None:
    if dry:
        return rows(0, dry)
    if not torch.cuda.is_available():
        raise SystemExit("--device=cuda: there is no GPU here; --device=dry runs the same steps")
    start = "import sys, tests.gpu.older; from tests.bench import card; card.rows(int(sys.argv[1]))"
    drive([sys.executable, "-c", start], [case.name for case in CASES], LIMIT, QUIET)
