"""Agent-RRM from both sides: its prompt, its request, reading a judgment, leaks, the client."""

import asyncio
import importlib.util
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from reagent.config import read_prompt
from reagent.engines import EngineConfig, make_engine
from reagent.rows import seed_of

RRM_PROMPT = (
    "You review the work of an agent that answers questions with tools. Judge how it worked: the "
    "reasoning, the choice "
    "and the use of tools, and whether the answer follows from what the tools returned. Never "
    "state the correct answer "
    "yourself.\nReply with exactly three blocks:\n<think>your analysis of the trajectory, step by "
    "step</think>\n"
    "<critique>a short review that the agent will read: what was wrong or missing, what to do "
    "better</critique>\n"
    "<score>a number from 0 to 1 for the quality of the trajectory</score>"
)

JUDGE_REQUEST = "Question:\n{question}\n\nTrajectory of the agent:\n{trajectory}"

JUDGE_TEMPERATURE = 0.3  # of a judge at work, also in its report


REST_S = 10.0  # seconds that a server which failed is left alone


@dataclass(frozen=True)
class RewardModelConfig:
    """A reward model at work; `--rrm=URL` is short for `--rrm.source=URL`."""

    source: str = ""  # URL[,URL] of servers | a folder (in this process) | toy
    model: str = ""  # its name on the servers; "": the first that each lists
    prompt_file: str = ""  # another system prompt; an empty file: no system turn
    request_file: str = ""  # another form of the request, with {question} and {trajectory} in it
    memory_share: float = 0.3  # of the GPU, for a folder
    max_context: int = 32_768  # tokens; longer trajectories are shortened inside tool results
    max_tokens: int = 1400  # of a judgment, its thoughts included
    temperature: float = 0.3
    seconds: float = 60.0  # for one request to a server
    patience: float = 120.0  # seconds a judgment waits for servers that are down
    max_failures: float = 0.2  # share of the judgments of a step that may fail before a run stops


@dataclass(frozen=True)
class RRMPrompt:
    """What a reward model reads around an attempt."""

    system: str = RRM_PROMPT  # "": no system turn
    request: str = JUDGE_REQUEST

    def messages(self, question: str, trajectory: str) -> list[dict]:
        parts = {"{question}": question, "{trajectory}": trajectory}
        user = re.sub(r"\{question\}|\{trajectory\}", lambda mark: parts[mark[0]], self.request)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]


def read_rrm_prompt(prompt_file: str, request_file: str) -> RRMPrompt:
    """The prompt in these files, ours where none is given. A form without its places is refused."""
    request = read_prompt(request_file, JUDGE_REQUEST)
    if any(request.count(mark) != 1 for mark in ("{question}", "{trajectory}")):
        raise SystemExit(f"{request_file}: {{question}} and {{trajectory}} stand in it once each")
    return RRMPrompt(read_prompt(prompt_file, RRM_PROMPT), request)


# --------------------------------------------------------------------------------------------------
# reading a judgment


@dataclass(frozen=True)
class Judgment:
    think: str
    critique: str
    score: float


_SCORE = r"0(?:\.\d{1,6})?|1(?:\.0{1,6})?|\.\d{1,6}"

_BLOCKS = re.compile(rf"\s*<critique>(.*?)</critique>\s*<score>\s*({_SCORE})\s*</score>\s*", re.S)

_TAG = re.compile(r"</?(?:think|critique|score)>")


def parse_judgment(text: str) -> Judgment | None:
    """Exactly <think>…</think><critique>…</critique><score>s</score> with a plain s in [0, 1]; else
    None (invalid).

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
    if (
        not think
        or not critique
        or "<think>" in think
        or "</think>" in think
        or _TAG.search(critique)
    ):
        return None
    return Judgment(think, critique, float(match[2]))


# --------------------------------------------------------------------------------------------------
# rows of judgments


def golds_of(row: dict) -> list[str]:
    """The answers of a row; [] where it has none: then nothing is known of leaks."""
    answer = row.get("answer")
    answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
    return [str(each) for each in answers]


def annotation(row: dict) -> tuple[float | None, str | None]:
    """The annotated score and critique of a row, which may stand in one text."""
    if judgment := parse_judgment(row.get("judgment") or ""):
        return judgment.score, judgment.critique
    return row.get("score"), row.get("critique")


def row_trajectory(row: dict) -> str:
    trajectory = row["trajectory"]
    return trajectory if isinstance(trajectory, str) else trajectory_text(trajectory)


def check_rrm_row(row: dict) -> str | None:
    if (
        not isinstance(row.get("question"), str)
        or not isinstance(row.get("trajectory"), (str, list))
        or not row["trajectory"]
    ):
        return f"an RRM row needs 'question' and 'trajectory'; found the keys {sorted(row)}"
    if row.get("score") is None and row.get("correct") is None and "judgment" not in row:
        return "an RRM row needs 'score', 'correct' or both"
    score = row.get("score")
    if score is not None and not (isinstance(score, (int, float)) and 0 <= score <= 1):
        return f"'score' is {score!r}: a number from 0 to 1"
    return None


def target_text(row: dict) -> str:
    """The three blocks that SFT trains on."""
    if "judgment" in row:
        return row["judgment"]
    think, critique, score = row["think"], row["critique"], row["score"]
    return f"<think>{think}</think><critique>{critique}</critique><score>{score:.2f}</score>"


def check_judged_row(row: dict) -> str | None:
    """What SFT needs beyond check_rrm_row: a judgment to learn."""
    missing = (
        []
        if "judgment" in row
        else [key for key in ("think", "critique", "score") if row.get(key) is None]
    )
    if missing:
        return f"SFT needs {', '.join(map(repr, missing))}; found the keys {sorted(row)}"
    return check_rrm_row(row) or (
        None if parse_judgment(target_text(row)) else "the judgment is not valid"
    )


# --------------------------------------------------------------------------------------------------
# the client


class Judge:
    """The client of a reasoning reward model: asks, parses strictly, retries at a fresh seed,
    counts, gives up.
    """

    def __init__(self, ask: Callable[..., Awaitable[str]], *, size=len, room=1_000_000, retries=3):
        self.ask, self.size, self.room, self.retries = ask, size, room, retries
        self.asked = self.failed = self.invalid_replies = 0
        self.engine = None  # of a reward model in this process; who is done with it may close it

    async def __call__(self, question: str, messages: list[dict], key: tuple) -> Judgment | None:
        """Judges one attempt (paper section 3.4) without the gold answer; None: no valid judgment
        was to be had.
        """
        self.asked += 1
        trajectory = fit_trajectory(messages, self.room - self.size(question), self.size)
        for retry in range(self.retries if trajectory is not None else 0):
            try:
                judgment = parse_judgment(
                    await self.ask(question, messages, trajectory, seed_of(*key, "judge", retry))
                )
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
    """The transcript a judge reads. `cap`: tool results longer than that many characters are cut in
    their middle.
    """
    parts = []
    for message in messages:
        text = message["content"]
        if message["role"] == "tool" and cap is not None and len(text) > cap:
            half = cap // 2
            text = (
                f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out "
                f"…]\n{text[len(text) - half :]}"
            )
        parts.append(f"[{message['role']}]\n{text}")
    return "\n".join(parts)


def fit_trajectory(messages: list[dict], room: int, size: Callable[[str], int]) -> str | None:
    """Shortens long tool results until size(text) <= room; the end is never cut. None: it cannot
    fit.
    """
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


def engine_judge(
    engine,
    chat,
    *,
    prompt=RRMPrompt(),
    temperature=JUDGE_TEMPERATURE,
    max_context=32_768,
    max_new_tokens=1400,
) -> Judge:
    """A reward model in this process, behind the same engine classes as the policy."""

    async def ask(question, messages, trajectory, seed):
        ids = judge_prompt(chat, question, trajectory, prompt)
        sample = await engine.generate(
            ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        return chat.opened + chat.decode([i for i in sample.ids if i != chat.closer_id])

    overhead = len(judge_prompt(chat, "", "", prompt)) + max_new_tokens
    judge = Judge(ask, size=lambda text: len(chat.outside(text)), room=max_context - overhead)
    judge.engine = engine
    return judge


def judge_prompt(chat, question: str, trajectory: str, prompt=RRMPrompt()) -> list[int]:
    return chat.prompt(prompt.messages(question, trajectory), None)


def served_judge(
    urls: list[str],
    *,
    model="",
    prompt=RRMPrompt(),
    temperature=JUDGE_TEMPERATURE,
    max_context=32_768,
    max_new_tokens=1400,
    seconds=60.0,
    patience_s=120.0,
    rest_s=None,
    break_tags=lambda text: text,
) -> Judge:
    """OpenAI-compatible servers: the least busy one is asked; one that fails rests for `rest_s` and
    is tried again.
    """
    from openai import AsyncOpenAI, OpenAIError

    key = os.environ.get("RRM_API_KEY", "none")
    clients = [
        AsyncOpenAI(base_url=url, api_key=key, timeout=seconds, max_retries=0) for url in urls
    ]
    rest_s = REST_S if rest_s is None else rest_s
    busy, rests_until, names = [0] * len(urls), [0.0] * len(urls), [model] * len(urls)

    async def ask_one(i, request, seed):
        if not names[i]:
            names[i] = (await clients[i].models.list()).data[0].id
        reply = await clients[i].chat.completions.create(
            model=names[i],
            messages=request,
            temperature=temperature,
            max_tokens=max_new_tokens,
            seed=seed % 2**31,
        )
        message = reply.choices[0].message
        analysis = getattr(message, "reasoning_content", None) or getattr(
            message, "reasoning", None
        )
        return (f"<think>{analysis}</think>" if analysis else "") + (message.content or "")

    async def ask(question, messages, trajectory, seed):
        request = prompt.messages(question, trajectory)
        request[-1]["content"] = break_tags(request[-1]["content"])
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

    overhead = (len(prompt.system) + len(prompt.request)) // 3 + max_new_tokens
    return Judge(ask, size=lambda text: len(text) // 3, room=max_context - overhead)


def check_served(urls: list[str]) -> None:
    """Health check before the first step: every URL must list a model."""
    from openai import OpenAI, OpenAIError

    for url in urls:
        try:
            OpenAI(
                base_url=url,
                api_key=os.environ.get("RRM_API_KEY", "none"),
                timeout=10,
                max_retries=1,
            ).models.list()
        except OpenAIError as error:
            hint = "start one with `vllm serve <RRM folder> --port …`"
            raise SystemExit(f"no judge answers at {url} ({error}): {hint}") from error


@cache
def toy_script():
    """data/toy/prepare.py as a module: the toy's world, its words and its rule annotator."""
    path = Path(__file__).parents[1] / "data" / "toy" / "prepare.py"
    found = importlib.util.spec_from_file_location("toy_prepare", path)
    toy = importlib.util.module_from_spec(found)
    found.loader.exec_module(toy)
    return toy


def make_judge(config: RewardModelConfig, chat, *, engine: EngineConfig) -> Judge:
    """The client of the reward model that `config` names; `chat` breaks control strings for
    servers, `engine` runs a folder.
    """
    source, prompt = config.source, read_rrm_prompt(config.prompt_file, config.request_file)
    if source == "toy":
        return toy_judge(toy_script().annotate)
    if source.startswith("http"):
        urls = source.split(",")
        check_served(urls)
        return served_judge(
            urls,
            model=config.model,
            prompt=prompt,
            temperature=config.temperature,
            max_context=config.max_context,
            max_new_tokens=config.max_tokens,
            seconds=config.seconds,
            patience_s=config.patience,
            break_tags=chat.broken,
        )
    if not Path(source).is_dir():
        raise SystemExit(
            f"no reward model in {source}: train one with train_rrm.py, or give a URL "
            "(--rrm=http://…/v1)"
        )
    from reagent.policy import load_chat

    judge_chat = load_chat(source, tools=False)
    share = config.memory_share
    alone = replace(engine, sleep=False, tensor_parallel=1, memory_share=share)
    own = make_engine(alone, source, judge_chat.stop_ids, max_context=config.max_context)
    new = min(config.max_tokens, config.max_context // 4)
    return engine_judge(
        own, judge_chat, prompt=prompt, max_context=config.max_context, max_new_tokens=new
    )
