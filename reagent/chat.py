"""Conversations in, tokens out: the append-only renderer, by the model's own chat template."""

import json
import re
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

from reagent.calls import FORMATS, HERMES, Call, CallFormat, read_turn


def assistant_text(message: dict, form: CallFormat = HERMES) -> str:
    """The raw text of an assistant turn: reasoning, content, then its tool calls."""
    text, calls = message.get("content") or "", []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        name, arguments = function["name"], function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError("a call has a name and an object of arguments")
        calls.append(form.write(name, arguments))
    if calls:
        text += (form.lead if text.strip() else "") + form.between.join(calls) + form.trail
    if message.get("reasoning_content"):
        thoughts = message["reasoning_content"].strip("\n")
        text = f"<think>\n{thoughts}\n</think>\n\n" + text.lstrip("\n")
    return text


def translated(text: str, form: CallFormat) -> str:
    """Calls that a row writes in another known format, in this one."""
    if all(not call.problem for call in read_turn(text, form).calls):
        return text
    for other in FORMATS:
        turn = read_turn(text, other)
        if turn.spans and not any(call.problem for call in turn.calls):
            for (a, b), call in zip(turn.spans[::-1], turn.calls[::-1]):
                text = text[:a] + form.write(call.name, call.arguments) + text[b:]
            break
    return text


def _utf8(text: str) -> str:
    """Lone surrogates, which JSON may hold and no tokenizer takes, become question marks."""
    return text.encode("utf-8", "replace").decode()


_TAGS = [f"<{x}>" for name in ("tool_call", "tool_response", "think") for x in (name, "/" + name)]

# what a template is tried with before a run
_KINDS = {"texts": {"type": "array", "items": {"type": "string"}}, "note": {"type": "string"}}
_PARAMETERS = {"type": "object", "properties": _KINDS, "required": ["texts"]}
_PROBE = {"name": "probe_tool", "description": "A tool.", "parameters": _PARAMETERS}
_PROBE_TOOLS = [{"type": "function", "function": _PROBE}]
_PROBE_CALLS = [Call("probe_tool", {"texts": ['a "b"', "ü <c>"], "note": "d\ne"})]
_PROBE_CALLS += [Call("probe_tool", {"texts": [], "note": "7"})]
_PROBE_RESULT = {"role": "tool", "content": "x", "tool_call_id": "probe0000"}
_CURE = "give one that does with --chat_template=FILE"

# private use: stands for the content of message {} while the template is rendered
_MARK = "\ue000{}\ue001"


class Chat:
    """Renders turns with the model's own chat template; what was rendered once never is again. Text
    from outside is encoded apart from the template's: it can never become a control token."""

    def __init__(self, tokenizer, tools: bool = True):
        """Tries the template and the tokenizer; a ValueError says what of them cannot be used.
        Without `tools` (a reward model) calls need no known format."""
        self.name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise ValueError(f"{self.name}: it has no chat template: {_CURE}")
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template(tools=_PROBE_TOOLS if tools else None)
        self._frame = lru_cache(maxsize=256)(self._render)
        self._inside = lru_cache(maxsize=1024)(lambda text: tuple(self._encode(text, split=False)))
        self._find_anchor()
        # all_special_tokens lacks those without a name, such as <|im_start|>
        added = {i: (str(t), t.special) for i, t in tokenizer.added_tokens_decoder.items()}
        added = {i: t for i, (t, special) in added.items() if special or t[0] + t[-1] == "<>"}
        self._control_ids, self._controls = set(added), [*_TAGS, *added.values()]
        self.closer_id = self._find_closer()
        try:
            self.takes_system = bool(self._frame(("system", "user"), "[]", True))
        except ValueError:
            self.takes_system = False
        self.calls = self._find_calls() if tools else HERMES
        begun = self._frame(("user",), "[]", True)[-1]
        # how the template itself begins every turn
        self.opened = begun[begun.rindex("<think>") :] if begun.rstrip()[-7:] == "<think>" else ""
        stops, response = [self.closer_id, tokenizer.eos_token_id], self._inside("<tool_response>")
        stops += response if len(response) == 1 else ()
        self.stop_ids = tuple(dict.fromkeys(i for i in stops if i is not None))
        wide = str.maketrans("<>|/_", "\uff1c\uff1e\uff5c\uff0f\uff3f")
        self.outside("".join(c + self.broken(c) + c.translate(wide) for c in self._controls))

    # ---------------------------------------------------------------- the template is tried

    def _refuse(self, why: str):
        raise ValueError(f"{self.name}: its chat template {why}")

    def _find_anchor(self) -> None:
        """What texts are encoded behind, and its ids: SentencePiece begins with a piece."""
        parts = (" a", "b", "\n", "c")
        for anchor in ("", _MARK[0]):
            self._anchor, self._head = "", []
            self._anchor, self._head = anchor, self._encode(anchor, split=True)
            ids = [i for part in parts for i in self._encode(part, split=True)]
            if self.decode(ids) == "".join(parts):
                return
        raise ValueError(f"{self.name}: its tokenizer changes texts that are encoded one by one")

    def _find_closer(self) -> int:
        """The control token that ends an assistant turn, whatever follows it or begins the turn."""
        turns = ([], [{"role": "user", "content": "x"}])
        closers = dict.fromkeys(tuple(self.fragment(each)[:1]) for each in turns)
        shown = " or ".join(repr(self.decode(ids)) for ids in closers)
        if len(closers) > 1 or () in closers:
            self._refuse(f"has no token that ends an assistant turn: {shown} follows it")
        ((closer,),) = closers
        if closer not in self.tokenizer.added_tokens_decoder:
            self._refuse(f"ends an assistant turn with {shown}, not a control token")
        if closer in self.text(self.decode([closer])):
            raise ValueError(f"{self.name}: its tokenizer makes a text a control token: {shown}")
        asked = self._frame(("user",), "[]", True)[-1]
        kept = self._frame(("user", "assistant"), "[]", False)[1]
        if len({re.sub(r"</?think>|\s", "", text) for text in (asked, kept)}) > 1:
            self._refuse(f"lets a turn begin with {asked!r} and shows it with {kept!r}")
        return closer

    def _find_calls(self) -> CallFormat:
        """The format of the template's calls: a call and its result are rendered and read back."""
        roles = ("system", "user") if self.takes_system else ("user",)
        if "probe_tool" not in "".join(self._frame(roles, json.dumps(_PROBE_TOOLS), True)):
            self._refuse(f"shows no tools: {_CURE}")
        text, result = self._turn_with(_PROBE_CALLS[:1])
        if "probe_tool" not in text + result:
            self._refuse(f"shows no tool calls: {_CURE}")
        for form in FORMATS:
            one = read_turn(text, form, _PROBE_TOOLS)
            if one.calls != _PROBE_CALLS[:1]:
                continue
            framed = self._frame(("user", "assistant", "tool"), "[]", True)[2:]
            if _PROBE_RESULT["content"].join(framed) != result:
                self._refuse(f"frames a tool result that follows a call otherwise: {result!r}")
            two = self._turn_with(_PROBE_CALLS)[0]
            ends = [end for span in read_turn(two, form).spans for end in span]
            lead, between, trail = two[: ends[0]], two[ends[1] : ends[-2]], two[ends[-1] :]
            if not (lead + between + trail).strip():
                return replace(form, lead=lead, between=between, trail=trail)
        known = "JSON or <function=...> in <tool_call>"
        self._refuse(f"writes a call as {(text + result)[:200]!r}, no format known here ({known})")

    def _turn_with(self, calls: list[Call]) -> tuple[str, str]:
        """What the template makes of a turn with calls, after its content, and of a result."""
        user, said = (dict(role=role, content=_MARK.format(role)) for role in ("user", "assistant"))
        functions = (dict(name=call.name, arguments=call.arguments) for call in calls)
        calls = [dict(id=f"probe{i:04}", function=each) for i, each in enumerate(functions)]
        said["tool_calls"] = [dict(type="function") | call for call in calls]
        text = self._apply([user, said, _PROBE_RESULT], _PROBE_TOOLS, True)
        text = text.partition(user["content"])[2]
        after = text.partition(said["content"])[2]
        if "probe_tool" not in after:  # some drop what is said, or put it behind
            after = text.removeprefix(self._frame(("user", "assistant"), "[]", True)[1])
        turn, closer, result = after.partition(self.decode([self.closer_id]))
        return turn, closer + result

    # ---------------------------------------------------------------- text and ids

    def _encode(self, text: str, split: bool) -> list[int]:
        if not text:
            return []
        text = self._anchor + _utf8(text)
        options = dict(add_special_tokens=False, split_special_tokens=split)
        return self.tokenizer.encode(text, **options)[len(self._head) :]

    def text(self, text: str) -> list[int]:
        """Text of the assistant: <think> and <tool_call> keep their tokens, not <|im_end|>."""
        return self._encode(text, split=True)

    def outside(self, text: str) -> list[int]:
        """Text of tools, pages, files, users: control strings are broken by a zero-width space.
        Some tokenizers fold look-alikes or drop characters: the ids are looked at, and what became
        a control string is broken for good."""
        text = self.broken(text)
        for _ in range(8):
            ids = self.text(text)
            text = self.decode(ids)
            if self._control_ids.isdisjoint(ids) and not any(tag in text for tag in _TAGS):
                return ids
            for control in self._controls:
                text = text.replace(control, "?" + control[1:])
        raise ValueError(f"{self.name}: its tokenizer makes control tokens of {text[:80]!r}")

    def broken(self, text: str) -> str:
        """The text with a zero-width space in control strings, also for a judge behind a URL."""
        text = _utf8(text)
        for control in self._controls:
            text = text.replace(control, control[0] + "\u200b" + control[1:])
        return text

    def decode(self, ids: list[int]) -> str:
        options = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
        head = len(self.tokenizer.decode(self._head, **options)) if self._head else 0
        return self.tokenizer.decode([*self._head, *ids], **options)[head:]

    def _apply(self, messages: list[dict], tools: list[dict], generate: bool) -> str:
        options = dict(tokenize=False, add_generation_prompt=generate, chat_template=self.template)
        for given in (tools or None, tools):  # some want a list of tools, be it empty
            try:
                return self.tokenizer.apply_chat_template(messages, tools=given, **options)
            except Exception as error:  # a template is a program: it raises what it likes
                why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        roles = ", ".join(message["role"] for message in messages)
        self._refuse(f"does not render turns of {roles} ({why})")

    def _render(self, roles: tuple[str, ...], tools: str, generate: bool) -> tuple[str, ...]:
        """The template's text around the contents: one piece more than there are contents."""
        messages = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        text, pieces = self._apply(messages, json.loads(tools), generate), []
        for i in range(len(roles)):
            before, mark, text = text.partition(_MARK.format(i))
            if not mark:
                self._refuse(f"drops the content of a {roles[i]} turn, or changes it")
            pieces.append(before)
        if _MARK[0] in "".join(pieces) + text:
            self._refuse("repeats the content of a turn or changes the order of turns")
        return (*pieces, text)

    def prompt(self, messages: list[dict], tools: list[dict] | None) -> list[int]:
        """Leading system and user turns with the tool schemas, up to where the assistant begins.
        Where the template has no system turn, its text begins the first user turn."""
        roles, contents = _roles(messages, ("system", "user")), []
        for message in messages:
            encode = self.text if message["role"] == "system" else self.outside
            contents.append(encode(message["content"]))
        if roles[:2] == ("system", "user") and not self.takes_system:
            contents[:2] = [contents[0] + self.text("\n\n") + contents[1]]
            roles = roles[1:]
        return self._joined(self._frame(roles, json.dumps(tools or []), True), contents)

    def _joined(self, pieces: tuple[str, ...], contents: list[list[int]]) -> list[int]:
        ids = list(self._inside(pieces[0]))
        for content, piece in zip(contents, pieces[1:]):
            ids += [*content, *self._inside(piece)]
        return ids

    def fragment(self, messages: list[dict]) -> list[int]:
        """What follows an assistant turn: its closer, these turns, the start of the next one."""
        roles = _roles(messages, ("user", "tool"))
        pieces = self._frame(("user", "assistant", *roles), "[]", True)[2:]
        return self._joined(pieces, [self.outside(message["content"]) for message in messages])

    def row(self, messages: list[dict], tools: list[dict] | None = None) -> tuple[list, list]:
        """An SFT row -> (ids, mask), as if the policy had sampled the assistant turns and closers.
        Turns after the last assistant turn are left out: nothing in them is trained."""
        if problem := check_messages(messages):
            raise ValueError(problem)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ids = self.prompt(messages[: turns[0]], tools)
        mask = [0] * len(ids)
        for at, then in zip(turns, [*turns[1:], None]):
            text = translated(assistant_text(messages[at], self.calls), self.calls)
            turn = [*self.text(self.sampled(text)), self.closer_id]
            between = self.fragment(messages[at + 1 : then])[1:] if then else []
            ids += turn + between
            trained = int(messages[at].get("trained", True))
            mask += [trained] * len(turn) + [0] * len(between)
        return ids, mask

    def sampled(self, text: str) -> str:
        """What the policy writes of a turn, where the template has opened <think> for it."""
        if not self.opened:
            return text
        if not text.startswith("<think>"):
            return "</think>\n\n" + text
        return text.removeprefix("<think>").removeprefix(self.opened.removeprefix("<think>"))

    def paint(self, ids: list[int], mask: list[int]) -> str:
        """The row as text for a terminal, trained tokens in green."""
        painted = ""
        for trained, pairs in groupby(zip(ids, mask), key=itemgetter(1)):
            text = self.decode([i for i, _ in pairs])
            painted += f"\033[32m{text}\033[0m" if trained else text
        return painted


def _roles(messages: list[dict], allowed: tuple[str, ...]) -> tuple[str, ...]:
    for i, message in enumerate(messages):
        if message["role"] not in allowed:
            known = f"here only {' and '.join(allowed)} can stand"
            raise ValueError(f"message {i}: role {message['role']!r}, {known}")
    return tuple(message["role"] for message in messages)


def check_messages(messages) -> str | None:
    """Whether messages can be an SFT row: an error text that names the message, or None."""
    if not isinstance(messages, list) or not messages:
        return "'messages' is a list of turns"
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant", "tool"):
            return f"message {i}: the role is system, user, assistant or tool"
        content = message.get("content")
        if not isinstance(content, str) and (content is not None or role != "assistant"):
            return f"message {i}: 'content' is a text, not {type(content).__name__}"
        try:
            assistant_text(message)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            return f"message {i}: tool_calls or reasoning_content cannot be read ({why})"
    if not any(m["role"] == "assistant" and m.get("trained", True) for m in messages):
        return "no assistant turn to train on"
    roles = [m["role"] for m in messages]
    first = roles.index("assistant")
    if not first or "tool" in roles[:first]:
        return "the first turns are system or user"
    for i, role in enumerate(roles[first + 1 :], first + 1):
        if role == "system":
            return f"message {i}: a system turn after the first assistant turn"
        if role == roles[i - 1] == "assistant":
            return f"message {i}: two assistant turns in a row"
    return None
