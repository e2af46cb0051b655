"""Models behind a URL, on OpenAI-compatible servers: the policy as an engine of the agent loop, and
judges of answers.

The policy is asked through /v1/completions with token ids, so that history is never rendered again.
Where a server has only /v1/chat/completions, `ChatEngine` sends the conversation as messages; a
report must say so. Proxies of the environment are not used for these URLs. Keys: MODEL_API_KEY and
JUDGE_API_KEY of the environment, if set.
"""

import asyncio
import json
import os
import re
import sys
import time
from dataclasses import dataclass

from reagent.calls import HERMES
from reagent.chat import assistant_text
from reagent.engines import Sample

# --------------------------------------------------------------------------------------------------
# the line to a server


class ServerDown(Exception):
    """No request was answered for as long as the run may wait."""


class Refused(Exception):
    """The server is up and does not take this request."""

    status = 0


class Line:
    """The line to one server: at most `most` requests at a time; it waits while the server is away.

    Away: no connection, a timeout, HTTP 408, 409, 425, 429 or 5xx, or a reply that is no reply.
    Pauses grow up to 15 s. After `patience_s` without any answer: ServerDown; where other requests
    were answered meanwhile: Refused.
    """

    def __init__(
        self,
        url: str,
        key_name: str,
        *,
        patience_s: float = 600.0,
        request_s: float = 1800.0,
        most=64,
    ):
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        key = os.environ.get(key_name) or "none"
        http = DefaultAsyncHttpxClient(trust_env=False)
        self.client = AsyncOpenAI(
            base_url=url, api_key=key, timeout=request_s, max_retries=0, http_client=http
        )
        self.url, self.patience_s, self.slots = url, patience_s, asyncio.Semaphore(most)
        self.answered, self.told = (
            -1.0,
            False,
        )  # time.monotonic() of the last answer; was "waiting" printed?

    async def ask(self, request):
        """What the coroutine function `request(client)` returns. Raises ServerDown or Refused."""
        pause, failing_since = 0.25, None
        while True:
            try:
                async with self.slots:
                    reply = await request(self.client)
            except Exception as error:  # sorted out in _after
                failing_since = failing_since or time.monotonic()
                self._after(error, failing_since)
            else:
                if self.told:
                    print(f"{self.url} answers again", file=sys.stderr)
                self.answered, self.told = time.monotonic(), False
                return reply
            await asyncio.sleep(
                min(pause, max(0.05, failing_since + self.patience_s - time.monotonic()))
            )
            pause = min(2 * pause, 15.0)

    def _after(self, error: Exception, failing_since: float) -> None:
        """Returns if the request should be made again; else raises."""
        from openai import APIConnectionError, APIStatusError

        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        status = error.status_code if isinstance(error, APIStatusError) else 0
        if 400 <= status < 500 and status not in (408, 409, 425, 429):
            refused = Refused(what)
            refused.status = status
            raise refused from error
        if not isinstance(error, (APIConnectionError, APIStatusError, ValueError)):
            raise error
        if time.monotonic() - failing_since >= self.patience_s:
            if self.answered > failing_since:
                raise Refused(what) from error
            raise ServerDown(
                f"no answer from {self.url} for {self.patience_s:.0f} s ({what})"
            ) from error
        if not self.told:
            print(f"waiting for {self.url}: {what}", file=sys.stderr)
            self.told = True


def only_choice(reply):
    """The one choice of a reply; a ValueError where the server sent something else (an error page,
    an empty list).
    """
    choices = getattr(reply, "choices", None)
    if not choices:
        raise ValueError(f"not a completion: {str(reply)[:200]!r}")
    return choices[0]


@dataclass(frozen=True)
class Served:
    """What a server said about itself. kind: ids (completions with token ids) | text (completions
    without) | chat.
    """

    model: str
    kind: str
    root: str  # the folder or the name it was started with
    max_context: int | None


async def look_up(line: Line, model: str, endpoint: str) -> Served:
    """Asks which model is served and how it can be asked; `endpoint` = auto | completions |
    chat.
    """

    async def listed(client):
        cards = getattr(await client.models.list(), "data", None)
        if not cards:
            raise ValueError("it lists no model")
        return cards

    cards = {card.id: card for card in await line.ask(listed)}
    if model and model not in cards:
        raise SystemExit(f"no model {model!r} at {line.url}: it serves {', '.join(cards)}")
    card = cards[model] if model else next(iter(cards.values()))
    root, most = getattr(card, "root", None) or card.id, getattr(card, "max_model_len", None)
    if endpoint == "chat":
        return Served(card.id, "chat", root, most)

    async def probe(client):
        options = dict(max_tokens=1, temperature=0.0, extra_body={"return_token_ids": True})
        return only_choice(await client.completions.create(model=card.id, prompt=[1], **options))

    try:
        choice = await line.ask(probe)
    except Refused as refused:
        if endpoint == "completions":
            raise SystemExit(
                f"{line.url}/completions does not take token ids: {refused}"
            ) from refused
        return Served(card.id, "chat", root, most)
    return Served(
        card.id, "text" if getattr(choice, "token_ids", None) is None else "ids", root, most
    )


# --------------------------------------------------------------------------------------------------
# the policy


class ServedEngine:
    """The policy behind /v1/completions: ids in, ids out, with the `generate` of the engines in
    rollout.py.

    A server that returns no ids (`kind` "text") has its turns encoded once more here; earlier ids
    still never change.
    """

    def __init__(self, line: Line, served: Served, chat):
        self.line, self.served, self.chat, self.refused = line, served, chat, 0

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0) -> Sample:
        # the server must add nothing of its own: no generation_config, no stop but ours (as
        # VLLMEngine)
        extra = dict(
            return_token_ids=True,
            stop_token_ids=list(self.chat.stop_ids),
            ignore_eos=True,
            top_k=-1,
        )
        extra |= dict(
            min_p=0.0,
            repetition_penalty=1.0,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )
        options = dict(
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed % 2**31,
            logprobs=0,
        )

        async def request(client):
            made = client.completions.create(
                model=self.served.model, prompt=list(ids), **options, extra_body=extra
            )
            return only_choice(await made)

        try:
            choice = await self.line.ask(request)
        except Refused as refused:
            return _aborted(self, refused)
        reason = choice.finish_reason if choice.finish_reason in ("stop", "length") else "abort"
        if self.served.kind == "ids":
            if choice.token_ids is None:
                return _aborted(self, "the reply has no token_ids")
            logps = getattr(choice.logprobs, "token_logprobs", None) or []
            return Sample(list(choice.token_ids), [float(x) for x in logps], reason)
        new = self.chat.text(choice.text)[: max_new_tokens - 1]
        return Sample(new + [self.chat.closer_id] * (reason == "stop"), [], reason)


def _aborted(engine, why) -> Sample:
    """What a chain gets whose request was refused: the chain is left out and tried again, never
    marked as answered.
    """
    if not engine.refused:
        print(f"{engine.line.url} refused a request: {why}", file=sys.stderr)
    engine.refused += 1
    return Sample([], [], "abort")


_ROLES = ("system", "user", "assistant")

_CONTROL = re.compile(r"<(?=\|[^<>|]{1,40}\|>|/?(?:tool_call|tool_response|think)>)")


class TextChat:
    """The `Chat` of a server without token ids: its "ids" are pieces of four characters, and marks
    for turns.

    So the agent loop runs unchanged and `messages_of(ids)` gives back exactly what was appended.
    Limits count pieces, which are tokens only roughly. Tools are described in the system turn, in
    the format that the loop reads.
    """

    closer_id, opened, calls = len(_ROLES), "", HERMES
    stop_ids = (closer_id,)
    _first = closer_id + 1

    def text(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        pieces = (text[i : i + 4] for i in range(0, len(text), 4))
        return [
            int.from_bytes(b"\1" + piece.encode("utf-32-be"), "big") + self._first
            for piece in pieces
        ]

    def outside(self, text: str) -> list[int]:
        return self.text(self.broken(text))

    def broken(self, text: str) -> str:
        """The text with a zero-width space inside each control string."""
        return _CONTROL.sub("<\u200b", text.encode("utf-8", "replace").decode())

    def decode(self, ids: list[int]) -> str:
        whole = (i - self._first for i in ids if i >= self._first)
        return "".join(
            i.to_bytes((i.bit_length() + 7) // 8, "big")[1:].decode("utf-32-be") for i in whole
        )

    def _turn(self, role: str, ids: list[int]) -> list[int]:
        return [_ROLES.index(role), *ids, self.closer_id]

    def prompt(self, messages: list[dict], tools: list[dict] | None) -> list[int]:
        ids = []
        if tools and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        for message in messages:
            if message["role"] == "system":
                text = (message["content"] + tool_text(tools)).lstrip("\n")
                ids += self._turn("system", self.text(text))
            else:
                ids += self._turn("user", self.outside(message["content"]))
        return [*ids, _ROLES.index("assistant")]

    def fragment(self, messages: list[dict]) -> list[int]:
        ids, results = [self.closer_id], []
        for i, message in enumerate(messages):
            if message["role"] == "tool":
                block = ("\n" if results else "") + "<tool_response>\n"
                results += (
                    self.text(block)
                    + self.outside(message["content"])
                    + self.text("\n</tool_response>")
                )
                if i + 1 < len(messages) and messages[i + 1]["role"] == "tool":
                    continue
            ids += self._turn("user", results or self.outside(message["content"]))
            results = []
        return [*ids, _ROLES.index("assistant")]

    def messages_of(self, ids: list[int]) -> list[dict]:
        messages, start = [], None
        for at, i in enumerate(ids):
            if start is None:
                role, start = _ROLES[i], at + 1
            elif i == self.closer_id:
                content, start = self.decode(ids[start:at]), None
                if (
                    messages and messages[-1]["role"] == role
                ):  # many templates want turns to alternate
                    messages[-1]["content"] += "\n\n" + content
                else:
                    messages.append({"role": role, "content": content})
        return messages


def tool_text(tools: list[dict] | None) -> str:
    """What a system turn says about the tools where no chat template says it."""
    if not tools:
        return ""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    form = '<tool_call>\n{"name": the tool\'s name, "arguments": {…}}\n</tool_call>'
    head = f"\n\nThe tools, as JSON schemas:\n<tools>\n{lines}\n</tools>"
    return f"{head}\nTo call tools, end your turn with one or more of\n{form}"


class ChatEngine:
    """The policy behind /v1/chat/completions alone: the server renders the history again at every
    turn.
    """

    def __init__(self, line: Line, served: Served, chat: TextChat):
        self.line, self.served, self.chat, self.refused = line, served, chat, 0

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0) -> Sample:
        options = dict(
            max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed % 2**31
        )
        messages = self.chat.messages_of(ids)

        async def request(client):
            made = client.chat.completions.create(
                model=self.served.model, messages=messages, **options
            )
            return only_choice(await made)

        try:
            choice = await self.line.ask(request)
        except Refused as refused:
            return _aborted(self, refused)
        text = turn_text(choice.message)
        whole = choice.finish_reason != "length"
        return Sample(
            self.chat.text(text) + [self.chat.closer_id] * whole, [], "stop" if whole else "length"
        )


def turn_text(message) -> str:
    """The raw text of a chat reply: a separate reasoning field and parsed tool calls are joined
    back.
    """
    calls = [
        dict(name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or []
    ]
    thoughts = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    turn = {"content": message.content, "reasoning_content": thoughts, "tool_calls": calls}
    try:
        return assistant_text(turn)
    except ValueError:  # arguments that are not JSON: the loop tells the model so
        broken = "".join(f"\n<tool_call>\n{call['arguments']}\n</tool_call>" for call in calls)
        return assistant_text(turn | {"tool_calls": []}) + broken
