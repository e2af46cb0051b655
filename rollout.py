"""Rollouts: engines, the agent loop, critique and refinement, the client of the reasoning reward model (Agent-RRM).

A chain is one coroutine: first attempt -> judge -> refined attempt -> judge (paper section 3.3, Reagent-U). All share
one engine and wait for nobody but the tools and the judge they called. Tokens in, tokens out: ids are append-only, the
mask is written when a token is appended, history is never rendered again.
"""

import asyncio
import copy
import hashlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from rows import after_thoughts

SYSTEM_PROMPT = (
    "You answer questions with the help of tools. Think before you act, call a tool whenever a fact is missing, and "
    "check what you found. When you are sure, give the final answer inside \\boxed{}."
)
REFINE_PROMPT = (
    "A reviewer read your attempt and wrote:\n{critique}\nTake the review into account and solve the question again. "
    "Tools are still available. Give the final answer inside \\boxed{}."
)
FINAL_PROMPT = "No further tool calls are possible. Give the final answer now, inside \\boxed{}."
RRM_PROMPT = (
    "You review the work of an agent that answers questions with tools. Judge how it worked: the reasoning, the choice "
    "and the use of tools, and whether the answer follows from what the tools returned. Never state the correct answer "
    "yourself.\nReply with exactly three blocks:\n<think>your analysis of the trajectory, step by step</think>\n"
    "<critique>a short review that the agent will read: what was wrong or missing, what to do better</critique>\n"
    "<score>a number from 0 to 1 for the quality of the trajectory</score>"
)
JUDGE_REQUEST = "Question:\n{question}\n\nTrajectory of the agent:\n{trajectory}"
JUDGE_TEMPERATURE = 0.3  # of a judge at work, also in its report
LEFT_OUT = "[result left out: no room]"


# ---------------------------------------------------------------------------------------------------------------------
# records


@dataclass
class Attempt:
    """One attempt of a chain. `span` and `messages` are [a, b) ranges of the episode's ids and messages."""

    span: tuple[int, int]
    messages: tuple[int, int]
    answer: str | None
    termination: str  # answered|no_answer|turn_limit|turn_tokens|token_limit|context_limit|fault|aborted
    seed: int
    calls: list[dict] = field(default_factory=list)  # name, arguments, status, seconds, turn
    rule_reward: float | None = None
    correct: bool | None = None
    score: float | None = None
    think: str | None = None
    critique: str | None = None
    reward: float | None = None  # None: not in the pool


@dataclass
class Episode:
    """One chain: token ids, mask (1 = sampled by the policy), the sampler's logps at the sampled tokens, attempts."""

    id: str
    question: str
    gold: list[str]
    ids: list[int]
    mask: list[int]
    logps: list[float]
    messages: list[dict]
    policy_version: int
    attempts: list[Attempt] = field(default_factory=list)
    dropped: str = ""  # why the chain is left out of training altogether
    meta: dict = field(default_factory=dict)

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """Limits of one attempt; tokens count everything after the attempt's prompt, tool results included."""

    max_turns: int = 13
    max_new_tokens_per_turn: int = 4096
    max_tokens_per_attempt: int = 11_000
    max_context: int = 32_768  # tokens of a whole chain
    final_tokens: int = 512  # kept free for the call for a final answer and that answer
    force_answer: bool = True


@dataclass(frozen=True)
class Sample:
    """What an engine returns: sampled ids, their log-probs under the sampling distribution, stop|length|abort."""

    ids: list[int]
    logps: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Judgment:
    think: str
    critique: str
    score: float


def seed_of(*parts) -> int:
    """A seed below 2^62 from (run seed, step, sibling, task, stage, turn, role, retry): all different, repeatable."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


# ---------------------------------------------------------------------------------------------------------------------
# reading what models write


def extract_answer(text: str) -> str | None:
    """The content of the last balanced \\boxed{} after the thoughts, or None where there is none or it is blank."""
    text = after_thoughts(text)
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i].strip() or None
    return None


_SCORE = r"0(?:\.\d{1,6})?|1(?:\.0{1,6})?|\.\d{1,6}"
_BLOCKS = re.compile(rf"\s*<critique>(.*?)</critique>\s*<score>\s*({_SCORE})\s*</score>\s*", re.S)
_TAG = re.compile(r"</?(?:think|critique|score)>")


def parse_judgment(text: str) -> Judgment | None:
    """Exactly <think>…</think><critique>…</critique><score>s</score> with a plain s in [0, 1]; else None (invalid).

    Critique and score are read after the last </think>, so a score inside the analysis never wins.
    """
    if len(text) > 100_000:
        return None
    head, closer, rest = text.rpartition("</think>")
    head = head.strip()
    match = _BLOCKS.fullmatch(rest)
    if not closer or not head.startswith("<think>") or not match:
        return None
    think, critique = head[len("<think>") :].strip(), match[1].strip()
    if not think or not critique or "<think>" in think or "</think>" in think or _TAG.search(critique):
        return None
    return Judgment(think, critique, float(match[2]))


_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.S)


def parse_calls(text: str) -> list[tuple[str, object, str]]:
    """The tool calls of a turn, after its thoughts, as (name, arguments, error text or "")."""
    calls = []
    for match in _CALL.finditer(after_thoughts(text)):
        if not match[0].endswith("</tool_call>"):
            calls.append(("", {}, "The tool call has no closing </tool_call>."))
            continue
        try:
            call = json.loads(match[1], object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            calls.append(("", {}, f"The tool call is not valid JSON: {str(error)[:200]}"))
            continue
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            calls.append(("", {}, 'A tool call is {"name": ..., "arguments": {...}}.'))
        else:
            calls.append((call["name"], call.get("arguments", {}), ""))
    return calls


def _no_duplicates(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


# ---------------------------------------------------------------------------------------------------------------------
# engines: generate(ids, …) and load_weights(pairs)


class Rounds:
    """Counts live chains and those that wait for an engine; an HFEngine computes when all that live are waiting.

    The first engine that has requests: the agent's before the judge's, so that judgments come in few large batches.
    """

    def __init__(self):
        self.live = self.waiting = 0
        self.engines: list[HFEngine] = []

    def start(self):
        self.live += 1

    def end(self):
        self.live -= 1
        self.check()

    def check(self):
        if self.live and self.waiting >= self.live:
            engine = next(e for e in self.engines if e.queue)
            asyncio.get_running_loop().call_soon(engine.run_round)


class HFEngine:
    """transformers as the sampler, for machines without vLLM: batches in rounds, so a run can be repeated to the bit."""

    max_batch = 64

    def __init__(self, folder: str, stop_ids: Iterable[int], rounds: Rounds):
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        self.stop_ids, self.rounds, self.queue = set(stop_ids), rounds, []
        self.busy_seconds = 0.0
        rounds.engines.append(self)

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0) -> Sample:
        done = asyncio.get_running_loop().create_future()
        self.queue.append((ids, max_new_tokens, temperature, seed, top_p, done))
        self.rounds.waiting += 1
        self.rounds.check()
        return await done

    def run_round(self):
        if self.rounds.waiting < self.rounds.live:  # a chain was added meanwhile
            return
        requests, self.queue = sorted(self.queue, key=lambda r: (len(r[0]), r[3])), []
        began = time.perf_counter()
        for i in range(0, len(requests), self.max_batch):
            batch = requests[i : i + self.max_batch]
            for request, sample in zip(batch, self._decode(batch)):
                self.rounds.waiting -= 1
                request[5].set_result(sample)
        self.busy_seconds += time.perf_counter() - began

    def _decode(self, requests) -> list[Sample]:
        import torch
        from transformers import DynamicCache

        width = max(len(r[0]) for r in requests)
        ids = torch.tensor([[0] * (width - len(r[0])) + list(r[0]) for r in requests], device=self.device)
        attention = torch.tensor([[0] * (width - len(r[0])) + [1] * len(r[0]) for r in requests], device=self.device)
        position = (attention.cumsum(1) - 1).clamp(min=0)
        generators = [torch.Generator().manual_seed(r[3]) for r in requests]
        samples = [Sample([], [], "length") for _ in requests]
        alive, cache = list(range(len(requests))), DynamicCache(config=self.model.config)
        with torch.inference_mode():
            while alive:
                step = dict(input_ids=ids, attention_mask=attention, position_ids=position)
                out = self.model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                draws = torch.tensor([torch.rand((), generator=generators[i], dtype=torch.float64) for i in alive])
                tokens, logps = _sample(out.logits[:, -1].float(), [requests[i] for i in alive], draws)
                keep = []
                for row, i in enumerate(alive):
                    samples[i].ids.append(tokens[row])
                    samples[i].logps.append(logps[row])
                    if tokens[row] in self.stop_ids:
                        samples[i] = Sample(samples[i].ids, samples[i].logps, "stop")
                    elif len(samples[i].ids) < requests[i][1]:
                        keep.append(row)
                if len(keep) < len(alive):
                    cache.batch_select_indices(torch.tensor(keep, dtype=torch.long, device=self.device))
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
    """logits (B, V) -> token ids and log-probs; inverse CDF on one uniform draw a row; temperature 0 takes the best."""
    import torch

    temperature = torch.tensor([r[2] or 1.0 for r in requests], device=logits.device)[:, None]
    logps = torch.log_softmax(logits / temperature, -1)
    probs = logps.double().exp()
    top_p = torch.tensor([r[4] for r in requests], device=logits.device, dtype=torch.float64)[:, None]
    if (top_p < 1).any():
        ordered, order = probs.sort(-1, descending=True)
        beyond = (ordered.cumsum(-1) - ordered) >= top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0.0)
    cumulative = probs.cumsum(-1)
    drawn = torch.searchsorted(cumulative, draws.to(logits.device)[:, None] * cumulative[:, -1:], right=True)[:, 0]
    greedy = torch.tensor([not r[2] for r in requests], device=logits.device)
    tokens = torch.where(greedy, logits.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
    return tokens.tolist(), logps.gather(1, tokens[:, None])[:, 0].tolist()


def _all_names(pairs, expected: set[str]):
    """Passes the pairs through; a missing or unknown name is an error: a stale tensor raises nothing by itself."""
    seen = set()
    for name, value in pairs:
        seen.add(name)
        if name not in expected:
            raise ValueError(f"weight sync: unknown weight {name}")
        yield name, value
    if expected - seen:
        raise ValueError(f"weight sync: weights left out: {', '.join(sorted(expected - seen)[:5])}")


class VLLMEngine:
    """vLLM in this process: a continuous loop over add_request and step, driven from a worker thread."""

    def __init__(self, folder, stop_ids, *, max_context, gpu_memory_share=0.85, sleep=False, tp_group=None, tp_size=1):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from vllm import LLM

        cuda = torch.cuda.is_available()
        if not cuda:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        options = dict(distributed_executor_backend="external_launcher") if "RANK" in os.environ else {}
        gpu = dict(gpu_memory_utilization=gpu_memory_share, enable_sleep_mode=sleep)
        options |= gpu if cuda else dict(enforce_eager=True)
        self.llm = LLM(
            folder,
            dtype="bfloat16" if cuda else "float32",
            max_model_len=max_context,
            tensor_parallel_size=tp_size,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            enable_prefix_caching=True,
            seed=0,
            **options,
        )
        with torch.device("meta"):
            self.names = set(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict())
        self.stop_ids, self.sleeps, self.group = list(stop_ids), sleep, tp_group
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
        except Exception as error:  # noqa: BLE001 - every chain that waits must hear why
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
            fixed = dict(logprobs=0, stop_token_ids=self.stop_ids, ignore_eos=True, detokenize=False)
            engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(**options, **fixed))
        finished = [(o.request_id, _vllm_sample(o.outputs[0])) for o in engine.step() if o.finished]
        self.busy_seconds += time.perf_counter() - began
        return finished

    def _tell(self, message) -> None:
        # every rank of a tensor-parallel group schedules for itself: the leader tells the others what it adds
        if self.group is not None:
            import torch.distributed as dist

            dist.broadcast_object_list([message], src=dist.get_global_rank(self.group, 0), group=self.group)

    def follow(self) -> None:
        """A tensor-parallel rank that does not lead: repeats the leader's steps until `finish`."""
        import torch.distributed as dist

        while True:
            message = [None]
            dist.broadcast_object_list(message, src=dist.get_global_rank(self.group, 0), group=self.group)
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
            raise RuntimeError("vLLM kept its prefix cache after a weight sync: are requests still running?")


def _vllm_sample(output) -> Sample:
    logps = [entry[token].logprob for entry, token in zip(output.logprobs or [], output.token_ids)]
    reason = output.finish_reason if output.finish_reason in ("stop", "length") else "abort"
    return Sample(list(output.token_ids), logps, reason)


# ---------------------------------------------------------------------------------------------------------------------
# the judge


class Judge:
    """The client of a reasoning reward model: asks, parses strictly, retries at a fresh seed, counts, gives up."""

    def __init__(self, ask: Callable[..., Awaitable[str]], *, size=len, room=1_000_000, retries=3):
        self.ask, self.size, self.room, self.retries = ask, size, room, retries
        self.asked = self.failed = self.invalid_replies = 0

    async def __call__(self, question: str, messages: list[dict], key: tuple) -> Judgment | None:
        """Judges one attempt (paper section 3.2) without the gold answer; None: no valid judgment was to be had."""
        self.asked += 1
        trajectory = fit_trajectory(messages, self.room - self.size(question), self.size)
        for retry in range(self.retries if trajectory is not None else 0):
            try:
                judgment = parse_judgment(await self.ask(question, messages, trajectory, seed_of(*key, "judge", retry)))
            except JudgeDown as down:
                print(f"judge: {down}", file=sys.stderr)
                break
            if judgment:
                return judgment
            self.invalid_replies += 1
        self.failed += 1
        return None


class JudgeDown(Exception):
    """No judge answered in time; its attempt leaves the pool."""


def trajectory_text(messages: list[dict], cap: int | None = None) -> str:
    """The transcript a judge reads. `cap`: tool results longer than that many characters are cut in their middle."""
    parts = []
    for message in messages:
        text = message["content"]
        if message["role"] == "tool" and cap is not None and len(text) > cap:
            half = cap // 2
            text = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[len(text) - half:]}"
        parts.append(f"[{message['role']}]\n{text}")
    return "\n".join(parts)


def fit_trajectory(messages: list[dict], room: int, size: Callable[[str], int]) -> str | None:
    """Shortens long tool results until size(text) <= room; the end is never cut. None: it cannot fit."""
    cap = max((len(m["content"]) for m in messages if m["role"] == "tool"), default=0)
    text = trajectory_text(messages)
    while size(text) > room:
        cap //= 2
        if cap < 32:
            return None
        text = trajectory_text(messages, cap)
    return text


def toy_judge(annotate) -> Judge:
    """The toy's rule annotator behind the judge's interface."""

    async def ask(question, messages, trajectory, seed):
        return annotate(question, messages)

    return Judge(ask)


def engine_judge(engine, chat, *, prompt=RRM_PROMPT, temperature=JUDGE_TEMPERATURE, max_context=32_768,
                 max_new_tokens=1400) -> Judge:
    """A reward model in this process, behind the same engine classes as the policy."""

    async def ask(question, messages, trajectory, seed):
        ids = judge_prompt(chat, question, trajectory, prompt)
        sample = await engine.generate(ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return chat.opened + chat.decode([i for i in sample.ids if i != chat.closer_id])

    overhead = len(judge_prompt(chat, "", "", prompt)) + max_new_tokens
    return Judge(ask, size=lambda text: len(chat.outside(text)), room=max_context - overhead)


def judge_prompt(chat, question: str, trajectory: str, prompt: str = RRM_PROMPT) -> list[int]:
    request = JUDGE_REQUEST.format(question=question, trajectory=trajectory)
    return chat.prompt([{"role": "system", "content": prompt}, {"role": "user", "content": request}], None)


def served_judge(urls: list[str], *, model="", prompt=RRM_PROMPT, temperature=JUDGE_TEMPERATURE, max_context=32_768,
                 max_new_tokens=1400, seconds=60.0, patience_s=120.0, rest_s=10.0, break_tags=lambda text: text) -> Judge:
    """OpenAI-compatible servers: the least busy one is asked; one that fails rests for `rest_s` and is tried again."""
    from openai import AsyncOpenAI, OpenAIError

    key = os.environ.get("RRM_API_KEY", "none")
    clients = [AsyncOpenAI(base_url=url, api_key=key, timeout=seconds, max_retries=0) for url in urls]
    busy, rests_until, names = [0] * len(urls), [0.0] * len(urls), [model] * len(urls)

    async def ask_one(i, request, seed):
        if not names[i]:
            names[i] = (await clients[i].models.list()).data[0].id
        reply = await clients[i].chat.completions.create(
            model=names[i], messages=request, temperature=temperature, max_tokens=max_new_tokens, seed=seed % 2**31
        )
        message = reply.choices[0].message
        analysis = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        return (f"<think>{analysis}</think>" if analysis else "") + (message.content or "")

    async def ask(question, messages, trajectory, seed):
        user = JUDGE_REQUEST.format(question=question, trajectory=trajectory)
        request = [{"role": "system", "content": prompt}, {"role": "user", "content": break_tags(user)}]
        deadline, problem = time.monotonic() + patience_s, None
        while time.monotonic() < deadline:
            awake = [i for i in range(len(urls)) if rests_until[i] <= time.monotonic()]
            if not awake:
                await asyncio.sleep(min(0.5, rest_s))
                continue
            i = min(awake, key=lambda i: busy[i])
            busy[i] += 1
            try:
                return await ask_one(i, request, seed)
            except (OpenAIError, IndexError) as error:
                problem, rests_until[i] = error, time.monotonic() + rest_s
            finally:
                busy[i] -= 1
        raise JudgeDown(f"no answer from {', '.join(urls)} for {patience_s:.0f} s: {problem}")

    return Judge(ask, size=lambda text: len(text) // 3, room=max_context - max_new_tokens - len(prompt) // 3)


def check_served(urls: list[str]) -> None:
    """Health check before the first step: every URL must list a model."""
    from openai import OpenAI, OpenAIError

    for url in urls:
        try:
            OpenAI(base_url=url, api_key=os.environ.get("RRM_API_KEY", "none"), timeout=10, max_retries=1).models.list()
        except OpenAIError as error:
            hint = "start one with `vllm serve <RRM folder> --port …`"
            raise SystemExit(f"no judge answers at {url} ({error}): {hint}") from error


@cache
def toy_script():
    """data/toy/prepare.py as a module: the toy's world, its words and its rule annotator."""
    path = Path(__file__).parent / "data" / "toy" / "prepare.py"
    found = importlib.util.spec_from_file_location("toy_prepare", path)
    toy = importlib.util.module_from_spec(found)
    found.loader.exec_module(toy)
    return toy


def make_judge(spec: str, chat, rounds: Rounds, *, engine: str, max_context: int, prompt=RRM_PROMPT, **served) -> Judge:
    """spec = "http://…/v1[,http://…/v1]": servers | a folder: in this process | "toy": the toy's rule annotator.

    `served` are options of served_judge, for servers only.
    """
    if spec == "toy":
        return toy_judge(toy_script().annotate)
    if spec.startswith("http"):
        urls = spec.split(",")
        check_served(urls)
        return served_judge(urls, prompt=prompt, max_context=max_context, break_tags=chat.broken, **served)
    if not Path(spec).is_dir():
        raise SystemExit(f"no reward model in {spec}: train one with train_rrm.py, or give a URL (--rrm=http://…/v1)")
    from model import load_tokenizer
    from rows import Chat

    judge_chat = Chat(load_tokenizer(spec))
    own = make_engine(engine, spec, judge_chat.stop_ids, rounds, max_context=max_context)
    new = min(1400, max_context // 4)
    return engine_judge(own, judge_chat, prompt=prompt, max_context=max_context, max_new_tokens=new)


# ---------------------------------------------------------------------------------------------------------------------
# the agent loop


@dataclass
class Setup:
    """All that chains of one phase share. `rule_reward(row, answer) -> (reward, correct)` is evaluate.rule_reward."""

    engine: object
    chat: object
    toolbox: object
    limits: Limits
    rule_reward: Callable[[dict, str | None], tuple[float, bool]]
    judge: Judge | None = None
    refine: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    system_prompt: str = SYSTEM_PROMPT
    refine_prompt: str = REFINE_PROMPT
    fixed_critique: str = ""  # used in place of the judge's, for the ablation
    policy_version: int = 0


@cache
def read_prompt(path: str, default: str) -> str:
    """The prompt in a file, or the default where no file is given."""
    return Path(path).read_text() if path else default


def shown_question(row: dict) -> str:
    """The question as the agent reads it, with the names of its files."""
    return row["question"] + "".join(f"\nFile: {name}" for name in row.get("files", []))


async def run_chain(row: dict, setup: Setup, key: tuple) -> Episode:
    """One chain: o1 ~ pi(.|q), (c, s1), o2 ~ pi(.|q, o1, c), s2 (paper section 3.3); `key` = (run seed, step, sibling)."""
    gold = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    question = shown_question(row)
    messages = [{"role": "system", "content": setup.system_prompt}, {"role": "user", "content": question}]
    ids = list(setup.chat.prompt(messages, setup.toolbox.schemas))
    episode = Episode(str(row["id"]), question, gold, ids, [0] * len(ids), [], messages, setup.policy_version)
    episode.meta = dict(row.get("meta") or {})
    key = (*key, episode.id)
    if len(ids) + setup.limits.final_tokens >= setup.limits.max_context:
        episode.dropped = "prompt_too_long"
        return episode
    await run_attempt(episode, row, setup, (*key, 1))
    if setup.judge and not episode.dropped:
        await judge_attempt(episode, setup, (*key, 1))
        if setup.refine and episode.attempts[0].critique is not None:
            await refine(episode, row, setup, setup.fixed_critique or episode.attempts[0].critique, key)
    return episode


async def refine(episode: Episode, row: dict, setup: Setup, critique: str, key: tuple) -> None:
    """Stage 2 goes on with the conversation: a user turn with the critique only, the refined attempt, its score."""
    message = {"role": "user", "content": setup.refine_prompt.replace("{critique}", critique)}
    if not append_fragment(episode, setup, [message], room=setup.limits.max_context - setup.limits.final_tokens - 1):
        return
    await run_attempt(episode, row, setup, (*key, 2))
    if setup.judge and not episode.dropped:
        await judge_attempt(episode, setup, (*key, 2))


async def judge_attempt(episode: Episode, setup: Setup, key: tuple) -> None:
    """Stage 2 is judged on (q, o2) alone: the request holds neither o1 nor its critique."""
    attempt = episode.attempts[-1]
    judgment = await setup.judge(episode.question, episode.messages[slice(*attempt.messages)], key)
    if judgment:
        attempt.think, attempt.critique, attempt.score = judgment.think, judgment.critique, judgment.score


async def run_attempt(episode: Episode, row: dict, setup: Setup, key: tuple) -> None:
    """Turns of the policy and of its tools until an answer or a limit; appends the Attempt to the episode."""
    limits, begin = setup.limits, len(episode.ids)
    attempt = Attempt((begin, begin), (len(episode.messages),) * 2, None, "", seed_of(*key))
    end = min(begin + limits.max_tokens_per_attempt, limits.max_context)  # where the ids must end
    limit, turn = "", 0
    while not attempt.termination:
        left = end - len(episode.ids) - (0 if limit else limits.final_tokens)
        room = min(limits.max_new_tokens_per_turn, max(left, 1))
        seed = seed_of(*key, turn, "policy", 0)
        sample = await setup.engine.generate(
            episode.ids, max_new_tokens=room, temperature=setup.temperature, seed=seed, top_p=setup.top_p
        )
        if sample.finish_reason == "abort":
            attempt.termination = episode.dropped = "aborted"
            break
        text, whole = append_sample(episode, setup.chat, sample)
        if limit:  # this was the forced final turn
            attempt.answer, attempt.termination = extract_answer(text) if whole else None, limit
            break
        calls = parse_calls(text) if whole else []
        if whole and not calls:
            attempt.answer = extract_answer(text)
            attempt.termination = "answered" if attempt.answer is not None else "no_answer"
            break
        if not whole:
            limit = "turn_tokens" if room == limits.max_new_tokens_per_turn else _full(end, limits)
        turn += 1
        results = await observe(calls, row, setup, attempt, turn)
        if any(call["status"] == "fault" for call in attempt.calls):
            attempt.termination = episode.dropped = "fault"
            break
        if not limit and turn >= limits.max_turns:
            limit = "turn_limit"
        limit, goes_on = _append_results(episode, setup, results, limit, end)
        if not goes_on:
            attempt.termination = limit
    attempt.span, attempt.messages = (begin, len(episode.ids)), (attempt.messages[0], len(episode.messages))
    if not episode.dropped:
        attempt.rule_reward, attempt.correct = setup.rule_reward(row, attempt.answer)
    episode.attempts.append(attempt)


def _full(end: int, limits: Limits) -> str:
    return "context_limit" if end == limits.max_context else "token_limit"


def _append_results(episode, setup, results, limit, end) -> tuple[str, bool]:
    """Appends tool results, and at a limit the call for a final answer; returns (the limit or "", another turn?)."""
    force = setup.limits.force_answer
    if not limit and append_fragment(episode, setup, results, end - setup.limits.final_tokens):
        return "", True
    limit = limit or _full(end, setup.limits)
    final = [{"role": "user", "content": FINAL_PROMPT}] if force else []
    short = [{**message, "content": LEFT_OUT} for message in results]
    for messages in (results + final, short + final):
        if messages and append_fragment(episode, setup, messages, end - 1):
            return limit, force
    return limit, False


async def observe(calls, row: dict, setup: Setup, attempt: Attempt, turn: int) -> list[dict]:
    """Runs the calls of a turn side by side; the results come back in call order, whoever finished first."""

    async def one(name, arguments, problem):
        if problem:
            return problem, "error", 0.0
        seen = await setup.toolbox.call(name, arguments, docs=row.get("docs"), files=row.get("files"))
        return seen.text, seen.status, seen.seconds

    results = await asyncio.gather(*(one(*call) for call in calls))
    for (name, arguments, _), (_, status, seconds) in zip(calls, results):
        attempt.calls.append(dict(name=name, arguments=arguments, status=status, seconds=round(seconds, 4), turn=turn))
    return [{"role": "tool", "content": text} for text, _, _ in results]


def append_sample(episode: Episode, chat, sample: Sample) -> tuple[str, bool]:
    """Appends a sampled turn with mask 1; returns (its text, whether it came to its end).

    A result that the model made up, from <tool_response> on, is cut off: nothing that was not executed is graded.
    """
    ids, whole = list(sample.ids), sample.finish_reason == "stop"
    closed = bool(ids) and ids[-1] == chat.closer_id
    text = chat.decode(ids[:-1] if whole else ids)
    if "<tool_response>" in chat.decode(ids):
        text, ids = _cut_fake_result(chat, ids)
        whole, closed = True, False
    elif whole and not closed:
        ids = ids[:-1]  # another stop token: not part of a turn
    episode.ids += ids
    episode.mask += [1] * len(ids)
    episode.logps += sample.logps[: len(ids)]
    episode.messages.append({"role": "assistant", "content": chat.opened + text})
    return text, whole


def _cut_fake_result(chat, ids: list[int]) -> tuple[str, list[int]]:
    """The text and the ids that end where the first <tool_response> begins, also where it is several tokens."""
    start = chat.decode(ids).index("<tool_response>")
    keep = bisect_right(range(len(ids) + 1), start, key=lambda n: len(chat.decode(ids[:n]))) - 1
    return chat.decode(ids[:keep]), ids[:keep]


def append_fragment(episode: Episode, setup: Setup, messages: list[dict], room: float) -> bool:
    """Appends template text with mask 0, unless the ids would grow beyond `room`.

    The fragment begins with the closer of the turn before it; where the policy sampled one, that one stands.
    """
    fragment = setup.chat.fragment(messages)
    if episode.mask[-1] and episode.ids[-1] == setup.chat.closer_id:
        fragment = fragment[1:]
    if len(episode.ids) + len(fragment) > room:
        return False
    episode.ids += fragment
    episode.mask += [0] * len(fragment)
    episode.messages += messages
    return True


async def run_together(coroutines, rounds: Rounds | None, max_live: int = 0, on_done=None) -> list:
    """Runs chains side by side, at most `max_live` at a time (0: all); results in the order given."""
    coroutines = list(coroutines)
    slots = asyncio.Semaphore(max_live or max(len(coroutines), 1))

    async def one(chain):
        async with slots:
            if rounds:
                rounds.start()
            try:
                result = await chain
            finally:
                if rounds:
                    rounds.end()
        if on_done:
            on_done(result)
        return result

    return await asyncio.gather(*(one(chain) for chain in coroutines))


async def run_chains(jobs, setup: Setup, rounds: Rounds | None, max_live: int = 0, on_done=None) -> list[Episode]:
    """`jobs` = (row, key) pairs -> one Episode each."""
    return await run_together((run_chain(row, setup, key) for row, key in jobs), rounds, max_live, on_done)


async def refine_with(episodes, rows, critiques, setup: Setup, rounds: Rounds | None, key: tuple) -> list[Episode]:
    """Stage 2 from the first stage of finished episodes, with critiques of one's choice (own, shuffled, empty)."""

    async def one(episode, row, critique):
        first = episode.attempts[0]
        fresh = copy.deepcopy(episode)
        fresh.ids, fresh.mask = fresh.ids[: first.span[1]], fresh.mask[: first.span[1]]
        fresh.logps, fresh.messages = fresh.logps[: sum(fresh.mask)], fresh.messages[: first.messages[1]]
        fresh.attempts = fresh.attempts[:1]
        await refine(fresh, row, setup, critique, (*key, fresh.id))
        return fresh

    return await run_together((one(*job) for job in zip(episodes, rows, critiques)), rounds)


def make_engine(kind: str, folder: str, stop_ids, rounds: Rounds, **options):
    """kind = vllm | hf; `options` are VLLMEngine's."""
    if not (Path(folder) / "config.json").is_file() and Path(folder).exists():
        raise SystemExit(f"{folder} is not a model folder: it has no config.json")
    if kind == "hf":
        return HFEngine(folder, stop_ids, rounds)
    if kind == "vllm":
        return VLLMEngine(folder, stop_ids, **options)
    raise SystemExit(f"engine = {kind!r}: vllm or hf")
