"""Conversations in, tokens out: the append-only renderer, and what is read in a turn of the
policy.
"""

import json
import re
import sys
from functools import lru_cache

from toolkit.text import after_thoughts, last_boxed

# --------------------------------------------------------------------------------------------------
# reading what models write


def extract_answer(text: str) -> str | None:
    """What the last valid box after the thoughts holds, or None where there is none."""
    return last_boxed(after_thoughts(text))


_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.S)


def parse_calls(text: str) -> list[tuple[str, object, str]]:
    """The tool calls of a turn, after its thoughts, as (name, arguments, error text or "")."""
    calls = []
    for match in _CALL.finditer(after_thoughts(text)):
        if not match[0].endswith("</tool_call>"):
            calls.append(("", {}, "The tool call has no closing </tool_call>."))
            continue
        try:
            call = json.loads(
                match[1], object_pairs_hook=_no_duplicates, parse_constant=_no_constant
            )
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


# --------------------------------------------------------------------------------------------------
# conversations


def tool_call_text(name: str, arguments: dict) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def assistant_text(message: dict) -> str:
    """The raw text of an assistant turn: reasoning, content, then its tool calls."""
    text = message.get("content") or ""
    if message.get("reasoning_content"):
        thoughts = message["reasoning_content"].strip("\n")
        text = f"<think>\n{thoughts}\n</think>\n\n" + text.lstrip("\n")
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        text += ("\n" if text else "") + tool_call_text(function["name"], arguments)
    return text


def _utf8(text: str) -> str:
    """Lone surrogates, which JSON may hold and no tokenizer takes, become question marks."""
    return text.encode("utf-8", "replace").decode()


_TAGS = tuple(
    f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think") for slash in ("", "/")
)

# private use: stands for the content of message {} while the template is rendered
_MARK = "\ue000{}\ue001"


class Chat:
    """Renders turns with the model's own chat template, append-only: what was rendered once is
    never rendered again.

    Template text and text from outside are encoded apart: outside text can never become a control
    token.
    """

    def __init__(self, tokenizer):
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise ValueError(f"{name}: it has no chat template")
        self.tokenizer = tokenizer
        self._frame = lru_cache(maxsize=256)(self._render)
        self._inside = lru_cache(maxsize=1024)(lambda text: tuple(self._encode(text, split=False)))
        added = (
            tokenizer.added_tokens_decoder
        )  # all_special_tokens lacks those without a name, such as <|im_start|>
        controls = [
            str(t) for t in added.values() if t.special or (str(t)[0] == "<" and str(t)[-1] == ">")
        ]
        self._controls = tuple(dict.fromkeys([*_TAGS, *controls]))
        self.closer_id = self.fragment([])[0]
        begun = self._frame(("user",), "[]", True)[-1].rstrip()
        self.opened = (
            "<think>\n" if begun.endswith("<think>") else ""
        )  # how the template itself begins every turn
        if self.closer_id not in added:
            closer = self.decode([self.closer_id])
            raise ValueError(
                f"{name}: its chat template ends an assistant turn with {closer!r}, not a control "
                "token"
            )
        eos = tokenizer.eos_token_id
        response = self._inside("<tool_response>")
        self.stop_ids = tuple(dict.fromkeys([self.closer_id, *([eos] if eos is not None else [])]))
        self.stop_ids += response if len(response) == 1 else ()

    def _encode(self, text: str, split: bool) -> list[int]:
        text = _utf8(text)
        return (
            self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
            if text
            else []
        )

    def text(self, text: str) -> list[int]:
        """Assistant (or our own) text: <think> and <tool_call> keep their tokens, <|im_end|> does
        not become one.
        """
        return self._encode(text, split=True)

    def outside(self, text: str) -> list[int]:
        """Text of tools, pages, files, users: control strings are broken by a zero-width space."""
        return self._encode(self.broken(text), split=True)

    def broken(self, text: str) -> str:
        """The text with a zero-width space inside each control string, also for a judge behind a
        URL.
        """
        text = _utf8(text)
        if any(control in text for control in self._controls):
            for control in self._controls:
                text = text.replace(control, control[0] + "\u200b" + control[1:])
        return text

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _render(self, roles: tuple[str, ...], tools: str, generate: bool) -> tuple[str, ...]:
        """The template's text around the contents: one piece more than there are contents."""
        messages = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        options = dict(tokenize=False, add_generation_prompt=generate)
        text = self.tokenizer.apply_chat_template(
            messages, tools=json.loads(tools) or None, **options
        )
        pieces = []
        for i in range(len(roles)):
            before, mark, text = text.partition(_MARK.format(i))
            if not mark:
                raise ValueError(f"the chat template drops the content of a {roles[i]} turn")
            pieces.append(before)
        frame = "".join(pieces) + text
        unseen = [
            tool["function"]["name"]
            for tool in json.loads(tools)
            if tool["function"]["name"] not in frame
        ]
        if unseen:
            print(
                f"the chat template does not show the tools {', '.join(unseen)}: describe them in "
                "the prompt",
                file=sys.stderr,
            )
        if _MARK[0] in frame:
            raise ValueError(
                "the chat template repeats the content of a turn or changes the order of turns"
            )
        return (*pieces, text)

    def prompt(self, messages: list[dict], tools: list[dict] | None) -> list[int]:
        """Leading system and user turns with the tool schemas, up to where the assistant begins."""
        roles = _roles(messages, ("system", "user"))
        pieces = self._frame(roles, json.dumps(tools or []), True)
        ids = list(self._inside(pieces[0]))
        for message, piece in zip(messages, pieces[1:]):
            ids += (
                self.text(message["content"])
                if message["role"] == "system"
                else self.outside(message["content"])
            )
            ids += self._inside(piece)
        return ids

    def fragment(self, messages: list[dict]) -> list[int]:
        """What follows an assistant turn: its closer, these turns, and the start of the next
        assistant turn.

        Tool results in a row become one user turn of <tool_response> blocks, whatever the template
        does with them.
        """
        _roles(messages, ("user", "tool"))
        turns: list[list[dict]] = []
        for message in messages:
            if message["role"] == "tool" and turns and turns[-1][0]["role"] == "tool":
                turns[-1].append(message)
            else:
                turns.append([message])
        pieces = self._frame(("user", "assistant", *("user" for _ in turns)), "[]", True)[2:]
        ids = list(self._inside(pieces[0]))
        for turn, piece in zip(turns, pieces[1:]):
            for i, message in enumerate(turn):
                tool = message["role"] == "tool"
                ids += self._inside(("\n" if i else "") + "<tool_response>\n") if tool else ()
                ids += self.outside(message["content"])
                ids += self._inside("\n</tool_response>") if tool else ()
            ids += self._inside(piece)
        return ids

    def row(
        self, messages: list[dict], tools: list[dict] | None = None
    ) -> tuple[list[int], list[int]]:
        """An SFT row -> (ids, mask): as if the policy had sampled the assistant turns with their
        closers.

        Turns after the last assistant turn are left out: nothing in them is trained.
        """
        problem = check_messages(messages)
        if problem:
            raise ValueError(problem)
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        ids = self.prompt(messages[:first], tools)
        mask = [0] * len(ids)
        while first < len(messages):
            turn = [*self.text(self.sampled(assistant_text(messages[first]))), self.closer_id]
            then = next(
                (i for i in range(first + 1, len(messages)) if messages[i]["role"] == "assistant"),
                None,
            )
            between = self.fragment(messages[first + 1 : then])[1:] if then else []
            ids += turn + between
            mask += [1] * len(turn) + [0] * len(between)
            first = then or len(messages)
        return ids, mask

    def sampled(self, text: str) -> str:
        """What of an assistant turn the policy writes itself, where the template has opened <think>
        for it.
        """
        if not self.opened:
            return text
        return (
            text.removeprefix("<think>").removeprefix("\n")
            if text.startswith("<think>")
            else "</think>\n\n" + text
        )

    def paint(self, ids: list[int], mask: list[int]) -> str:
        """The row as text for a terminal, trained tokens in green."""
        parts, start = [], 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or mask[i] != mask[start]:
                text = self.decode(ids[start:i])
                parts.append(f"\033[32m{text}\033[0m" if mask[start] else text)
                start = i
        return "".join(parts)


def _roles(messages: list[dict], allowed: tuple[str, ...]) -> tuple[str, ...]:
    for i, message in enumerate(messages):
        if message["role"] not in allowed:
            raise ValueError(
                f"message {i}: role {message['role']!r}, here only {' and '.join(allowed)} can "
                "stand"
            )
    return tuple(message["role"] for message in messages)


def check_messages(messages) -> str | None:
    """Whether messages can be an SFT row: an error text that names the message, or None."""
    if not isinstance(messages, list) or not messages:
        return "'messages' is a list of turns"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in (
            "system",
            "user",
            "assistant",
            "tool",
        ):
            return f"message {i}: the role is system, user, assistant or tool"
        content = message.get("content")
        if not isinstance(content, str) and not (
            content is None and message["role"] == "assistant"
        ):
            return f"message {i}: 'content' is a text, not {type(content).__name__}"
        try:
            assistant_text(message)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return (
                f"message {i}: tool_calls or reasoning_content cannot be read "
                f"({type(error).__name__}: {error})"
            )
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        return "no assistant turn to train on"
    first = roles.index("assistant")
    if not first or "tool" in roles[:first]:
        return "the first turns are system or user"
    for i, role in enumerate(roles[first + 1 :], first + 1):
        if role == "system":
            return f"message {i}: a system turn after the first assistant turn"
        if role == roles[i - 1] == "assistant":
            return f"message {i}: two assistant turns in a row"
    return None
