"""Trajectories of any agent, as the question and the turns that a reward model reads; the layouts
of a turn: data/turns.py.

What is read: OpenAI messages (tool_calls, function_call, parts), Anthropic, Bedrock and Gemini
messages, items of the Responses API and the OpenAI Agents SDK, LangChain, LangGraph and LlamaIndex
dumps, smolagents' steps, AutoGen, Pydantic AI and ADK runs, the AI SDK's messages, SWE-agent's and
mini-swe-agent's .traj, OpenHands' events, ATIF, Inspect's logs, sessions of Claude Code, Codex and
Gemini CLI, DSPy's ReAct, messages of Haystack, Semantic Kernel, OpenTelemetry and Assistants, a
request with its reply, tau-bench, sharegpt, our episodes, RRM rows, plain text; in json, jsonl,
parquet or text. Where a row names no question, what the user says before the agent's first turn is
it, or what the user says first; what else stands before that turn, system turns too, is not the
agent's work.
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.hotpotqa.prepare import read_parquet
from data.turns import as_content, call, first_of, is_openhands, is_pydantic, messages_of
from reagent.reward_model import plain_turns
from reagent.rows import without_nulls

QUESTION = "question task problem_statement instruction query problem prompt input".split()
QUESTION += "original_input originalInput".split()
TURNS = "trajectory messages conversations history steps traj new_items items output".split()
TURNS += "newItems generated_items generatedItems completion response events contents".split()
TURNS += "entries chat_history".split()  # Mistral, Cohere
# keys of a list of rows
ROWS = "trajectories episodes samples simulations results rows data".split()
NAMES = "id instance_id task_id run_id name".split()  # what a row may call itself
# that a folder is searched for; a text is named itself
SUFFIXES = (".json", ".jsonl", ".traj", ".eval", ".parquet")
TURN_KEYS = set("role from type lc step_number action observation rawItem raw_item".split())
TURN_KEYS |= set("step_id llm_message invocation_id invocationId Role _role step_details".split())


@dataclass(frozen=True)
class Work:
    """One attempt of an agent. `row`: FILE:LINE or FILE#N; `name`: what it calls itself."""

    row: str
    name: str
    question: str
    turns: str | list[dict]
    attempt: int = 0  # of the chain, from 1; 0: it holds one


@dataclass(frozen=True)
class Unread:
    """A row that could not be read."""

    row: str
    problem: str


def read_works(paths: list[str], question: str = "") -> Iterator[Work | Unread]:
    """All that files, folders and "-" (stdin) hold; `question`: of rows that name none."""
    for path in paths:
        for row, value in rows_of(path):
            if not isinstance(value, Unread):
                try:
                    yield from works_of(value, row, question)
                    continue
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    value = Unread(row, str(error))
            yield value


# --------------------------------------------------------------------------------------------------
# files


def rows_of(path: str) -> Iterator[tuple[str, object]]:
    """(its name, the row or Unread) of each row of a file, a folder or stdin."""
    if Path(path).is_dir():
        found = sorted(p for p in Path(path).rglob("*") if p.suffix in SUFFIXES and p.is_file())
        for inner in found:
            yield from rows_of(str(inner))
        if not found:
            yield path, Unread(path, f"a folder without {', '.join(SUFFIXES)}")
        return
    if path.endswith((".eval", ".parquet")):
        yield from samples_of(path) if path.endswith(".eval") else parquet_rows(path)
        return
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        yield path, Unread(path, f"cannot be read ({error})")
        return
    path = "stdin" if path == "-" else path
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield from lines_of(path, text, str(error))
        return
    rows = listed_rows(value)
    if rows is None:
        yield path, value
    for n, row in enumerate(rows or [], 1):
        yield f"{path}#{n}", row


def parquet_rows(path: str) -> Iterator[tuple[str, object]]:
    """The rows of a parquet file, where a turn has the keys of all others, null if not its own."""
    try:
        yield from ((place, without_nulls(row)) for place, row in read_parquet(path))
    except ValueError as error:
        yield path, Unread(path, str(error))


def samples_of(path: str) -> Iterator[tuple[str, object]]:
    """The samples of a log of Inspect, which is a zip of JSON files."""
    try:
        with zipfile.ZipFile(path) as log:
            for name in (name for name in log.namelist() if name.startswith("samples/")):
                yield f"{path}#{name}", json.loads(log.read(name))
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        told = f"cannot be read ({error}); inspect log convert --to json writes what can"
        yield path, Unread(path, told)


def lines_of(path: str, text: str, problem: str) -> Iterator[tuple[str, object]]:
    """The rows of JSON lines, or one text."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[0][1].lstrip() if lines else ""
    if not first:
        yield path, Unread(path, "empty")
    elif not path.endswith(".jsonl") and not first.startswith(("{", "[{")):
        yield path, text
    elif first in ("{", "[{") or path.endswith(".traj"):
        yield path, Unread(path, f"not JSON ({problem})")
    else:
        rows: list[tuple[str, object]] = []
        for number, line in lines:
            row = f"{path}:{number}"
            try:
                rows.append((row, json.loads(line)))
            except (ValueError, RecursionError) as error:
                rows.append((row, Unread(row, f"not a JSON line ({error})")))
        turns = session_turns([value for _, value in rows])
        broken = [(row, value) for row, value in rows if isinstance(value, Unread)]
        yield from [(path, turns), *broken] if turns else rows


def session_turns(lines: list) -> list[dict]:
    """The turns of the one trajectory whose events the lines of a file are, as Claude Code, Codex
    and OpenHands write them; [] where the lines are rows."""
    turns = []
    for line in lines:
        if not isinstance(line, dict):
            continue
        if line.get("type") == "response_item" and isinstance(line.get("payload"), dict):
            turns.append(line["payload"])
        elif is_openhands(line):
            turns.append(line)
        elif line.get("type") in ("user", "assistant") and isinstance(line.get("message"), dict):
            if not line.get("isSidechain") and not line.get("isMeta"):
                turns.append({"role": line["type"]} | line["message"])
    return turns


def listed_rows(value) -> list | None:
    """The rows that one JSON value holds; None where it is a row of its own."""
    if isinstance(value, list):
        return None if value and all(map(is_turn, value)) else value
    if isinstance(value, dict) and turns_in(value) is None:
        return next((value[key] for key in ROWS if isinstance(value.get(key), list)), None)
    return None


def is_turn(value) -> bool:
    """Whether a value of a list is a turn of one trajectory rather than a row of its own."""
    if not isinstance(value, dict) or {"trajectory", "messages"} & set(value):
        return False
    if isinstance(value.get("state"), dict):  # a session
        return False
    if any(isinstance(value.get(key), list) for key in TURNS[:6]):
        return False
    if TURN_KEYS & set(value) or is_pydantic(value) or is_openhands(value):
        return True
    return ("task" in value or "system_prompt" in value) and turns_in(value) is None  # smolagents


# --------------------------------------------------------------------------------------------------
# rows


def turns_in(row: dict) -> list | str | None:
    """What of a row is the trajectory. SWE-agent's history, which has the task, goes before its
    trajectory; a checkpoint or a trace has its messages one level down."""
    history = row.get("history")
    if isinstance(history, list) and any(isinstance(t, dict) and "role" in t for t in history):
        return history
    if exchange := asked_and_answered(row):
        return exchange
    for key in TURNS:
        value = row.get(key)
        if isinstance(value, dict) and "tool_name_0" in value:
            return react_turns(row, value)
        value = json.loads(value) if isinstance(value, str) and value[:2] == "[{" else value
        if isinstance(value, str) and value.strip() or isinstance(value, list) and value:
            return value
    for key in ("outputs", "output", "values", "channel_values", "state", "data", "kwargs"):
        inner = row.get(key)
        if row.get("object") == "list" and inner and all(map(is_turn, inner)):  # OpenAI's pages
            return inner
        inner = inner if isinstance(inner, dict) else {}
        for deep in (inner, *inner.values()):  # a session has one for each of its stores
            if isinstance(deep, dict) and isinstance(deep.get("messages"), list):
                return deep["messages"]
    return None


def asked_and_answered(row: dict) -> list | None:
    """The messages of a request to a model and its reply, as logs of servers, Langfuse and
    OpenAI's batches keep them; None of another row."""
    reply, sent = first_of(row, "output", "response", "choices"), row
    for key in ("body", "choices", 0, "message"):
        if (
            isinstance(reply, dict)
            and key in reply
            or reply
            and isinstance(reply, list)
            and not key
        ):
            reply = reply[key]
    for key in ("request", "body"):
        sent = sent[key] if isinstance(sent.get(key), dict) else sent
    before = first_of(sent, "messages", "input", "prompt")
    if not isinstance(reply, dict) or "role" not in reply or not before:
        return None
    before = before if isinstance(before, list) else [{"role": "user", "content": before}]
    said = [
        [m.get(key) for key in ("content", "tool_calls")] for m in before if isinstance(m, dict)
    ]
    if [reply.get(key) for key in ("content", "tool_calls")] in said:  # Inspect's stands there
        return None
    return [*before, reply]


def react_turns(row: dict, steps: dict) -> list[dict]:
    """The steps of DSPy's ReAct; then, where the row is its prediction, the answer."""
    turns = []
    for i in range(sum(key.startswith("tool_name_") for key in steps)):
        called = call(steps[f"tool_name_{i}"], steps.get(f"tool_args_{i}") or {})
        said = {"role": "assistant", "content": steps.get(f"thought_{i}") or ""}
        told = as_content(steps.get(f"observation_{i}", ""))
        turns += [said | {"tool_calls": [called]}, {"role": "tool", "content": told}]
    if isinstance(row.get("reasoning"), str):  # ends a prediction, before its outputs
        rest = {key: v for key, v in row.items() if key not in {*QUESTION, *TURNS, *NAMES}}
        final = {"role": "assistant", "reasoning_content": rest.pop("reasoning")}
        turns.append(final | {"content": "\n".join(map(str, rest.values()))})
    return turns


def works_of(row, name: str, question: str = "") -> Iterator[Work]:
    """The attempts in a row. ValueError: what cannot be read."""
    if isinstance(row, str):
        yield Work(name, "", question, row)
        return
    row = {"messages": row} if isinstance(row, list) else row
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, a list of turns or a text, not {row!r:.40}")
    if "sealed" in row:
        raise ValueError("its texts are encrypted")
    own = next((str(row[key]) for key in NAMES if isinstance(row.get(key), (str, int))), "")
    if is_episode(row):
        if not row["attempts"]:
            raise ValueError("an episode without an attempt")
        for number, attempt in enumerate(row["attempts"], 1):
            turns = row["messages"][slice(*attempt["messages"])]
            yield Work(name, own, row["question"], plain_turns(turns), number)
        return
    held = turns_in(row)
    if held is None:
        raise ValueError(f"no trajectory; found the keys {sorted(row)}")
    asked = next((row[key] for key in QUESTION if row.get(key)), question)
    turns = held if isinstance(held, str) else messages_of(held)
    if isinstance(asked, list):  # the prompt is a conversation
        *_, asked = [t["content"] for t in messages_of(asked) if t["role"] == "user"] or [""]
    asked = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
    if isinstance(turns, list):
        asked, turns = split(turns, asked)
        info = row.get("info")
        if isinstance(info, dict) and {"exit_status", "submission", "model_stats"} & set(info):
            # of SWE-agent and mini-swe-agent: nobody else speaks
            turns = [t | {"role": {"user": "tool"}.get(t["role"], t["role"])} for t in turns]
    yield Work(name, own, asked, turns)


def is_episode(row: dict) -> bool:
    attempts = row.get("attempts")
    return isinstance(attempts, list) and all(
        isinstance(a, dict) and isinstance(a.get("messages"), (list, tuple)) for a in attempts
    )


def split(turns: list[dict], question: str) -> tuple[str, list[dict]]:
    """(the question, the agent's part): what stands before its first turn is not its work."""
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), None)
    if first is None:
        raise ValueError("no turn of the agent in it")
    if not any(turn["content"].strip() for turn in turns[first:] if turn["role"] == "assistant"):
        raise ValueError("the agent's turns hold no words and no calls that can be read")
    users = [turn["content"] for turn in turns[:first] if turn["role"] == "user"]
    if not users:  # the agent greets first
        users = [turn["content"] for turn in turns if turn["role"] == "user"][:1]
    return question or "\n\n".join(users), turns[first:]
