"""Engines: generate(ids, …) and load_weights(pairs), by transformers and by vLLM in this
process.
"""

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from reagent.config import load_script

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sample:
    """What an engine returns: sampled ids, their log-probs under the sampling distribution,
    stop|length|abort.
    """

    ids: list[int]
    logps: list[float]
    finish_reason: str


@dataclass(frozen=True)
class EngineConfig:
    """How the sampler runs; `--engine=vllm` is short for `--engine.kind=vllm`."""

    kind: str = "vllm"  # vllm | hf (transformers, for laptops) | path/to/file.py:Class
    tensor_parallel: int = 1  # adjacent ranks that share an engine
    memory_share: float = 0.85  # of the GPU
    sleep: bool = True  # it gives its memory back while the policy trains
    max_live_chains: int = 0  # at a time on one engine, bounds its KV cache; 0: all


class Engine(Protocol):
    """What the loop needs of a sampler; `sleep`, `follow` and `finish` are optional.

    A class of your own is made as Class(folder, stop_ids, config=EngineConfig, max_context=tokens,
    tp_group=None).
    """

    async def generate(
        self, ids: list[int], *, max_new_tokens: int, temperature: float, seed: int, top_p: float
    ) -> Sample: ...

    def load_weights(self, pairs: Iterable[tuple[str, "torch.Tensor"]]) -> None: ...


@dataclass(frozen=True)
class Request:
    """What waits for an HFEngine; `done` is the future of its Sample."""

    ids: list[int]
    max_new_tokens: int
    temperature: float
    seed: int
    top_p: float
    done: asyncio.Future


class Rounds:
    """The chains that live on an event loop, and how many of them wait for an HFEngine, which
    computes when all of them do.

    The engine that was made first goes first: the agent's before the reward model's, so that
    judgments come in few large batches.
    """

    _of_loop: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()

    def __init__(self):
        self.live = self.waiting = 0
        self.asked: set[HFEngine] = set()  # engines with requests

    @classmethod
    def here(cls) -> "Rounds":
        """Those of the running event loop."""
        return cls._of_loop.setdefault(asyncio.get_running_loop(), cls())

    def start(self):
        self.live += 1

    def end(self):
        self.live -= 1
        self.check()

    def check(self):
        if self.live and self.waiting >= self.live:
            first = min(self.asked, key=lambda engine: engine.number)
            asyncio.get_running_loop().call_soon(first.run_round)


class HFEngine:
    """transformers as the sampler, for machines without vLLM: batches in rounds, so a run can be
    repeated to the bit.
    """

    max_batch = 64
    made = 0

    def __init__(self, folder: str, stop_ids: Iterable[int], **_):
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        )
        self.stop_ids, self.queue = set(stop_ids), []
        self.busy_seconds = 0.0
        HFEngine.made += 1
        self.number = HFEngine.made

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0) -> Sample:
        done, rounds = asyncio.get_running_loop().create_future(), Rounds.here()
        self.queue.append(Request(ids, max_new_tokens, temperature, seed, top_p, done))
        rounds.asked.add(self)
        rounds.waiting += 1
        rounds.check()
        return await done

    def run_round(self):
        rounds = Rounds.here()
        if rounds.waiting < rounds.live:  # a chain was added meanwhile
            return
        rounds.asked.discard(self)
        requests, self.queue = sorted(self.queue, key=lambda r: (len(r.ids), r.seed)), []
        began = time.perf_counter()
        for i in range(0, len(requests), self.max_batch):
            batch = requests[i : i + self.max_batch]
            for request, sample in zip(batch, self._decode(batch)):
                rounds.waiting -= 1
                request.done.set_result(sample)
        self.busy_seconds += time.perf_counter() - began

    def _decode(self, requests) -> list[Sample]:
        import torch
        from transformers import DynamicCache

        width = max(len(r.ids) for r in requests)
        ids = torch.tensor(
            [[0] * (width - len(r.ids)) + list(r.ids) for r in requests], device=self.device
        )
        attention = torch.tensor(
            [[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in requests], device=self.device
        )
        position = (attention.cumsum(1) - 1).clamp(min=0)
        generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        samples = [Sample([], [], "length") for _ in requests]
        alive, cache = list(range(len(requests))), DynamicCache(config=self.model.config)
        with torch.inference_mode():
            while alive:
                step = dict(input_ids=ids, attention_mask=attention, position_ids=position)
                out = self.model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                draws = torch.tensor(
                    [torch.rand((), generator=generators[i], dtype=torch.float64) for i in alive]
                )
                tokens, logps = _sample(
                    out.logits[:, -1].float(), [requests[i] for i in alive], draws
                )
                keep = []
                for row, i in enumerate(alive):
                    samples[i].ids.append(tokens[row])
                    samples[i].logps.append(logps[row])
                    if tokens[row] in self.stop_ids:
                        samples[i] = Sample(samples[i].ids, samples[i].logps, "stop")
                    elif len(samples[i].ids) < requests[i].max_new_tokens:
                        keep.append(row)
                if len(keep) < len(alive):
                    cache.batch_select_indices(
                        torch.tensor(keep, dtype=torch.long, device=self.device)
                    )
                alive = [alive[row] for row in keep]
                ids = torch.tensor([[tokens[row]] for row in keep], device=self.device)
                attention = torch.cat([attention[keep], attention.new_ones(len(keep), 1)], 1)
                position = position[keep][:, -1:] + 1
        return samples

    def load_weights(self, pairs) -> None:
        import torch

        own = self.model.state_dict()
        with torch.no_grad():
            for name, value in _all_names(pairs, set(own)):
                own[name].copy_(value)


def _sample(logits, requests, draws):
    """logits (B, V) -> token ids and log-probs; inverse CDF on one uniform draw a row; temperature
    0 takes the best.
    """
    import torch

    temperature = torch.tensor([r.temperature or 1.0 for r in requests], device=logits.device)[
        :, None
    ]
    logps = torch.log_softmax(logits / temperature, -1)
    probs = logps.double().exp()
    top_p = torch.tensor([r.top_p for r in requests], device=logits.device, dtype=torch.float64)[
        :, None
    ]
    if (top_p < 1).any():
        ordered, order = probs.sort(-1, descending=True)
        beyond = (ordered.cumsum(-1) - ordered) >= top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
    cumulative = probs.cumsum(-1)
    drawn = torch.searchsorted(
        cumulative, draws.to(logits.device)[:, None] * cumulative[:, -1:], right=True
    )[:, 0]
    greedy = torch.tensor([not r.temperature for r in requests], device=logits.device)
    tokens = torch.where(greedy, logits.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
    return tokens.tolist(), logps.gather(1, tokens[:, None])[:, 0].tolist()


def _all_names(pairs, expected: set[str]):
    """Passes the pairs through; a missing or unknown name is an error: a stale tensor raises
    nothing by itself.
    """
    seen = set()
    for name, value in pairs:
        seen.add(name)
        if name not in expected:
            raise ValueError(f"weight sync: unknown weight {name}")
        yield name, value
    if expected - seen:
        raise ValueError(f"weight sync: weights left out: {', '.join(sorted(expected - seen)[:5])}")


class VLLMEngine:
    """vLLM in this process: a continuous loop over add_request and step, driven from a worker
    thread.
    """

    def __init__(self, folder, stop_ids, *, config=None, max_context, tp_group=None):
        config = config or EngineConfig()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from vllm import LLM

        cuda = torch.cuda.is_available()
        if not cuda:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        options = (
            dict(distributed_executor_backend="external_launcher") if "RANK" in os.environ else {}
        )
        gpu = dict(gpu_memory_utilization=config.memory_share, enable_sleep_mode=config.sleep)
        options |= gpu if cuda else dict(enforce_eager=True)
        self.llm = LLM(
            folder,
            dtype="bfloat16" if cuda else "float32",
            max_model_len=max_context,
            tensor_parallel_size=config.tensor_parallel,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            enable_prefix_caching=True,
            seed=0,
            **options,
        )
        with torch.device("meta"):
            self.names = set(
                AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
            )
        self.stop_ids, self.sleeps, self.group = list(stop_ids), config.sleep and cuda, tp_group
        self.waiting, self.futures, self.pump, self.count = [], {}, None, 0
        self.stepping = threading.Lock()
        self.busy_seconds = 0.0

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0) -> Sample:
        options = dict(max_tokens=max_new_tokens, temperature=temperature, seed=seed, top_p=top_p)
        self.count += 1
        name, done = str(self.count), asyncio.get_running_loop().create_future()
        self.waiting.append((name, list(ids), options))
        self.futures[name] = done
        if self.pump is None or self.pump.done():
            self.pump = asyncio.create_task(self._pump())
        return await done

    async def _pump(self):
        """Steps while anything runs; requests that arrive meanwhile join at the next step."""
        try:
            while self.futures:
                added, self.waiting = self.waiting, []
                for name, sample in await asyncio.to_thread(self._lead, added):
                    self.futures.pop(name).set_result(sample)
        except Exception as error:  # every chain that waits must hear why
            for done in self.futures.values():
                done.set_exception(error)
            self.futures, self.waiting = {}, []

    def _lead(self, added) -> list[tuple[str, Sample]]:
        with self.stepping:
            self._tell(added)
            return self._step(added)

    def _step(self, added) -> list[tuple[str, Sample]]:
        from vllm import SamplingParams

        engine, began = self.llm.llm_engine, time.perf_counter()
        for name, ids, options in added:
            fixed = dict(
                logprobs=0, stop_token_ids=self.stop_ids, ignore_eos=True, detokenize=False
            )
            engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(**options, **fixed))
        finished = [(o.request_id, _vllm_sample(o.outputs[0])) for o in engine.step() if o.finished]
        self.busy_seconds += time.perf_counter() - began
        return finished

    def _tell(self, message) -> None:
        # every rank of a tensor-parallel group schedules for itself: the leader tells the others
        # what it adds
        if self.group is not None:
            import torch.distributed as dist

            dist.broadcast_object_list(
                [message], src=dist.get_global_rank(self.group, 0), group=self.group
            )

    def follow(self) -> None:
        """A tensor-parallel rank that does not lead: repeats the leader's steps until `finish`."""
        import torch.distributed as dist

        while True:
            message = [None]
            dist.broadcast_object_list(
                message, src=dist.get_global_rank(self.group, 0), group=self.group
            )
            if message[0] is None:
                return
            self._step(message[0])

    def finish(self) -> None:
        """The leader's end of a rollout phase, also of one that failed in mid-step."""
        with self.stepping:
            self._tell(None)

    def sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)

    def load_weights(self, pairs) -> None:
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        checked = _all_names(pairs, self.names)
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=checked))
        for left in checked:  # the check of the names runs at the end of the iterator
            raise ValueError(f"weight sync: vLLM did not read {left[0]}")
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM kept its prefix cache after a weight sync: are requests still running?"
            )


def _vllm_sample(output) -> Sample:
    logps = [entry[token].logprob for entry, token in zip(output.logprobs or [], output.token_ids)]
    reason = output.finish_reason if output.finish_reason in ("stop", "length") else "abort"
    return Sample(list(output.token_ids), logps, reason)


async def run_together(coroutines, max_live: int = 0, on_done=None) -> list:
    """Runs chains side by side, at most `max_live` at a time (0: all); results in the order
    given.
    """
    coroutines, rounds = list(coroutines), Rounds.here()
    slots = asyncio.Semaphore(max_live or max(len(coroutines), 1))

    async def one(chain):
        async with slots:
            rounds.start()
            try:
                result = await chain
            finally:
                rounds.end()
        if on_done:
            on_done(result)
        return result

    return await asyncio.gather(*(one(chain) for chain in coroutines))


def engine_class(kind: str):
    """vllm | hf | path/to/file.py:Class -> the class; SystemExit for anything else."""
    known = {"vllm": VLLMEngine, "hf": HFEngine}
    if kind in known:
        return known[kind]
    path, _, name = kind.partition(".py:")
    if not name:
        raise SystemExit(f"engine = {kind!r}: vllm, hf or path/to/file.py:Class")
    found = load_script(path + ".py")
    if not hasattr(found, name):
        raise SystemExit(f"engine = {kind!r}: {path}.py has no {name}")
    return getattr(found, name)


def make_engine(
    config: EngineConfig, folder: str, stop_ids, *, max_context: int, tp_group=None
) -> Engine:
    """The engine that `config` names, with the model of `folder`."""
    if not (Path(folder) / "config.json").is_file() and Path(folder).exists():
        raise SystemExit(f"{folder} is not a model folder: it has no config.json")
    make = engine_class(config.kind)
    return make(folder, stop_ids, config=config, max_context=max_context, tp_group=tp_group)
