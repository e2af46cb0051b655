"""Engines: generate(ids, …) and load_weights(pairs), by transformers and vLLM in this process."""

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import gc
import os
import queue
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from reagent.config import load_script
from reagent.folder import refuse_code

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sample:
    """Sampled ids, their log-probs under the sampling distribution, stop|length|abort."""

    ids: list[int]
    logps: list[float]
    finish_reason: str


@dataclass(frozen=True)
class EngineConfig:
    """How the sampler runs; `--engine=vllm` is short for `--engine.kind=vllm`."""

    kind: str = "vllm"  # vllm | hf (transformers, for laptops) | path/to/file.py:Class
    tensor_parallel: int = 1  # adjacent ranks that share an engine
    memory_share: float = 0.6  # of the GPU
    sleep: bool = True  # it gives its memory back while the policy trains
    max_live_chains: int = 0  # at a time on one engine; 0: what vLLM's KV cache holds


class Engine(Protocol):
    """What the loop needs of a sampler; `sleep`, `close`, `follow`, `finish` and `holds`, how many
    chains live in it at a time, are optional. A chain whose time is over cancels `generate`. Yours
    is made as Class(folder, stop_ids, config=EngineConfig, max_context=n, tp_group=None); log-probs
    are those at `temperature`, the stop token's is among them."""

    async def generate(
        self, ids: list[int], *, max_new_tokens: int, temperature: float, seed: int, top_p: float
    ) -> Sample: ...

    def load_weights(self, pairs: Iterable[tuple[str, "torch.Tensor"]]) -> None: ...


@dataclass(frozen=True)
class Request:
    """What a chain asks an engine for; tensor-parallel ranks tell it each other."""

    ids: list[int]
    max_tokens: int
    temperature: float
    seed: int
    top_p: float


class Rounds:
    """The chains of an event loop; its HFEngines compute when all of them wait for one.
    The agent's, which is asked first, goes first: judgments then come in few large batches."""

    _of_loop: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()

    def __init__(self):
        self.live = 0  # chains
        self.engines: dict[HFEngine, None] = {}  # in the order of their first request

    @classmethod
    def here(cls) -> "Rounds":
        """Those of the running event loop."""
        return cls._of_loop.setdefault(asyncio.get_running_loop(), cls())

    def ready(self) -> bool:
        return sum(len(engine.queue) for engine in self.engines) >= self.live > 0

    def check(self):
        if self.ready():
            first = next(engine for engine in self.engines if engine.queue)
            asyncio.get_running_loop().call_soon(first.run_round)


class HFEngine:
    """transformers as the sampler, without vLLM: in rounds, so a run can be repeated to the bit."""

    max_batch = 64

    def __init__(self, folder: str, stop_ids: Iterable[int], **_):
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        self.model = model.to(self.device).eval()
        self.stop_ids = set(stop_ids)
        self.queue: list[tuple[Request, asyncio.Future]] = []

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0) -> Sample:
        done, rounds = asyncio.get_running_loop().create_future(), Rounds.here()
        options = dict(max_tokens=max_new_tokens, temperature=temperature, seed=seed, top_p=top_p)
        waits = Request(ids, **options), done
        self.queue.append(waits)
        rounds.engines.setdefault(self)
        rounds.check()
        try:
            return await done
        except asyncio.CancelledError:
            if waits in self.queue:
                self.queue.remove(waits)
            raise

    def run_round(self):
        if not Rounds.here().ready():  # a chain was added meanwhile
            return
        queue, self.queue = sorted(self.queue, key=lambda of: (len(of[0].ids), of[0].seed)), []
        for i in range(0, len(queue), self.max_batch):
            requests, chains = zip(*queue[i : i + self.max_batch])
            for done, sample in zip(chains, self._decode(requests)):
                done.set_result(sample)

    def _decode(self, requests) -> list[Sample]:
        import torch
        from transformers import DynamicCache

        width, device = max(len(r.ids) for r in requests), self.device
        pads = [[0] * (width - len(r.ids)) for r in requests]
        ids = torch.tensor([p + list(r.ids) for p, r in zip(pads, requests)], device=device)
        attention = [p + [1] * len(r.ids) for p, r in zip(pads, requests)]
        attention = torch.tensor(attention, device=device)
        position = (attention.cumsum(1) - 1).clamp(min=0)
        rngs = [torch.Generator().manual_seed(r.seed) for r in requests]
        samples = [Sample([], [], "length") for _ in requests]
        alive, cache = list(range(len(requests))), DynamicCache(config=self.model.config)
        with torch.inference_mode():
            while alive:
                step = dict(input_ids=ids, attention_mask=attention, position_ids=position)
                out = self.model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                draws = [torch.rand((), generator=rngs[i], dtype=torch.float64) for i in alive]
                asked, logits = [requests[i] for i in alive], out.logits[:, -1].float()
                tokens, logps = _sample(logits, asked, torch.stack(draws))
                keep = []
                for row, i in enumerate(alive):
                    samples[i].ids.append(tokens[row])
                    samples[i].logps.append(logps[row])
                    if tokens[row] in self.stop_ids:
                        samples[i] = Sample(samples[i].ids, samples[i].logps, "stop")
                    elif len(samples[i].ids) < requests[i].max_tokens:
                        keep.append(row)
                if len(keep) < len(alive):
                    cache.batch_select_indices(torch.tensor(keep, dtype=torch.long, device=device))
                alive = [alive[row] for row in keep]
                ids = torch.tensor([[tokens[row]] for row in keep], device=device)
                attention = torch.cat([attention[keep], attention.new_ones(len(keep), 1)], 1)
                position = position[keep][:, -1:] + 1
        return samples

    def load_weights(self, pairs) -> None:
        own = self.model.state_dict()
        for name, value in _all_names(pairs, set(own)):
            own[name].copy_(value)

    def close(self) -> None:
        self.model = None


def _sample(logits, requests, draws):
    """logits (B, V) -> ids, log-probs; inverse CDF of one uniform draw a row, greedy at 0."""
    import torch

    temperature = torch.tensor([[r.temperature or 1.0] for r in requests], device=logits.device)
    logps = torch.log_softmax(logits / temperature, -1)
    probs = logps.double().exp()
    top_p = torch.tensor([[r.top_p] for r in requests], device=logits.device, dtype=torch.float64)
    if (top_p < 1).any():
        ordered, order = probs.sort(-1, descending=True)
        beyond = (ordered.cumsum(-1) - ordered) >= top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
    cumulative = probs.cumsum(-1)
    below = draws.to(logits.device)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, below, right=True)[:, 0]
    greedy = torch.tensor([not r.temperature for r in requests], device=logits.device)
    tokens = torch.where(greedy, logits.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
    return tokens.tolist(), logps.gather(1, tokens[:, None])[:, 0].tolist()


def _all_names(pairs, expected: set[str]):
    """Passes the pairs through; missing and unknown names are errors: a stale tensor tells none."""
    seen = set()
    for name, value in pairs:
        seen.add(name)
        if name not in expected:
            raise ValueError(f"weight sync: unknown weight {name}")
        yield name, value
    if expected - seen:
        raise ValueError(f"weight sync: weights left out: {', '.join(sorted(expected - seen)[:5])}")


class EngineThread(threading.Thread):
    """The one thread of this process that touches vLLM: builds, steps, loads, puts to sleep. CUDA's
    current device and stream belong to a thread: a new one is on device 0. vLLM captures its graphs
    on the stream of the thread that builds it and keeps the stream of its first step for every
    later copy (model runner V2), and its forward context is one for the process. So device and
    stream are set once, here, and engines that share a process take turns. A job and the thread
    that asked for it see each other's kernels finished: `call` waits for both streams."""

    current: "EngineThread | None" = None

    def __init__(self):
        super().__init__(name="engines", daemon=True)
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()  # functions, called between two steps
        self.engines: list[VLLMEngine] = []
        self.stopping = False
        atexit.register(self.stop)  # a step that runs when the process ends is let finish

    @classmethod
    def shared(cls) -> "EngineThread":
        if cls.current is None or cls.current.stopping:
            cls.current = cls()
            cls.current.start()
        return cls.current

    def run(self):
        import torch

        from reagent.run import local_device

        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
            torch.cuda.set_stream(torch.cuda.Stream())
        while not self.stopping:
            busy = [engine for engine in self.engines if engine.waiting or engine.added]
            with contextlib.suppress(queue.Empty):
                self.jobs.get(block=not busy)()
                while not self.stopping:
                    self.jobs.get_nowait()()
            for engine in busy:
                engine.advance()

    def call(self, work, *args):
        """work(*args) in the thread, between two steps; its result or its error, whatever kind."""
        done: concurrent.futures.Future = concurrent.futures.Future()

        def job():
            try:
                result = work(*args)
                _finish_kernels()
                done.set_result(result)
            except BaseException as error:
                done.set_exception(error)

        _finish_kernels()
        self.jobs.put(job)
        return done.result()

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self.jobs.put(functools.partial(setattr, self, "stopping", True))
        self.join(timeout=10)


def _finish_kernels() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _in_thread(method):
    """A method of VLLMEngine that the thread of engines runs, between two steps."""

    @functools.wraps(method)
    def called(self, *args):
        return self.thread.call(method, self, *args)

    return called


class VLLMEngine:
    """vLLM in this process, stepped by the thread of engines: requests go in by a queue, samples
    come back by call_soon_threadsafe, and while anything runs the loop waits for nobody. `sleep`
    gives the card's memory back, weights included; `load_weights` wakes the engine."""

    def __init__(self, folder, stop_ids, *, config=None, max_context, tp_group=None):
        config = config or EngineConfig()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        cuda = torch.cuda.is_available()
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB, where there is no card
        options = dict(
            dtype="bfloat16" if cuda else "float32",
            max_model_len=max_context,
            tensor_parallel_size=config.tensor_parallel,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
            seed=0,
            trust_remote_code=False,
        )
        if "RANK" in os.environ:
            options["distributed_executor_backend"] = "external_launcher"
        gpu = dict(gpu_memory_utilization=config.memory_share, enable_sleep_mode=config.sleep)
        # the head's products in fp32, as the trainer has them; vLLM's own all-reduce works by
        # CUDA's IPC, which ends the process where memory sleeps or its segments grow
        gpu |= dict(hf_overrides=dict(head_dtype="float32"), disable_custom_all_reduce=True)
        # a CPU's generator cannot take back what half a prompt has drawn, as vLLM then asks of it
        options |= gpu if cuda else dict(enforce_eager=True, enable_chunked_prefill=False)
        own = dict(trust_remote_code=False)
        with torch.device("meta"):
            shape = AutoConfig.from_pretrained(folder, **own)
            self.names = set(AutoModelForCausalLM.from_config(shape, **own).state_dict())
        self.stop_ids, self.group = list(stop_ids), tp_group
        self.sleeps, self.asleep, self.count = config.sleep and cuda, False, 0  # of requests
        # by name what joins at the next step; None: nobody waits for that request any more
        self.added: list[tuple[str, Request | None]] = []
        self.waiting: dict[str, tuple] = {}  # name -> (event loop, future) of its chain
        self.thread = EngineThread.shared()
        self._build(folder, options)

    @_in_thread
    def _build(self, folder, options) -> None:
        from vllm import LLM

        try:
            self.llm = LLM(folder, **options)
        except ValueError as error:  # pydantic's
            told = f"vLLM refuses {folder} (max_model_len: --max_context, --rrm.max_context)"
            raise SystemExit(f"{told}: {' '.join(str(error).split())}") from error
        self.thread.engines.append(self)
        cache = self.llm.llm_engine.vllm_config.cache_config
        # of its longest a live chain has half on average; one that waits for a tool may be evicted
        self.holds = int(2 * (cache.kv_cache_max_concurrency or 0))

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0) -> Sample:
        if self.asleep or self.llm is None:
            raise RuntimeError("the engine sleeps or is closed: load_weights comes before requests")
        options = dict(max_tokens=max_new_tokens, temperature=temperature, seed=seed, top_p=top_p)
        self.count += 1
        name, request = str(self.count), Request(list(ids), **options)
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def join():
            self.added.append((name, request))
            self.waiting[name] = loop, done

        def leave():
            if self.waiting.pop(name, None):
                self.added.append((name, None))

        self.thread.jobs.put(join)
        try:
            return await done
        except asyncio.CancelledError:
            self.thread.jobs.put(leave)
            raise

    def advance(self) -> None:
        """One step: requests that arrived meanwhile join, samples that are whole go back."""
        try:
            added, self.added = self.added, []
            self._broadcast([added])
            for name, result in self._step(added):
                if name in self.waiting:
                    _answer(*self.waiting.pop(name), result)
        except Exception as error:  # every chain that waits must hear why
            self._drop_requests(error)

    def _drop_requests(self, error: Exception) -> None:
        left, self.waiting, self.added = self.waiting, {}, []
        for loop, done in left.values():
            _answer(loop, done, error)
        with contextlib.suppress(Exception):  # an engine that broke may not even do this
            self.llm.llm_engine.abort_request([*left])

    def _step(self, added: list[tuple[str, Request | None]]) -> list[tuple]:
        """-> (name, vLLM's output or the error) of each request that has ended."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, finished = self.llm.llm_engine, []
        fixed = dict(logprobs=0, stop_token_ids=self.stop_ids, ignore_eos=True, detokenize=False)
        fixed["output_kind"] = RequestOutputKind.FINAL_ONLY  # no partial outputs at every step
        for name, request in added:
            if request is None:
                engine.abort_request([name])
                continue
            options = vars(request) | fixed
            prompt = {"prompt_token_ids": options.pop("ids")}
            try:
                engine.add_request(name, prompt, SamplingParams(**options))
            except ValueError as error:  # this request is at fault, not the others
                finished.append((name, error))
        finished += [(end.request_id, end.outputs[0]) for end in engine.step() if end.finished]
        return finished

    def _broadcast(self, message: list) -> None:
        """Every tensor-parallel rank schedules for itself: the leader says what it adds."""
        if self.group is not None:
            import torch.distributed as dist

            dist.broadcast_object_list(message, dist.get_global_rank(self.group, 0), self.group)

    @_in_thread
    def follow(self) -> None:
        """A tensor-parallel rank that does not lead: repeats the leader's steps until `finish`."""
        message = [None]
        self._broadcast(message)
        while message[0] is not None:
            self._step(message[0])
            self._broadcast(message)

    @_in_thread
    def finish(self) -> None:
        """The leader's end of a rollout phase, also of one that failed in mid-step."""
        if self.added:
            self.advance()
        self._drop_requests(RuntimeError("the rollout has ended"))
        self._broadcast([None])

    @_in_thread
    def sleep(self) -> None:
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    @_in_thread
    def load_weights(self, pairs) -> None:
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        checked = _all_names(pairs, self.names)
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=checked))
        for left in checked:  # the check of the names runs at the end of the iterator
            raise ValueError(f"weight sync: vLLM did not read {left[0]}")
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after a weight sync: requests still run")
        self.asleep = False

    @_in_thread
    def close(self) -> None:
        """Frees the engine; process groups stay, which the trainer or another engine may share."""
        import torch

        self._drop_requests(RuntimeError("the engine is closed"))
        self.thread.engines.remove(self)
        client = self.llm.llm_engine.engine_core
        client._finalizer.detach()  # vLLM's own shutdown also ends all of torch.distributed
        client.engine_core.model_executor.shutdown()
        client.engine_core.scheduler.shutdown()
        self.llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _answer(loop, done, result) -> None:
    """Settles a chain's future with vLLM's output or an error, in its own loop, from any thread."""

    def settle():
        if done.done():
            return  # the chain was cancelled
        if isinstance(result, Exception):
            done.set_exception(result)
        else:
            ids, reason = list(result.token_ids), result.finish_reason
            logps = [entry[token].logprob for entry, token in zip(result.logprobs or [], ids)]
            done.set_result(Sample(ids, logps, reason if reason in ("stop", "length") else "abort"))

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(settle)


async def run_together(coroutines, max_live: int = 0, on_done=None) -> list:
    """Runs chains side by side, at most `max_live` at a time (0: all); results in their order."""
    coroutines, rounds = list(coroutines), Rounds.here()
    slots = asyncio.Semaphore(max_live or max(len(coroutines), 1))

    async def one(chain):
        with contextlib.closing(chain):  # also of one that another's error keeps from its turn
            async with slots:
                rounds.live += 1
                try:
                    result = await chain
                finally:
                    rounds.live -= 1
                    rounds.check()
        if on_done:
            on_done(result)
        return result

    return await asyncio.gather(*(one(chain) for chain in coroutines))


def engine_class(kind: str):
    """vllm | hf | path/to/file.py:Class -> the class; SystemExit for anything else."""
    known = {"vllm": VLLMEngine, "hf": HFEngine}
    if kind == "vllm" and not find_spec("vllm"):
        raise SystemExit("engine = 'vllm': it is not installed (make gpu); --engine=hf needs none")
    if kind in known:
        return known[kind]
    path, _, name = kind.partition(".py:")
    if not name:
        raise SystemExit(f"engine = {kind!r}: vllm, hf or path/to/file.py:Class")
    found = getattr(load_script(path + ".py"), name, None)
    if found is None:
        raise SystemExit(f"engine = {kind!r}: {path}.py has no {name}")
    if lacking := [of for of in ("generate", "load_weights") if not hasattr(found, of)]:
        raise SystemExit(f"engine = {kind!r}: {name} has no {' and no '.join(lacking)}")
    return found


def make_engine(config: EngineConfig, folder: str, stop_ids, *, max_context, tp_group=None):
    """The Engine that `config` names, with the model of `folder`."""
    if not (Path(folder) / "config.json").is_file() and Path(folder).exists():
        raise SystemExit(f"{folder} is not a model folder: it has no config.json")
    refuse_code(folder)
    make = engine_class(config.kind)
    return make(folder, stop_ids, config=config, max_context=max_context, tp_group=tp_group)


def rest(engine: Engine | None) -> None:
    """Puts an engine to sleep whose class can; `load_weights` wakes it."""
    if hasattr(engine, "sleep"):
        engine.sleep()


def close(engine: Engine | None) -> None:
    """Frees an engine whose class can, before torch.distributed ends, which vLLM's would end."""
    if hasattr(engine, "close"):
        engine.close()
