"""What the parts of a training step cost, each beside what the machine can do.

    python tests/bench/bench.py  # every section below, one after the other
    python tests/bench/bench.py --what=trainer,sync              # some of them
    python tests/bench/bench.py --vs=trl [--vocab=32000]
        # the trainer's step against TRL's GRPOTrainer, in one run
    python tests/bench/bench.py --vs=trl --what=step  # a whole step with tools against TRL's
    python tests/bench/bench.py --device=cuda  # the training step on one card; dry: on none

Seconds are CPU-seconds of this process on one thread, medians of --repeats runs after a warm-up,
unless a line says wall. Two floors stand beside each figure: its FLOPs over the measured matrix
rate, and the bytes that it cannot avoid to move over the measured bandwidth. MFU is the first floor
over the seconds.
"""

import asyncio
import concurrent.futures
import contextvars
import copy
import gc
import importlib.util
import itertools
import math
import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

importlib.import_module("tests.gpu.older")  # what an older torch lacks, before it is used
import grpo_unified
import rollout
from data.report import plots
from data.report.plots import Panel, picture_svg, share_axes
from reagent import engines, reward_model, run
from reagent.chat import Chat
from reagent.config import check_values, parse_config, run_facts
from reagent.policy import (
    Policy,
    Sequence,
    balance,
    clip_gradients,
    collate,
    full_weights,
    load_policy,
    load_tokenizer,
    shard,
)
from tests.helpers.tiny import Alone, apart, toy, tree_of
from tools import Observation

COLUMNS = ("advantage", "weight", "sampler_logps")
CPU = torch.device("cpu")


@dataclass
class Config:
    device: str = "cpu"  # cuda: the training step on one card, beside what was measured; dry: its
    # steps on a CPU with tiny shapes
    # sections, in the order they run
    what: str = "trainer,chain,memory,sync,rollout,judge,idle,growth,step"
    vs: str = ""  # trl: against TRL's GRPOTrainer, sections trainer (default) and step
    engine: str = "hf"  # hf | vllm, for the sections rollout, judge, idle, sync and step
    repeats: int = 5  # timed runs of each figure; the median is printed
    rows: int = 64  # rows of the trainer's batch, chains of a rollout
    vocab: int = 400  # V of the trainer's model
    lengths: str = "ragged,equal"  # of the trainer's rows: uniform 16 to 512, or all 264
    tokens_per_microbatch: int = 1100  # on a CPU small ones stay in the caches
    plot: str = "out/bench/growth.svg"  # written by the section growth
    out_dir: str = "out/bench"  # models made for the measurement are kept here


@dataclass
class Line:
    """One figure. flops and moved (bytes) are what the work needs at least; peak is bytes above
    what stood before.
    """

    what: str
    seconds: list[float]
    tokens: int = 0
    flops: float = 0.0
    moved: float = 0.0
    peak: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class Machine:
    flops: float  # fp32 multiply-adds count twice, per second on one thread
    bandwidth: float  # bytes per second of a copy, read and written both counted


# --------------------------------------------------------------------------------------------------
# clocks and floors


def cpu_seconds(work: Callable) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def alternate(
    works: dict[str, Callable], repeats: int, clock=cpu_seconds
) -> dict[str, list[float]]:
    """Seconds of each work, taken in turn after one warm-up of each: a machine that drifts drifts
    for all of them.
    """
    for work in works.values():
        work()
    rounds = [{name: clock(work) for name, work in works.items()} for _ in range(repeats)]
    return {name: [one[name] for one in rounds] for name in works}


def measure_machine(repeats: int = 5) -> Machine:
    """The rate of one 512 x 512 product in fp32, and of copying 256 MB."""
    a, b, out = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)
    source, target = torch.ones(64 << 20), torch.empty(64 << 20)
    works = {
        "mm": lambda: [torch.mm(a, b, out=out) for _ in range(16)],
        "copy": lambda: target.copy_(source),
    }
    seconds = alternate(works, repeats)
    return Machine(16 * 2 * 512**3 / min(seconds["mm"]), 2 * source.nbytes / min(seconds["copy"]))


def matrix_weights(config) -> int:
    """Weights of the matrices of all blocks; embedding and head are apart."""
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    h, ff = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (2 * h * heads * d + 2 * h * kv * d + 3 * h * ff)


def forward_flops(config, lengths: list[int], scored: int, before: Iterable[int] = ()) -> float:
    """FLOPs of a causal forward over rows of these lengths with `scored` tokens through the
    head. before: tokens of another row that each reads before its own.
    """
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    # scores and values: 2 products over n (n + 1) / 2 pairs, and n for each token before
    causal = sum(
        n * (n + 1 + 2 * m) for n, m in itertools.zip_longest(lengths, before, fillvalue=0)
    )
    return (
        2.0 * matrix_weights(config) * sum(lengths)
        + attention * causal
        + 2.0 * config.hidden_size * config.vocab_size * scored
    )


def step_bytes(config, parameters: int, tokens: int) -> float:
    """Bytes a step in fp32 moves at least: weights twice, gradients, AdamW's two moments,
    activations out and back.
    """
    d = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    kept = config.num_hidden_layers * (2 * config.hidden_size + d + 3 * config.intermediate_size)
    return 4.0 * (11 * parameters + 2 * kept * tokens)


# --------------------------------------------------------------------------------------------------
# memory


def resident() -> int:
    """Bytes of this process in memory now."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(work: Callable) -> tuple[int, object]:
    """(bytes that work() takes at its peak above what stood before, its result).

    Each core counts pages in batches (percpu_counter), so Linux's mark may lag: by so much, at
    most, it is corrected.
    """
    gc.collect()
    if sys.platform != "linux":
        before, result = resident(), work()
        return resident() - before, result
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before, result = resident(), work()
    status = Path("/proc/self/status").read_text()
    lag = max(32, 2 * os.cpu_count()) * os.cpu_count() * resource.getpagesize()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 + lag - before, result


def in_child(function: Callable, *args):
    """function(*args) in a fresh process: no memory is left over from earlier measurements."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


# --------------------------------------------------------------------------------------------------
# models and rows


def make_model(folder: Path, vocab: int, hidden=256, layers=4, ff=256, heads=4, tied=True) -> str:
    """A random Qwen3 as a Hugging Face folder, made once; the default has 1.9 M parameters at V =
    400.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = folder / f"v{vocab}-h{hidden}-l{layers}-f{ff}-{'tied' if tied else 'untied'}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        shape = dict(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=ff,
            num_attention_heads=heads,
        )
        shape |= dict(
            num_key_value_heads=heads, head_dim=hidden // heads, max_position_embeddings=16_384
        )
        ends = dict(
            bos_token_id=None,
            eos_token_id=vocab - 1,
            pad_token_id=vocab - 2,
            tie_word_embeddings=tied,
        )
        Qwen3ForCausalLM(
            Qwen3Config(vocab_size=vocab, initializer_range=0.06, **shape, **ends)
        ).save_pretrained(folder)
    return str(folder)


def make_tokenizer():
    """The toy's word-level tokenizer."""
    return toy.make_tokenizer(toy.toy_phrases())


def load(folder: str) -> Policy:
    run.init_distributed(600)
    return shard(load_policy(folder, False), CPU)


def random_lengths(kind: str, rows: int, seed=0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(16, 512) if kind == "ragged" else 264 for _ in range(rows)]


def random_rows(lengths: list[int], vocab: int, prompt=8, seed=0) -> list[Sequence]:
    """Rows whose tokens after the prompt are all trained, the weights of seq_mean, advantages of +1
    and -1.
    """
    rng, rows = random.Random(seed), []
    for n in lengths:
        trained = n - prompt
        columns = {
            "advantage": [rng.choice([-1.0, 1.0])] * trained,
            "weight": [1 / (len(lengths) * trained)] * trained,
        }
        mask = [0] * prompt + [1] * trained
        rows.append(
            Sequence(
                [rng.randrange(vocab - 2) for _ in mask],
                mask,
                columns | {"sampler_logps": [0.0] * trained},
            )
        )
    return rows


def set_mu(policy: Policy, rows: list[Sequence]) -> None:
    """The sampler's log-probs: those of the policy as it is, so that ratios begin at 1."""
    with torch.no_grad():
        for row in rows:
            row.columns["sampler_logps"] = policy(collate([row], (), CPU))[0].tolist()


class Trainer:
    """The update of grpo_unified.py over given rows: forward, loss, backward, clipping, AdamW."""

    def __init__(
        self,
        folder: str,
        rows: list[Sequence],
        tokens_per_microbatch: int,
        make_optimizer=None,
        clip=1.0,
    ):
        self.policy, self.rows = load(folder), rows
        self.config, self.tokens = self.policy.hf.config, sum(len(row.ids) for row in rows)
        make_optimizer = make_optimizer or (
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-6)
        )
        self.optimizer = make_optimizer(list(self.policy.parameters()))
        self.parameters = sum(p.numel() for p in self.policy.parameters())
        self.microbatches = balance(rows, 1, tokens_per_microbatch)[0]
        self.settings = grpo_unified.Config(max_dlogp=math.inf, temperature=1.0, max_grad_norm=clip)

    def step(self) -> None:
        done = grpo_unified.update(
            self.policy, self.optimizer, [self.microbatches], self.settings, Alone()
        )
        assert not done["skipped"], done["skipped"]

    def line(self, what: str, seconds: list[float], peak=math.nan) -> Line:
        batch = collate(self.rows, (), CPU)
        before = [prefix.stop - prefix.start for prefix in batch.prefixes]
        flops = 3 * forward_flops(self.config, batch.lengths, len(batch.targets), before)
        return Line(
            what,
            seconds,
            self.tokens,
            flops,
            step_bytes(self.config, self.parameters, self.tokens),
            peak,
        )


def gradient(
    folder: str, rows: list[Sequence], tokens_per_microbatch: int
) -> dict[str, torch.Tensor]:
    """Change of every parameter under SGD at rate 1, without clipping: minus the gradient, by
    name.
    """
    trainer = Trainer(
        folder,
        rows,
        tokens_per_microbatch,
        lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        math.inf,
    )
    return change_of(trainer.policy.hf, trainer.step)


def change_of(module, step: Callable) -> dict[str, torch.Tensor]:
    before = {name: whole(p).detach().clone() for name, p in module.named_parameters()}
    step()
    return {name: whole(p).detach() - before[name] for name, p in module.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    """Largest difference of two gradients, beside their largest entry."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    apart = max((a[n] - b[n]).abs().max().item() for n in a)
    return (
        f"gradients differ by {apart:.1e} at most (largest entry "
        f"{max(x.abs().max().item() for x in a.values()):.1e})"
    )


# --------------------------------------------------------------------------------------------------
# the trainer's step


def bench_trainer(cfg: Config) -> list[Line]:
    lines = []
    for kind in cfg.lengths.split(","):
        made = (
            make_model(Path(cfg.out_dir), cfg.vocab),
            random_lengths(kind, cfg.rows),
            cfg.vocab,
            cfg.tokens_per_microbatch,
        )
        trainer = make_trainer(*made)
        seconds = alternate({"": trainer.step}, cfg.repeats)[""]
        lines.append(
            trainer.line(
                f"trainer step, {kind}, V = {cfg.vocab:,}", seconds, in_child(trainer_peak, *made)
            )
        )
    return lines


def make_trainer(
    folder: str, lengths: list[int], vocab: int, tokens_per_microbatch: int
) -> Trainer:
    return Trainer(folder, random_rows(lengths, vocab), tokens_per_microbatch)


def trainer_peak(*made) -> int:
    trainer = make_trainer(*made)
    return peak_of(trainer.step)[0]


# --------------------------------------------------------------------------------------------------
# chain rows: one row a chain, or one row an attempt; trees: one prefix a group, or one a row


def chain_episodes(count: int, vocab: int, seed=0) -> list[rollout.Episode]:
    """Chains of a prompt of 32 tokens, attempts of 32 to 96 tokens and a critique of 16; all
    attempts rewarded.
    """
    rng, episodes = random.Random(seed), []
    for i in range(count):
        first, refined = rng.randint(32, 96), rng.randint(32, 96)
        mask = [0] * 32 + [1] * first + [0] * 16 + [1] * refined
        spans = ((32, 32 + first), (48 + first, len(mask)))
        attempts = [
            rollout.Attempt(span, (0, 0), None, "answered", 0, reward=1.0) for span in spans
        ]
        ids = [rng.randrange(vocab - 2) for _ in mask]
        episodes.append(
            rollout.Episode(str(i), "", [], ids, mask, [0.0] * sum(mask), [], 0, attempts)
        )
    return episodes


def two_rows(row: Sequence, episode: rollout.Episode) -> list[Sequence]:
    """The same chain as a row for each attempt: the first ends with it, the second holds all and
    trains the second.
    """
    (_, end), (start, _) = (attempt.span for attempt in episode.attempts)
    first = sum(row.mask[:end])
    split = [
        {name: column[part] for name, column in row.columns.items()}
        for part in (slice(first), slice(first, None))
    ]
    second = Sequence(row.ids, [0] * start + row.mask[start:], split[1])
    return [Sequence(row.ids[:end], row.mask[:end], split[0]), second]


def chain_layouts(count: int, vocab: int) -> tuple[list[Sequence], list[Sequence]]:
    episodes, rng = chain_episodes(count, vocab), random.Random(1)
    advantages = torch.tensor([[[rng.choice([-1.0, 1.0]) for _ in range(count)] for _ in range(2)]])
    rows = grpo_unified.training_sequences(episodes, advantages, count, "seq_mean")
    return rows, [part for row, episode in zip(rows, episodes) for part in two_rows(row, episode)]


def bench_chain(cfg: Config) -> list[Line]:
    folder = make_model(
        Path(cfg.out_dir), cfg.vocab, hidden=512, layers=2, ff=1024, heads=8
    )  # attention: 3 % of the FLOPs
    one, two = chain_layouts(cfg.rows, cfg.vocab)
    lines = beside(cfg, folder, {"chain rows": one, "a row an attempt": two})
    rng = random.Random(0)  # eight judgments of 48 tokens on the same 512
    trees = [tree_of(512, [48] * 8, rng, cfg.vocab - 2) for _ in range(max(cfg.rows // 16, 1))]
    rows = [row for tree in trees for row in apart(tree)]
    return lines + beside(
        cfg, folder, {"trees of eight judgments": trees, "a row a judgment": rows}
    )


def beside(cfg: Config, folder: str, layouts: dict[str, list[Sequence]]) -> list[Line]:
    """Steps over the same work in two layouts, in turn; the first line says their ratio."""
    same = compare(*(gradient(folder, r, cfg.tokens_per_microbatch) for r in layouts.values()))
    trainers = {n: Trainer(folder, r, cfg.tokens_per_microbatch) for n, r in layouts.items()}
    seconds = alternate({name: t.step for name, t in trainers.items()}, cfg.repeats)
    lines = [t.line(name, seconds[name]) for name, t in trainers.items()]
    ratio = statistics.median(a / b for a, b in zip(*seconds.values()))
    # of chains (P + 2L + c) / (2P + 3L + c), summed over the batch
    tokens, flops = (getattr(lines[0], x) / getattr(lines[1], x) for x in ("tokens", "flops"))
    share = f"{ratio:.3f} of the seconds at {tokens:.3f} of the tokens ({ratio / tokens - 1:+.1%})"
    lines[0].note = f"{share}, {flops:.3f} of the FLOPs ({ratio / flops - 1:+.1%}); {same}"
    return lines


# --------------------------------------------------------------------------------------------------
# memory of a loss step


def loss_peak(folder: str, tokens: int, chunked: bool) -> int:
    """Bytes at the peak of forward, loss and backward over one row, with the chunked head or with
    the full logits.
    """
    from transformers import AutoModelForCausalLM

    policy = (
        load(folder)
        if chunked
        else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    )
    row = random_rows([tokens], 1000, prompt=1)[0]

    def step():
        batch = collate([row], COLUMNS, CPU)
        if chunked:
            logps, _ = policy(batch)
        else:
            logits = policy(batch.input_ids, use_cache=False).logits[0, batch.index]  # (M, V)
            logps = torch.log_softmax(logits.float(), -1).gather(1, batch.targets[:, None])[:, 0]
        c = batch.columns
        grpo_unified.grpo_loss(logps, logps.detach(), c["advantage"], c["weight"], 0.2, 0.34)[
            0
        ].backward()

    torch.set_num_threads(1)
    return peak_of(step)[0]


def bench_memory(cfg: Config, vocab=151_936, tokens=4096) -> list[Line]:
    folder = make_model(Path(cfg.out_dir), vocab, hidden=64, layers=1, ff=64, heads=1)
    peaks = [in_child(loss_peak, folder, tokens, chunked) for chunked in (True, False)]
    names = (
        f"loss step, V = {vocab:,}, {tokens:,} tokens in the loss",
        "the same with full logits",
    )
    lines = [Line(name, [], tokens, peak=peak) for name, peak in zip(names, peaks)]
    lines[0].note = f"{peaks[0] / peaks[1]:.3f} of the peak with full logits"
    return lines


# --------------------------------------------------------------------------------------------------
# weight sync


def sync_figures(kind: str, folder: str, repeats: int) -> dict:
    """Seconds of a sync and of one copy of the same bytes, in turn; the peak of a sync; bytes of
    the model.
    """
    torch.set_num_threads(1)
    policy = load(folder)
    engine = engines.make_engine(
        engines.EngineConfig(kind, sleep=False), folder, [], max_context=256
    )
    weights = [whole(value).detach() for value in policy.hf.parameters()]
    copies = [torch.empty_like(value) for value in weights]

    def sync():
        engine.load_weights(full_weights(policy, torch.float32))

    def copy():
        for target, source in zip(copies, weights):
            target.copy_(source)

    seconds = alternate({"sync": sync, "copy": copy}, repeats)
    return dict(**seconds, peak=peak_of(sync)[0], size=sum(value.nbytes for value in weights))


def bench_sync(cfg: Config) -> list[Line]:
    folder = make_model(Path(cfg.out_dir), 32_000, hidden=1024, layers=8, ff=3072, heads=16)
    found, lines = in_child(sync_figures, cfg.engine, folder, cfg.repeats), []
    ratio = statistics.median(a / b for a, b in zip(found["sync"], found["copy"]))
    size, moved = found["size"] / 1e6, 2 * found["size"]
    note = (
        f"{ratio:.2f} copies; its peak is {found['peak'] / found['size']:.2f} of the model's "
        f"{size:,.0f} MB"
    )
    lines.append(
        Line(
            f"weight sync, {cfg.engine}", found["sync"], moved=moved, peak=found["peak"], note=note
        )
    )
    return lines + [Line("one copy of the same bytes", found["copy"], moved=moved)]


# --------------------------------------------------------------------------------------------------
# an agent that knows four tasks by heart, so that rollouts have calls, answers and judgments


TURN = (
    "<think>"
    + " ".join(
        "Ada Bern Cleo Dune Elba Finn Gaza Hugo Iris Juno Kiel Lena Mars Nile Oslo Paul".split()
    )
    + "</think>"
)
FACTS = {
    "Quin": "leads to Rome.",
    "Rome": "has code 17.",
    "Siena": "leads to Troy.",
    "Troy": "has code 23.",
    "Uma": "leads to Vera.",
    "Vera": "has code 38.",
    "Wien": "leads to Xena.",
    "Xena": "has code 42.",
}
STARTS = ("Quin", "Siena", "Uma", "Wien")


class Tools:
    """A toolbox whose calls take as long as `delay()` says, in seconds; it knows FACTS."""

    schemas = [{"type": "function", "function": {"name": "search"}}]

    def __init__(self, delay: Callable[[], float]):
        self.delay = delay

    async def call(self, name, arguments, docs=None, files=None) -> Observation:
        seconds = self.delay()
        await asyncio.sleep(seconds)
        try:
            place = arguments["queries"][0]
        except (KeyError, IndexError, TypeError):
            return Observation("error", "error", seconds)
        return Observation(found(place), "ok", seconds)


def found(place: str) -> str:
    return toy.found({"docs": FACTS}, place)


def demonstration(start: str) -> list[dict]:
    """Two lookups and an answer, a critique, the same again."""
    messages, code, _ = toy.lookups({"docs": FACTS}, start, len(FACTS))
    attempt = [
        m | {"content": TURN + m["content"]} if m["role"] == "assistant" else m
        for m in [*messages, toy.final(code)]
    ]
    question = toy.QUESTION.format(hops=2, start=start)
    critique = rollout.REFINE_PROMPT.replace("{critique}", f"{toy.DONE}{start}.")
    opening = [
        {"role": "system", "content": rollout.SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]
    return opening + attempt + [{"role": "user", "content": critique}] + attempt


def judgment(start: str) -> str:
    return toy.judgment_text("Ada Bern Cleo Dune Elba Finn Gaza Hugo", f"{toy.DONE}{start}.", 0.55)


def task_rows() -> list[dict]:
    return [
        {"id": s, "question": toy.QUESTION.format(hops=2, start=s), "answer": "17", "kind": "qa"}
        for s in STARTS
    ]


def learned_by_heart(folder: Path, most_steps=400) -> str:
    """A Qwen3 of the toy's size that was trained here until it repeats four chains and their
    judgments; kept in `folder`.
    """
    if (folder / "config.json").is_file():
        return str(folder)
    tokenizer = make_tokenizer()
    chat, start = Chat(tokenizer), folder.with_name(folder.name + "-start")
    toy.make_model(start, tokenizer, 0)
    rows = []
    for name in STARTS:
        messages = demonstration(name)
        rows.append(Sequence(*chat.row(messages, Tools.schemas)))
        for part in (messages[2:7], messages[8:]):
            prompt = reward_model.prompt_ids(
                chat, messages[1]["content"], reward_model.trajectory_text(part)
            )
            reply = [*chat.text(judgment(name)), chat.closer_id]
            rows.append(Sequence(prompt + reply, [0] * len(prompt) + [1] * len(reply)))
    policy = load(str(start))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    batch = collate(rows, (), CPU)
    for step in range(most_steps):
        logps, _ = policy(batch)
        (-logps.mean()).backward()
        clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if -logps.min().item() < 0.01:
            break
    else:
        raise SystemExit(
            f"the agent for this measurement did not learn its four tasks in {most_steps} steps"
        )
    policy.hf.save_pretrained(folder, state_dict=dict(full_weights(policy, torch.float32)))
    tokenizer.save_pretrained(folder)
    return str(folder)


CHAIN: contextvars.ContextVar = contextvars.ContextVar("chain")


class Agent:
    """An engine, its chat and the settings that chains share; counts the tokens that go through the
    engine.
    """

    def __init__(
        self, cfg: Config, delay: Callable[[], float] = lambda: 0.0, refine=True, temperature=1.0
    ):
        self.folder = learned_by_heart(Path(cfg.out_dir) / "by-heart")
        self.chat = Chat(load_tokenizer(self.folder))
        self.engine = engines.make_engine(
            engines.EngineConfig(cfg.engine, sleep=False),
            self.folder,
            self.chat.stop_ids,
            max_context=1024,
        )
        self.generate, self.engine.generate = self.engine.generate, self.metered
        self.sampled = 0
        limits, coin, rows = (
            rollout.Limits(4, 64, 400, 1024, final_tokens=32),
            random.Random(0),
            task_rows(),
        )

        def reward(*_):
            return (coin.random(), True)  # any spread of rewards will do

        self.setup = rollout.Setup(
            self.engine, self.chat, Tools(delay), limits, reward, None, refine, temperature
        )
        small = reward_model.RewardModelConfig(max_context=1024, max_tokens=64)
        self.rrm = reward_model.engine_rrm(self.engine, self.chat, small)
        self.jobs = [(rows[i * len(rows) // cfg.rows], (0, "bench", i)) for i in range(cfg.rows)]

    async def metered(self, ids, **options):
        sample = await self.generate(ids, **options)
        self.sampled += len(sample.ids)
        return sample

    def chains(self, rrm=None, jobs=None) -> list[rollout.Episode]:
        self.setup.rrm = rrm

        async def one(row, key):
            CHAIN.set(key)
            return await rollout.run_chain(row, self.setup, key)

        return asyncio.run(engines.run_together([one(*job) for job in jobs or self.jobs]))

    def judge_and_refine(self, episodes: list[rollout.Episode]) -> list[rollout.Episode]:
        """The rest of chains whose first attempt stands: judgment, refined attempt, its
        judgment.
        """
        self.setup.rrm = self.rrm

        async def rest(episode, row, key):
            await rollout.judge_attempt(episode, self.setup, (*key, 1))
            if episode.attempts[0].critique:
                await rollout.refine(episode, row, self.setup, episode.attempts[0].critique, key)
            return episode

        fresh = copy.deepcopy(episodes)
        return asyncio.run(
            engines.run_together([rest(e, *job) for e, job in zip(fresh, self.jobs)])
        )

    def line(
        self, what: str, seconds: list[float], runs: int, lengths: list[int], most_sampled: int
    ) -> Line:
        """lengths: tokens that must go through the model once; most_sampled: of one chain, so many
        passes are needed.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder)
        flops = forward_flops(config, lengths, self.sampled // runs)
        weights = matrix_weights(config) + config.hidden_size * config.vocab_size
        kept = (
            2
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
            * sum(lengths)
        )
        return Line(
            what, seconds, self.sampled // runs, flops, 4.0 * (weights * most_sampled + 2 * kept)
        )


def bench_rollout(cfg: Config) -> list[Line]:
    agent = Agent(cfg)
    seconds = alternate({"": agent.chains}, cfg.repeats)[""]
    episodes = agent.chains()
    lengths, sampled = [len(e.ids) for e in episodes], max(sum(e.mask) for e in episodes)
    return [
        agent.line(
            f"rollout, {cfg.rows} chains, {cfg.engine}", seconds, cfg.repeats + 2, lengths, sampled
        )
    ]


def bench_judge(cfg: Config) -> list[Line]:
    agent = Agent(cfg)
    first = agent.chains()
    agent.sampled = 0
    seconds = alternate({"": lambda: agent.judge_and_refine(first)}, cfg.repeats)[""]
    done = agent.judge_and_refine(first)
    asked = [
        len(
            reward_model.prompt_ids(
                agent.chat, e.question, reward_model.trajectory_text(e.messages[slice(*a.messages)])
            )
        )
        for e in done
        for a in e.attempts
    ]
    lengths = asked + [
        len(e.ids) for e in done
    ]  # the first attempt is read again: its cache may be gone by now
    sampled = max(sum(e.mask) - sum(e.mask[: e.attempts[0].span[1]]) for e in done)
    return [
        agent.line(
            f"judge and refine, {cfg.rows} chains, {cfg.engine}",
            seconds,
            cfg.repeats + 2,
            lengths,
            sampled,
        )
    ]


# --------------------------------------------------------------------------------------------------
# no idle


def bench_idle(cfg: Config) -> list[Line]:
    """Chains with tools and a judge that take log-normal times (median 0.1 s, sigma 0.5), each
    chain its own draws.
    """
    draws: dict = {}

    def delay() -> float:
        rng = draws.setdefault(CHAIN.get(), random.Random(repr(CHAIN.get())))
        return rng.lognormvariate(math.log(0.1), 0.5)

    async def ask(question, trajectory, text, seed, seconds):
        await asyncio.sleep(delay())
        return {"message": {"content": judgment(STARTS[0])}}

    agent = Agent(cfg, delay)
    rrm, walls, busy, alone = reward_model.RewardModel(ask), [], [], []
    agent.chains(rrm)
    spent = busy_clock(agent.engine)
    for _ in range(cfg.repeats):
        draws.clear()
        spent.clear()
        walls.append(wall_seconds(lambda: agent.chains(rrm)))
        busy.append(sum(spent))
    for job in agent.jobs[:: max(cfg.rows // 8, 1)]:
        draws.clear()
        alone.append(wall_seconds(lambda: agent.chains(rrm, [job])))  # noqa: B023 - called at once
    wall, work, slowest = statistics.median(walls), statistics.median(busy), max(alone)
    note = (
        f"wall is {wall / max(work, slowest):.2f} of the larger of engine busy {work:.2f} s and "
        f"slowest chain alone {slowest:.2f} s"
    )
    return [
        Line(f"{cfg.rows} chains with slow tools and judge, {cfg.engine}, wall", walls, note=note)
    ]


def busy_clock(engine) -> list[float]:
    """The seconds of each step of an engine from now on: vLLM's steps, the rounds of hf."""
    name = "_step" if hasattr(engine, "_step") else "run_round"
    work, spent = getattr(engine, name), []

    def timed(*args):
        began = time.perf_counter()
        try:
            return work(*args)
        finally:
            spent.append(time.perf_counter() - began)

    setattr(engine, name, timed)
    return spent


def wall_seconds(work: Callable) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --------------------------------------------------------------------------------------------------
# growth with length and with group size


def bench_growth(cfg: Config) -> list[Line]:
    folder, tokens, sizes = (
        make_model(Path(cfg.out_dir), cfg.vocab),
        (512, 1024, 2048, 4096, 8192),
        (4, 8, 16, 32),
    )
    shapes = {f"one row of {n:,}": [n] for n in tokens} | {
        f"group of {g}, rows of 512": [512] * g for g in sizes
    }
    lines = []
    for name, lengths in shapes.items():
        trainer = make_trainer(folder, lengths, cfg.vocab, cfg.tokens_per_microbatch)
        lines.append(trainer.line(name, alternate({"": trainer.step}, min(cfg.repeats, 3))[""]))
    Path(cfg.plot).parent.mkdir(parents=True, exist_ok=True)
    lengths, groups = lines[: len(tokens)], lines[len(tokens) :]
    panels = [growth_panel(lengths, tokens, "tokens in the row")]
    panels.append(growth_panel(groups, sizes, "rows of 512 tokens"))
    share_axes(panels)
    for panel in panels:
        panel.y_marks = log_marks(*panel.y_range)
    Path(cfg.plot).write_text(picture_svg(panels, columns=2, height=240))
    for part in (lengths, groups):
        rates = [line.flops / statistics.median(line.seconds) for line in part]
        for line, rate in zip(part, rates):
            line.note = f"{rates[0] / rate:.2f} of the line through the first point"
    return lines


def growth_panel(lines: list[Line], xs: tuple[int, ...], label: str) -> Panel:
    """Measured seconds over the line that the FLOPs draw through the first of them; both axes are
    logarithms to the base 10."""
    seconds = [statistics.median(line.seconds) for line in lines]
    expected = [line.flops * seconds[0] / lines[0].flops for line in lines]
    across = list(map(math.log10, xs))
    measured = plots.Line(list(zip(across, map(math.log10, seconds))))
    flops = plots.Line(list(zip(across, map(math.log10, expected))), expected=True)
    drawn = {"measured": measured, "by FLOPs from the first point": flops}
    marks = {at: plots.number(x) for at, x in zip(across, xs)}
    return Panel(f"Seconds of a step by {label}", drawn, x_marks=marks)


def log_marks(low: float, high: float) -> dict[float, str]:
    """{log10: label} of 1, 2 and 5 times powers of ten, from the last one below `low` to the first
    above `high`, which are logarithms too."""
    powers = range(math.floor(low) - 1, math.floor(high) + 2)
    marks = {p + math.log10(m): plots.number(m * 10.0**p) for p in powers for m in (1, 2, 5)}
    first, last = max(m for m in marks if m <= low), min(m for m in marks if m >= high)
    return {mark: label for mark, label in marks.items() if first <= mark <= last}


# --------------------------------------------------------------------------------------------------
# a whole step


class GRPOStep:
    """A step of grpo_unified.py on the agent's four questions: rollout, advantages, one update,
    weight sync.
    """

    def __init__(self, cfg: Config, agent: Agent, rrm: reward_model.RewardModel | None):
        self.agent, self.rrm, self.policy, self.cfg = agent, rrm, load(agent.folder), cfg
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        self.settings = grpo_unified.Config(max_dlogp=math.inf, temperature=agent.setup.temperature)
        self.spent: dict[str, list[float]] = {"rollout": [], "update": [], "sync": []}
        self.episodes: list[rollout.Episode] = []

    def __call__(self) -> None:
        clock = [time.perf_counter()]
        self.episodes = self.agent.chains(self.rrm)
        clock.append(time.perf_counter())
        group = self.cfg.rows // len(STARTS)
        grpo_unified.set_rewards(self.episodes, 0.3, self.rrm is not None)
        rewards = grpo_unified.reward_tensor(self.episodes, group, lambda a: a.reward)
        advantages = grpo_unified.pooled_advantages(rewards)
        rows = grpo_unified.training_sequences(self.episodes, advantages, group, "seq_mean")
        microbatches = balance(rows, 1, self.cfg.tokens_per_microbatch)[0]
        grpo_unified.update(self.policy, self.optimizer, [microbatches], self.settings, Alone())
        clock.append(time.perf_counter())
        self.agent.engine.load_weights(full_weights(self.policy, torch.float32))
        clock.append(time.perf_counter())
        for name, a, b in zip(self.spent, clock, clock[1:]):
            self.spent[name].append(b - a)


def bench_step(cfg: Config) -> list[Line]:
    """Reagent-U with a judge in the same engine and tools of 50 ms; wall seconds, parts and
    whole.
    """
    agent = Agent(cfg, lambda: 0.05)
    step = GRPOStep(cfg, agent, agent.rrm)
    walls = alternate({"": step}, cfg.repeats, wall_seconds)[""]
    tokens = sum(len(e.ids) for e in step.episodes)
    lines = [Line(f"whole step, {cfg.rows} chains, {cfg.engine}, wall", walls, tokens)]
    return lines + [Line(f"its {name}, wall", seconds[1:]) for name, seconds in step.spent.items()]


def table(lines: list[Line], machine: Machine) -> str:
    """Markdown; "floor" columns are seconds that no program of this machine can beat."""
    head = [
        "",
        "tokens",
        "seconds",
        "tokens/s",
        "MFU",
        "FLOP floor, s",
        "byte floor, s",
        "peak, MB",
        "",
    ]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        seconds = statistics.median(line.seconds) if line.seconds else math.nan
        floor = line.flops / machine.flops
        cells = [
            line.what,
            f"{line.tokens:,}" if line.tokens else "",
            f"{seconds:.3f}" if line.seconds else "",
        ]
        cells.append(f"{line.tokens / seconds:,.0f}" if line.tokens and line.seconds else "")
        cells += [f"{floor / seconds:.0%}", f"{floor:.3f}"] if line.flops else ["", ""]
        cells.append(f"{line.moved / machine.bandwidth:.3f}" if line.moved else "")
        cells += ["" if math.isnan(line.peak) else f"{line.peak / 1e6:,.0f}", line.note]
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def header(cfg: Config, machine: Machine) -> str:
    facts = run_facts(cfg)
    cpu = next(
        (t.partition(":")[2].strip() for t in cpu_info() if t.startswith("model name")),
        facts["machine"]["cpu"],
    )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"command   python {' '.join(sys.argv)}\nhardware  {cpu}, {os.cpu_count()} cores, one "
        "thread used; "
        f"{machine.flops / 1e9:.1f} GFLOP/s (fp32, 512 x 512), {machine.bandwidth / 1e9:.1f} GB/s "
        "(copy)\n"
        f"versions  {versions}, commit {(facts['git'] or 'none')[:9]}"
    )


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


SECTIONS = dict(
    trainer=bench_trainer,
    chain=bench_chain,
    memory=bench_memory,
    sync=bench_sync,
    rollout=bench_rollout,
)
SECTIONS |= dict(judge=bench_judge, idle=bench_idle, growth=bench_growth, step=bench_step)


def main(cfg: Config) -> None:
    if cfg.device != "cpu":
        from tests.bench import card

        check_values(cfg, "device=cpu|cuda|dry")
        return card.main(dry=cfg.device == "dry")
    torch.set_num_threads(1)
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    machine = measure_machine()
    print(header(cfg, machine), flush=True)
    if cfg.vs:
        if importlib.util.find_spec("trl") is None:
            raise SystemExit(
                "TRL is not installed; it is no requirement of this repo: "
                "python -m pip install trl==1.16.0, best into a virtual environment of its own"
            )
        from tests.bench import bench_trl

        cfg.what = "trainer" if cfg.what == Config.what else cfg.what
        print(bench_trl.report(cfg, machine))
        return
    for name in cfg.what.split(","):
        if name not in SECTIONS:
            raise SystemExit(f"what = {name!r}: one of {', '.join(SECTIONS)}")
    for name in cfg.what.split(","):
        print(f"\n{table(SECTIONS[name](cfg), machine)}", flush=True)


if __name__ == "__main__":
    main(parse_config(Config, sys.argv[1:]))
