"""JSONL files, what rows of each kind hold, and the order in which a run takes them. No torch."""

import hashlib
import json
import random
import re
from array import array
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

# ---------------------------------------------------------------- JSONL
MAX_DEPTH = 64  # of nested JSON that is copied and written again
_SURROGATE = re.compile("[\ud800-\udfff\0]")  # no file name or seed takes halves of characters
_decode = json.JSONDecoder().decode  # json.loads guesses the encoding first, which takes as long


class JsonlRows:
    """A JSONL file by byte offsets: lines are checked at opening, not kept; `rows[i]` reads one.
    `check(row)`: an error text or None. SystemExit names file and line, equal ids if `unique`."""

    def __init__(self, path: str, check: Callable | None = None, hint="", unique=True):
        self.path, self.offsets = str(path), array("q")
        script = Path(path).with_name("prepare.py")
        hint = hint or (f"run python {script}" if script.is_file() else "")
        hint = f": {hint}" if hint else ""
        if not Path(path).is_file():
            raise SystemExit(f"no file {path}{hint}")
        keys, offset = array("q"), 0  # of the ids: 8 bytes, however long they are
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    row = self._parse(line, number)
                    if problem := check(row) if check else None:
                        raise SystemExit(f"{path}:{number}: {problem}")
                    keys.append(hash(repr(row["id"]) if unique and "id" in row else (number,)))
                    self.offsets.append(offset)
                offset += len(line)
        if not self.offsets:
            raise SystemExit(f"{path} is empty{hint}")
        self._check_unique(keys)

    def _check_unique(self, keys: array) -> None:
        import numpy as np

        keys = np.frombuffer(keys, np.int64)
        firsts = np.unique(keys, return_index=True)[1]
        if len(firsts) < len(keys):
            again = int(np.setdiff1d(np.arange(len(keys)), firsts)[0])
            first, data = int(np.flatnonzero(keys == keys[again])[0]), Path(self.path).read_bytes()
            here, there = (data.count(b"\n", 0, self.offsets[i]) + 1 for i in (again, first))
            what = f"id {self[again]['id']!r} stands in line {there} too"
            raise SystemExit(f"{self.path}:{here}: {what}")

    def _parse(self, line: bytes, number: int) -> dict:
        try:
            row = _decode(str(line, "utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise SystemExit(f"{self.path}:{number}: not a JSON line ({error})") from error
        if not isinstance(row, dict):
            raise SystemExit(f"{self.path}:{number}: a row is an object, not {type(row).__name__}")
        return row

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return json.loads(file.readline())


def drop_cut_line(path: Path) -> None:
    """Cuts off the last line of a file that only grows, if a kill left it without its end."""
    if path.is_file():
        with open(path, "rb+") as file:
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def batch_indices(step: int, batch: int, n: int, seed: int) -> list[int]:
    """Rows of a step, of a stream of seeded permutations of n rows: no state, resume is exact. A
    batch at the seam of two epochs, or one larger than n, can hold a row twice."""
    picked: list[int] = []
    while len(picked) < batch:
        epoch, start = divmod(step * batch + len(picked), n)
        picked += _permutation(n, seed, epoch)[start : start + batch - len(picked)]
    return picked


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> array:
    order = array("q", range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def check_rl_row(row: dict) -> str | None:
    """What is wrong with an RL row (docs/records.md), or None; null docs or files are absent."""
    for key in ("id", "question", "answer"):
        if row.get(key) in (None, "", []):
            return f"an RL row needs {key!r}; found the keys {sorted(row)}"
    if type(row["id"]) not in (str, int) or _SURROGATE.search(str(row["id"])):
        return f"'id' is a text or a whole number, not {row['id']!r:.80}"
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not _texts(row["question"], *answers) or not all(map(str.strip, answers)):
        return "'question' is a text, 'answer' a text or a list of texts"
    if row.get("kind") not in ("math", "qa", "gaia", "choice"):
        return f"'kind' is {row.get('kind')!r}: math, qa, gaia or choice"
    docs, files = ([] if row.get(key) is None else row[key] for key in ("docs", "files"))
    whole = isinstance(docs, list) and all(isinstance(doc, dict) for doc in docs)
    if not whole or not _texts(*(doc.get(key) for doc in docs for key in ("title", "text"))):
        return "'docs' is a list of {'title', 'text'}"
    if not isinstance(files, list) or not _texts(*files) or _SURROGATE.search("".join(files)):
        return "'files' is a list of paths"
    if not isinstance(row.get("meta") or {}, dict) or _deeper(row.get("meta"), MAX_DEPTH):
        return f"'meta' is an object, nested at most {MAX_DEPTH} deep"
    return None


def _texts(*values) -> bool:
    return set(map(type, values)) <= {str}


def _deeper(value, depth: int) -> bool:
    inner = list(value.values()) if isinstance(value, dict) else value
    return isinstance(inner, list) and (not depth or any(_deeper(x, depth - 1) for x in inner))


# ---------------------------------------------------------------- SFT rows

_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
_ROLES |= dict.fromkeys("observation function function_response tool_response".split(), "tool")
_ROLES |= {"ipython": "tool", "environment": "tool", "tool_call": "function_call"}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_MARKS = "loss loss_mask loss_weight weight train trainable".split()  # false: it is not trained
_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", *_THOUGHTS, *_MARKS}
_KEYS |= {"name", "id", "index", "tool_call_id", "timestamp"}  # these may stand in a turn unread


def sft_messages(row: dict) -> list[dict]:
    """The turns of a row with messages, sharegpt `conversations` or alpaca's keys, as [{"role",
    "content", "reasoning_content"?, "tool_calls"?, "trained"?}]. What is not understood is a
    ValueError. Nulls are absent: a parquet file gives every turn the keys of all others."""
    row = without_nulls(row)
    if other := [key for key in ("images", "videos", "audios") if row.get(key)]:
        raise ValueError(f"{other[0]!r}: only texts are trained on")
    if row.get("label") is False or row.get("kto_tag") is False:  # KTO
        raise ValueError("'label' or 'kto_tag' says that its reply is a bad one")
    turns = row.get("messages", row.get("conversations"))
    turns = json.loads(turns) if isinstance(turns, str) and turns[:1] == "[" else turns
    if turns is None and "instruction" in row and "output" in row:
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        pairs = [*row.get("history", []), (question, row["output"])]
        said = (turn for a, b in pairs for turn in (("user", a), ("assistant", b)))
        turns = [dict(role=role, content=text) for role, text in said]
    if not isinstance(turns, list):
        raise ValueError(f"no messages, conversations or instruction/output: {sorted(row)}")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    messages: list[dict] = []
    for i, turn in enumerate(turns):
        try:
            message, is_call = _message(turn)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"message {i}: cannot be read ({error})") from error
        if system and message["role"] == "system":
            raise ValueError(f"message {i}: a system turn beside 'system'")
        if is_call and messages and messages[-1]["role"] == "assistant":
            last = messages[-1]  # what was said before the call
            last["content"] = "\n".join(filter(None, (last["content"], message["content"])))
            last["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
    return system + messages


def _message(turn: dict) -> tuple[dict, bool]:
    """One turn of any layout; whether it is calls alone, which belong to the turn before."""
    if unread := [key for key in turn if key not in _KEYS and turn[key]]:
        raise ValueError(f"the key {unread[0]!r} is not understood")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = _ROLES.get(role, role)
    if isinstance(content, list):
        if any(part.get("type", "text") != "text" or {*_MARKS} & {*part} for part in content):
            raise ValueError("a part of its content is no text, or has a mask of its own")
        content = "".join(part.get("text", part.get("value")) for part in content)
    calls = turn.get("tool_calls") or list(filter(None, [turn.get("function_call")]))
    if is_call := role == "function_call":  # as JSON or raw, behind any thoughts
        role, raw = "assistant", "<tool_call>" in content
        head, closer, text = (content, "", "[]") if raw else content.rpartition("</think>")
        content, calls = head + closer, without_nulls(json.loads(text))
        calls = calls if isinstance(calls, list) else [calls]
    if role == "tool" and str(content).strip().startswith("<tool_response>"):  # Hermes
        content = re.sub(r"\s*(</?tool_response>\s*)+", "\n", content).strip("\n")
    if role != "assistant":
        return {"role": role, "content": content}, False
    thoughts = {turn[key] for key in _THOUGHTS if turn.get(key)}
    if len(thoughts) > 1 or content is None and not calls and not thoughts:
        raise ValueError("its reasoning stands there twice" if thoughts else "it holds nothing")
    marks = [turn[key] for key in _MARKS if key in turn]
    if any(mark not in (0, 1) for mark in marks):
        raise ValueError(f"whether it is trained is told by true or false, 1 or 0, not {marks}")
    calls = [{"arguments": {}, **call.get("function", call)} for call in calls]
    message = dict(role=role, content=content, tool_calls=calls, trained=all(marks))
    return message | {"reasoning_content": "".join(thoughts)}, is_call


def sft_tools(row: dict) -> list[dict]:
    """The schemas of a row: a list or its JSON text, each wrapped as a function or bare."""
    tools = row.get("tools") or row.get("functions") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools or []]
        tools = [tool.get("function", tool) for tool in without_nulls(tools)]
        if not _texts(*(tool["name"] for tool in tools)):
            raise TypeError("a name is a text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'tools' is a list of schemas, or its JSON text ({error})") from error
    return [{"type": "function", "function": {k: t[k] for k in t if k != "type"}} for t in tools]


def without_nulls(value):
    """`value` without the null keys of its objects."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return value


def seed_of(*parts) -> int:
    """A seed below 2^62 of (run seed, step, sibling, task, stage, turn, role, retry); they vary."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def shown_question(row: dict) -> str:
    """The question as the agent reads it, with the names of its files."""
    return row["question"] + "".join(f"\nFile: {name}" for name in row.get("files") or [])
