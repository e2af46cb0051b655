"""Models behind a URL, on OpenAI-compatible servers: the policy as an engine, judges of answers.

The policy is asked through /v1/completions with token ids, so that history is never rendered again.
Where a server has only /v1/chat/completions, `ChatEngine` sends the conversation as messages; a
report must say so. Keys: MODEL_API_KEY and JUDGE_API_KEY of the environment, if set.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter

from reagent.calls import HERMES
from reagent.chat import assistant_text
from reagent.engines import Sample
from toolkit.http import Endpoint, Refused, Unavailable, choice_of, complete, insist, models_of
from toolkit.text import spoken

# ---------------------------------------------------------------- what is served


def endpoint_of(url: str, key_name: str, most: int = 64) -> Endpoint:
    """The endpoint of an address that the user gave; its key stands in the environment."""
    try:
        return Endpoint(url, os.environ.get(key_name, ""), most)
    except Refused as refused:
        raise SystemExit(str(refused)) from refused


async def named_model(endpoint: Endpoint, model: str, option: str, **patience) -> dict:
    """The card of `model`, or of the only one listed; a server without a list is not asked more."""
    try:
        cards = await insist([endpoint], models_of, **patience)
    except Refused as refused:
        if model and refused.status in (404, 405):
            return {"id": model}
        raise
    if model not in cards and (model or len(cards) > 1):
        problem = f"no model {model!r}" if model else f"which model? {option}=NAME"
        raise SystemExit(f"{problem} at {endpoint.url}: it serves {', '.join(cards)}")
    return cards[model or next(iter(cards))]


def served_name(card: dict) -> str:
    """The model behind a card: its name and the folder it was started with, if the server tells."""
    root = card.get("root") or card["id"]
    return card["id"] if root == card["id"] else f"{card['id']} ({root})"


@dataclass(frozen=True)
class Served:
    """What a server said of itself. kind: ids (completions with token ids) | text | chat."""

    model: str
    kind: str
    root: str  # the folder or the name it was started with
    max_context: int | None
    name: str  # what the results say


async def look_up(endpoint: Endpoint, model: str, how: str, patience_s: float = 600.0) -> Served:
    """Asks which model is served and how it can be asked; `how` = auto | completions | chat."""
    card = await named_model(endpoint, model, "--served_model", patience_s=patience_s)
    name, most = card["id"], card.get("max_model_len")
    known = dict(root=str(card.get("root") or name), name=served_name(card))
    known["max_context"] = most if isinstance(most, int) else None
    if how == "chat":
        return Served(name, "chat", **known)
    probe = dict(model=name, prompt=[1], max_tokens=1, temperature=0.0, return_token_ids=True)
    try:
        ids, *_ = await insist([endpoint], partial(_continued, body=probe), patience_s=patience_s)
    except Refused as refused:
        if how == "completions":
            what = f"/completions does not take token ids: {refused}"
            raise SystemExit(endpoint.url + what) from refused
        return Served(name, "chat", **known)
    return Served(name, "ids" if ids else "text", **known)


# ---------------------------------------------------------------- the policy


# the server must add nothing of its own: no generation_config, no stop but ours (as VLLMEngine)
BARE = dict(logprobs=0, return_token_ids=True, ignore_eos=True, top_k=-1, min_p=0.0)
BARE |= dict(repetition_penalty=1.0, skip_special_tokens=False, spaces_between_special_tokens=False)


class ServedEngine:
    """The policy behind /v1/completions: ids in, ids out, by the `generate` of an engine. A server
    that returns no ids (`kind` "text") has its turns encoded here; earlier ids never change."""

    def __init__(self, endpoint: Endpoint, served: Served, chat, patience_s: float = 600.0):
        self.endpoint, self.served, self.chat = endpoint, served, chat
        self.patience_s, self.refused = patience_s, 0

    async def generate(self, ids, *, max_new_tokens, temperature, seed, top_p=1.0) -> Sample:
        body = dict(model=self.served.model, temperature=temperature, top_p=top_p)
        body["seed"] = seed % 2**31
        once = self._request(ids, body, max_new_tokens)
        try:
            reply = await insist([self.endpoint], once, patience_s=self.patience_s)
            return self._sample(reply, max_new_tokens)
        except Refused as refused:
            # that chain is left out and tried again, never answered
            if not self.refused:
                print(f"{self.endpoint.url} refused a request: {refused}", file=sys.stderr)
            self.refused += 1
            return Sample([], [], "abort")

    def _request(self, ids, body: dict, most: int):
        """What `insist` asks for."""
        body |= BARE | dict(prompt=list(ids), max_tokens=most)
        return partial(_continued, body=body | dict(stop_token_ids=list(self.chat.stop_ids)))

    def _sample(self, reply, most: int) -> Sample:
        ids, logps, text, reason = reply
        if self.served.kind == "ids" and not ids:
            raise Refused("a reply without ids")
        if self.served.kind == "ids":
            return Sample(ids, logps, reason)
        ids = self.chat.text(text)[: most - 1]
        return Sample(ids + [self.chat.closer_id] * (reason == "stop"), [], reason)


async def _continued(endpoint: Endpoint, body: dict, *, seconds: float):
    """(token ids, log-probs, text, stop | length | abort) of a completion, else Unavailable."""
    choice = choice_of(await endpoint.ask("/completions", body, seconds=seconds))
    reason, ids, text = (choice.get(key) for key in ("finish_reason", "token_ids", "text"))
    logps = choice["logprobs"] if isinstance(choice.get("logprobs"), dict) else {}
    try:
        ids = [int(i) for i in ids or []]
        logps = [float(x) for x in logps.get("token_logprobs") or []]
        if not isinstance(text, str):
            raise TypeError
    except (TypeError, ValueError) as error:
        raise Unavailable(f"a completion without a text: {str(choice)[:200]}", 200) from error
    return ids, logps, text, reason if reason in ("stop", "length") else "abort"


_ROLES = ("system", "user", "assistant")
_CONTROL = re.compile(r"<(?=\|[^<>|]{1,40}\|>|/?(?:tool_call|tool_response|think)>)")


def without_control(text: str) -> str:
    """The text with a zero-width space inside each control string of common chat formats."""
    return _CONTROL.sub("<\u200b", text.encode("utf-8", "replace").decode())


class TextChat:
    """The `Chat` of a server without token ids: its "ids" are four characters, or marks of turns.
    So the agent loop runs unchanged and `messages_of(ids)` gives back exactly what was appended.
    Limits count pieces, which are tokens only roughly. Tools are described in the system turn, in
    the format that the loop reads."""

    closer_id, opened, calls = len(_ROLES), "", HERMES
    stop_ids = (closer_id,)
    _first = closer_id + 1

    def text(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        pieces = (b"\1" + text[i : i + 4].encode("utf-32-be") for i in range(0, len(text), 4))
        return [int.from_bytes(piece, "big") + self._first for piece in pieces]

    def outside(self, text: str) -> list[int]:
        return self.text(self.broken(text))

    def broken(self, text: str) -> str:
        """The text with a zero-width space inside each control string."""
        return without_control(text)

    def decode(self, ids: list[int]) -> str:
        whole = (i - self._first for i in ids if i >= self._first)
        pieces = (i.to_bytes((i.bit_length() + 7) // 8, "big")[1:] for i in whole)
        return "".join(piece.decode("utf-32-be") for piece in pieces)

    def _turn(self, role: str, text: str) -> list[int]:
        return [_ROLES.index(role), *self.text(text), self.closer_id]

    def prompt(self, messages: list[dict], tools: list[dict] | None) -> list[int]:
        ids = []
        if tools and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        for message in messages:
            if message["role"] == "system":
                text = (message["content"] + tool_text(tools)).lstrip("\n")
                ids += self._turn("system", text)
            else:
                ids += self._turn("user", self.broken(message["content"]))
        return [*ids, _ROLES.index("assistant")]

    def fragment(self, messages: list[dict]) -> list[int]:
        ids = [self.closer_id]
        for role, turns in groupby(messages, key=itemgetter("role")):
            texts = [self.broken(turn["content"]) for turn in turns]
            if role == "tool":
                shown = (f"<tool_response>\n{text}\n</tool_response>" for text in texts)
                texts = ["\n".join(shown)]
            for text in texts:
                ids += self._turn("user", text)
        return [*ids, _ROLES.index("assistant")]

    def messages_of(self, ids: list[int]) -> list[dict]:
        messages, start = [], None
        for at, i in enumerate(ids):
            if start is None:
                role, start = _ROLES[i], at + 1
            elif i == self.closer_id:
                content, start = self.decode(ids[start:at]), None
                if messages and messages[-1]["role"] == role:  # many templates want alternation
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


class ChatEngine(ServedEngine):
    """The policy behind chat completions alone: the server renders history again at every turn."""

    def _request(self, ids, body: dict, most: int):
        body |= dict(messages=self.chat.messages_of(ids))
        return partial(complete, body=body, most_tokens=most)

    def _sample(self, choice, most: int) -> Sample:
        ids = self.chat.text(turn_text(choice["message"]))
        if choice.get("finish_reason") == "length":
            return Sample(ids, [], "length")
        return Sample([*ids, self.chat.closer_id], [], "stop")


def turn_text(message: dict) -> str:
    """The raw text of a chat reply; a reasoning field and parsed tool calls are joined back."""
    text, thoughts = spoken(message)
    calls = message.get("tool_calls") or [message.get("function_call")]
    calls = [call.get("function") or call for call in calls if isinstance(call, dict)]
    turn = {"content": text, "reasoning_content": thoughts, "tool_calls": calls}
    try:
        return assistant_text(turn)
    except (AttributeError, KeyError, TypeError, ValueError):
        # arguments that are not JSON stay as they are: the agent loop tells the model so
        for call in calls:
            name = json.dumps(call.get("name"), ensure_ascii=False)
            inside = f'{{"name": {name}, "arguments": {call.get("arguments")}}}'
            text += f"\n<tool_call>\n{inside}\n</tool_call>"
        return assistant_text(turn | {"content": text, "tool_calls": []})
