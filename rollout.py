"""Rollouts: engines, the agent loop, critique and refinement, the client of the reasoning reward
model (Agent-RRM).

A chain is one coroutine: first attempt -> score -> refined attempt -> score (paper section 3.5.3,
Reagent-U; without the last judgment it is Reagent-C, section 3.5.1). All share one engine and wait
for nobody but the tools and the reward model they called. Tokens in, tokens out: ids are
append-only, the mask is written when a token is appended, history is never rendered again.

    python rollout.py read FILE.jsonl  # what is read in turns, judgments, verdicts
"""

import asyncio
import json
import math
import sys
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np

from reagent.calls import Call, Turn, made_up_result, read_turn
from reagent.engines import Sample, run_together
from reagent.reward_model import RewardModel
from reagent.rows import seed_of, shown_question

SYSTEM_PROMPT = (
    "You answer questions with the help of tools. Think before you act, call a tool whenever a "
    "fact is missing, and check what you found. When you are sure, give the final answer inside "
    "\\boxed{}."
)

REFINE_PROMPT = (
    "A reviewer read your attempt and wrote:\n{critique}\nTake the review into account and solve "
    "the question again. Tools are still available. Give the final answer inside \\boxed{}."
)

FINAL_PROMPT = "No further tool calls are possible. Give the final answer now, inside \\boxed{}."

LEFT_OUT = "[result left out: no room]"


# ---------------------------------------------------------------- records


@dataclass
class Attempt:
    """One attempt. `span` and `messages` are [a, b) ranges of the episode's ids and messages."""

    span: tuple[int, int]
    messages: tuple[int, int]
    answer: str | None
    # answered|no_answer|turn_limit|turn_tokens|token_limit|context_limit|time_limit|fault|aborted
    termination: str
    seed: int
    # name, arguments, repaired, status, seconds, turn
    calls: list[dict] = field(default_factory=list)
    rule_reward: float | None = None
    correct: bool | None = None
    score: float | None = None
    think: str | None = None
    critique: str | None = None
    unread: int = 0  # replies of the reward model in which no judgment could be read
    reward: float | None = None  # None: not in the pool


TOKEN_ARRAYS = {"ids": "i", "mask": "b", "logps": "f"}  # and the type of one in an array


@dataclass
class Episode:
    """A chain: ids, mask (1 = sampled by the policy), the sampler's logps at the 1s, attempts."""

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
        """All but the token arrays, and how long those are."""
        counts = {"tokens": len(self.ids), "sampled": sum(self.mask)}
        texts = {name: value for name, value in vars(self).items() if name not in TOKEN_ARRAYS}
        return texts | counts | {"attempts": [vars(attempt) for attempt in self.attempts]}

    def packed(self) -> "Episode":
        """For the way to other ranks: numbers in arrays, as collate and write_episodes take them;
        lists of them take three times as long to pickle."""
        arrays = {name: array(kind, getattr(self, name)) for name, kind in TOKEN_ARRAYS.items()}
        return replace(self, **arrays)


@dataclass(frozen=True)
class Limits:
    """Limits of one attempt; tokens count everything after its prompt, tool results included."""

    max_turns: int = 13
    max_new_tokens_per_turn: int = 4096
    max_tokens_per_attempt: int = 11_000
    max_context: int = 32_768  # tokens of a whole chain
    max_seconds_per_chain: float = math.inf  # both attempts and the judgment between them
    final_tokens: int = 512  # kept free for the call for a final answer and that answer


# ---------------------------------------------------------------- the agent loop


@dataclass
class Setup:
    """All that chains of one phase share. `rule_reward(row, answer) -> (reward, correct)`."""

    engine: object
    chat: object
    toolbox: object
    limits: Limits
    rule_reward: Callable[[dict, str | None], tuple[float, bool]]
    rrm: RewardModel | None = None
    refine: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    system_prompt: str = SYSTEM_PROMPT
    fixed_critique: str = ""  # used in place of the reward model's, for the ablation
    policy_version: int = 0


async def run_chain(row: dict, setup: Setup, key: tuple) -> Episode:
    """One chain: o1 ~ pi(.|q), (c, s1), o2 ~ pi(.|q, o1, c), s2; `key`: seed, step, place, g."""
    gold = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    question = shown_question(row)
    messages, ids = opening(setup.chat, setup.system_prompt, question, setup.toolbox.schemas)
    parts = dict(ids=ids, mask=[0] * len(ids), logps=[], policy_version=setup.policy_version)
    episode = Episode(str(row["id"]), question, gold, messages=messages, **parts)
    episode.meta = dict(row.get("meta") or {})
    key = (*key, episode.id)
    if len(ids) + setup.limits.final_tokens >= setup.limits.max_context:
        episode.dropped = "prompt_too_long"
        return episode
    until = time.monotonic() + setup.limits.max_seconds_per_chain
    await run_attempt(episode, row, setup, (*key, 1), until)
    if setup.rrm and not episode.dropped:
        await judge_attempt(episode, setup, (*key, 1))
        critique = episode.attempts[0].critique
        if setup.refine and critique is not None and time.monotonic() < until:
            await refine(episode, row, setup, setup.fixed_critique or critique, key, until)
    return episode


def opening(chat, system: str, question: str, schemas: list[dict]) -> tuple[list[dict], list[int]]:
    """Turns before the first attempt and their ids. An empty system prompt is no turn; one with
    the schemas as <tools>, like those of the release, gets no second copy of them."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return messages, list(chat.prompt(messages, [] if "<tools>" in system else schemas))


async def refine(
    episode: Episode, row: dict, setup: Setup, critique: str, key: tuple, until: float = math.inf
) -> None:
    """Stage 2 of the conversation: a user turn with the critique, another attempt, its score."""
    message = {"role": "user", "content": REFINE_PROMPT.replace("{critique}", critique)}
    room = setup.limits.max_context - setup.limits.final_tokens - 1
    ids, messages = len(episode.ids), len(episode.messages)
    if not append_fragment(episode, setup, [message], room):
        return
    await run_attempt(episode, row, setup, (*key, 2), until)
    if episode.dropped == "time_limit":  # before its first turn: the first attempt stands alone
        del episode.ids[ids:], episode.mask[ids:], episode.messages[messages:], episode.attempts[1:]
        episode.dropped = ""
    elif setup.rrm and not episode.dropped:
        await judge_attempt(episode, setup, (*key, 2))


async def judge_attempt(episode: Episode, setup: Setup, key: tuple) -> None:
    """Stage 2 is judged on (q, o2) alone: the request holds neither o1 nor its critique."""
    attempt = episode.attempts[-1]
    turns = episode.messages[slice(*attempt.messages)]
    judgment, attempt.unread = await setup.rrm.judge(episode.question, turns, key)
    if judgment:
        attempt.think, attempt.critique = judgment.think, judgment.critique
        attempt.score = judgment.score


async def run_attempt(
    episode: Episode, row: dict, setup: Setup, key: tuple, until: float = math.inf
) -> None:
    """Turns of the policy and its tools until an answer or a limit; appends the Attempt. `until`:
    time.monotonic() at which it ends as it stands; one without a turn is no attempt."""
    begin, first = len(episode.ids), len(episode.messages)
    attempt = Attempt((begin, begin), (first, first), None, "", seed_of(*key))
    left = until - time.monotonic()
    try:
        async with asyncio.timeout(left if left < math.inf else None) as clock:
            await take_turns(episode, row, setup, attempt, key)
    except TimeoutError:
        if not clock.expired():
            raise
        attempt.termination = "time_limit"
        episode.dropped = "" if sum(episode.mask[begin:]) else "time_limit"
    attempt.span, attempt.messages = (begin, len(episode.ids)), (first, len(episode.messages))
    if not episode.dropped:
        attempt.rule_reward, attempt.correct = setup.rule_reward(row, attempt.answer)
    episode.attempts.append(attempt)


async def take_turns(episode: Episode, row: dict, setup: Setup, attempt, key: tuple) -> None:
    """The turns of `attempt`: sets its answer, calls and termination."""
    limits, begin = setup.limits, len(episode.ids)
    end = min(begin + limits.max_tokens_per_attempt, limits.max_context)  # where the ids must end
    limit, turn = "", 0
    while not attempt.termination:
        left = end - len(episode.ids) - (0 if limit else limits.final_tokens)
        room = min(limits.max_new_tokens_per_turn, max(left, 1))
        seed = seed_of(*key, turn, "policy", 0)
        options = dict(temperature=setup.temperature, seed=seed, top_p=setup.top_p)
        sample = await setup.engine.generate(episode.ids, max_new_tokens=room, **options)
        if sample.finish_reason == "abort":
            attempt.termination = episode.dropped = "aborted"
            break
        text, whole = append_sample(episode, setup.chat, sample)
        said = Turn([], None, [])  # of a turn that was cut short nothing is read
        if whole:
            said = read_turn(text, setup.chat.calls, setup.toolbox.schemas)
        if limit:  # this was the forced final turn
            attempt.answer, attempt.termination = said.answer, limit
            break
        if whole and not said.calls:
            attempt.answer = said.answer
            attempt.termination = "answered" if attempt.answer is not None else "no_answer"
            break
        if not whole:
            limit = "turn_tokens" if room == limits.max_new_tokens_per_turn else _full(end, limits)
        turn += 1
        results = await observe(said.calls, row, setup, attempt, turn)
        if any(call["status"] == "fault" for call in attempt.calls):
            attempt.termination = episode.dropped = "fault"
            break
        if not limit and turn >= limits.max_turns:
            limit = "turn_limit"
        limit, goes_on = _append_results(episode, setup, results, limit, end)
        if not goes_on:
            attempt.termination = limit


def _full(end: int, limits: Limits) -> str:
    return "context_limit" if end == limits.max_context else "token_limit"


def _append_results(episode, setup, results, limit, end) -> tuple[str, bool]:
    """Appends results, at a limit the call for an answer; -> (the limit or "", another turn?)."""
    if not limit and append_fragment(episode, setup, results, end - setup.limits.final_tokens):
        return "", True
    limit = limit or _full(end, setup.limits)
    final = {"role": "user", "content": FINAL_PROMPT}
    for told in (results, [{**message, "content": LEFT_OUT} for message in results]):
        if append_fragment(episode, setup, [*told, final], end - 1):
            return limit, True
    return limit, False


async def observe(calls: list[Call], row: dict, setup: Setup, attempt, turn: int) -> list[dict]:
    """Runs the calls of a turn side by side; the results come back in call order."""

    async def one(call):
        if call.problem:
            return call.problem, "error", 0.0
        own = dict(docs=row.get("docs"), files=row.get("files"))
        seen = await setup.toolbox.call(call.name, call.arguments, **own)
        return seen.text, seen.status, seen.seconds

    results = await asyncio.gather(*(one(call) for call in calls))
    for call, (_, status, seconds) in zip(calls, results):
        record = dict(name=call.name, arguments=call.arguments, repaired=call.repaired)
        attempt.calls.append(record | dict(status=status, seconds=round(seconds, 4), turn=turn))
    return [{"role": "tool", "content": text} for text, _, _ in results]


def append_sample(episode: Episode, chat, sample: Sample) -> tuple[str, bool]:
    """Appends a sampled turn with mask 1; returns (its text, with the thoughts that the template
    opened, and whether it came to its end).

    A result that the model made up, from <tool_response> on, is cut off: nothing that was not
    executed is graded."""
    ids, whole = list(sample.ids), sample.finish_reason == "stop"
    closed = bool(ids) and ids[-1] == chat.closer_id
    text = chat.decode(ids[:-1] if whole else ids)
    made_up = made_up_result(chat.opened + chat.decode(ids), chat.calls)
    if made_up is not None:
        text, ids = _cut_at(chat, ids, made_up - len(chat.opened))
        whole, closed = True, False
    elif whole and not closed:
        ids = ids[:-1]  # another stop token: not part of a turn
    episode.ids += ids
    episode.mask += [1] * len(ids)
    episode.logps += sample.logps[: len(ids)]
    episode.messages.append({"role": "assistant", "content": chat.opened + text})
    return chat.opened + text, whole


def _cut_at(chat, ids: list[int], start: int) -> tuple[str, list[int]]:
    """The text and the ids that end before character `start`, also where tokens straddle it."""
    keep = bisect_right(range(len(ids) + 1), start, key=lambda n: len(chat.decode(ids[:n]))) - 1
    return chat.decode(ids[:keep]), ids[:keep]


def append_fragment(episode: Episode, setup: Setup, messages: list[dict], room: float) -> bool:
    """Appends template text with mask 0, unless the ids would grow beyond `room`.

    The fragment begins with the closer of the turn before it; where the policy sampled one, that
    one stands."""
    fragment = setup.chat.fragment(messages)
    if episode.mask[-1] and episode.ids[-1] == setup.chat.closer_id:
        fragment = fragment[1:]
    if len(episode.ids) + len(fragment) > room:
        return False
    episode.ids += fragment
    episode.mask += [0] * len(fragment)
    episode.messages += messages
    return True


async def run_chains(jobs, setup: Setup, max_live: int = 0, on_done=None) -> list[Episode]:
    """`jobs` = (row, key) pairs -> one Episode each; max_live 0: what the engine holds."""
    max_live = max_live or getattr(setup.engine, "holds", 0)
    return await run_together((run_chain(row, setup, key) for row, key in jobs), max_live, on_done)


def write_episodes(folder: Path, step: int, episodes: list) -> None:
    """step-N.jsonl: an episode's texts a line. step-N.npz: their token arrays end to end; the ids
    of episode i are ids[starts[i] : starts[i + 1]], logps has a number for each 1 of the mask."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:06d}"
    starts = np.cumsum([0, *(len(episode.ids) for episode in episodes)])
    arrays = {"starts": starts}
    for name, kind in TOKEN_ARRAYS.items():
        parts = [np.array(getattr(episode, name), kind) for episode in episodes]
        arrays[name] = np.concatenate(parts) if parts else np.array([], kind)
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    with open(path.with_suffix(".tmp"), "w") as file:
        file.writelines(json.dumps(episode.to_json()) + "\n" for episode in episodes)
    path.with_suffix(".tmp").replace(path.with_suffix(".jsonl"))


if __name__ == "__main__":
    import_module("data.read").main(sys.argv[1:])
