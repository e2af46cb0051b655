"""Trajectories of any agent, as the question and the turns that a reward model reads.

What is read: OpenAI messages (tool_calls, function_call, parts), Anthropic and Gemini messages,
items of the Responses API and the OpenAI Agents SDK, LangChain and LangGraph dumps, smolagents'
steps, SWE-agent's and mini-swe-agent's .traj, OpenHands' events, sharegpt, our episodes, RRM rows,
plain text; in json, jsonl or text. Where a row names no question, what the user says before the
agent's first turn is it; what else stands there, system turns too, is not the agent's work.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reagent.reward_model import plain_turns
from toolkit.text import spoken

QUESTION = "question task problem_statement instruction query problem prompt input".split()
QUESTION += "original_input originalInput".split()
TURNS = "trajectory messages conversations history steps traj new_items items output".split()
TURNS += "newItems generated_items generatedItems completion response".split()
ROWS = "trajectories episodes samples results rows data".split()  # keys of a list of rows
NAMES = "id instance_id task_id run_id name".split()  # what a row may call itself
SUFFIXES = (".json", ".jsonl", ".traj")  # that a folder is searched for; a text is named itself
ROLES = {"human": "user", "gpt": "assistant", "ai": "assistant", "model": "assistant"}
ROLES |= {"bot": "assistant", "agent": "assistant", "developer": "system", "exit": "tool"}
ROLES |= {"tool-call": "assistant", "tool_call": "assistant", "function_call": "assistant"}
ROLES |= dict.fromkeys("function observation tool-response tool_response".split(), "tool")
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
LANGCHAIN = {kind: ROLES[kind] for kind in ("human", "ai", "system", "tool", "function")}
LANGCHAIN |= {"AIMessageChunk": "assistant", "HumanMessageChunk": "user"}
TURN_KEYS = set("role from type lc step_number action observation rawItem raw_item".split())


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
        for number, line in lines:
            row = f"{path}:{number}"
            try:
                yield row, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield row, Unread(row, f"not a JSON line ({error})")


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
    if any(isinstance(value.get(key), list) for key in TURNS[:6]):
        return False
    if TURN_KEYS & set(value):
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
    for key in TURNS:
        value = row.get(key)
        value = json.loads(value) if isinstance(value, str) and value[:2] == "[{" else value
        if isinstance(value, str) and value.strip() or isinstance(value, list) and value:
            return value
    for key in ("outputs", "output", "values", "channel_values", "state", "data", "kwargs"):
        inner = row.get(key)
        if isinstance(inner, dict) and isinstance(inner.get("messages"), list):
            return inner["messages"]
    return None


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
        if isinstance(row.get("info"), dict):  # of SWE-agent and mini-swe-agent: nobody else speaks
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
    users = [turn["content"] for turn in turns[:first] if turn["role"] == "user"]
    return question or "\n\n".join(users), turns[first:]


# --------------------------------------------------------------------------------------------------
# turns


def messages_of(turns: list) -> list[dict]:
    """Turns of any layout as {"role", "content"}, calls in the turn that made them. ValueError."""
    messages: list[dict] = []
    for number, turn in enumerate(turns):
        try:
            for message in converted(turn):
                last = messages[-1] if messages else {}
                if message.pop("item", False) and last.get("role") == "assistant":
                    join(last, message)
                else:
                    messages.append(message)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"turn {number} is not understood ({error})") from error
    return plain_turns(messages)


def join(last: dict, message: dict) -> None:
    """Reasoning, words and calls that one reply of a model sent as items, in one turn."""
    texts = filter(None, (spoken(last)[0], spoken(message)[0]))
    last["content"] = "\n".join(texts)
    thoughts = filter(None, (last.get("reasoning_content"), message.get("reasoning_content")))
    last["reasoning_content"] = "\n".join(thoughts)
    last["tool_calls"] = [*(last.get("tool_calls") or []), *(message.get("tool_calls") or [])]


def converted(turn: dict) -> list[dict]:
    """One turn, step, event or item as OpenAI messages."""
    if not isinstance(turn, dict):
        raise ValueError(f"an object is expected, not {turn!r:.40}")
    if inner := turn.get("rawItem") or turn.get("raw_item"):  # the Agents SDK's run items
        return converted(inner)
    if turn.get("is_demo"):  # SWE-agent's demonstration is not of this task
        return []
    if "lc" in turn and "kwargs" in turn:  # LangChain's dumpd
        kind = str(turn["id"][-1]).removesuffix("Chunk").removesuffix("Message").lower()
        return converted({**turn["kwargs"], "role": kind})
    if isinstance(turn.get("data"), dict) and "type" in turn:  # LangChain's messages_to_dict
        return converted({**turn["data"], "role": turn["type"]})
    kind = str(turn.get("type", ""))
    role = turn.get("role", turn.get("from"))
    if role is None and kind in LANGCHAIN:
        role = LANGCHAIN[kind]
    if role is not None:
        return message_of(turn, ROLES.get(str(role)) or refuse(f"the role {role!r}"))
    if kind:
        return item_of(turn, kind)
    if "source" in turn or "observation" in turn and "extras" in turn:
        return event_of(turn)
    return step_of(turn)


def refuse(what: str):
    raise ValueError(f"{what} is not known")


def call(name, arguments) -> dict:
    """A tool call; arguments that are no object stand under "input"."""
    arguments = arguments if isinstance(arguments, (dict, str)) else {"input": arguments}
    return {"function": {"name": name, "arguments": arguments}}


def message_of(turn: dict, role: str) -> list[dict]:
    """A message of a chat; results inside a user turn (Anthropic, Gemini) are tool turns."""
    content = turn.get("content", turn.get("value", turn.get("parts")))
    message = {"role": role, "content": content, "item": turn.get("type") == "message"}
    calls = turn.get("tool_calls") or [turn[k] for k in ("function_call",) if turn.get(k)]
    thoughts = (turn.get("additional_kwargs") or {}).get("reasoning_content")
    for key in ("reasoning_content", "reasoning"):
        thoughts = turn[key] if isinstance(turn.get(key), str) else thoughts
    found, results, kept = [*map(call_of, calls)], [], []
    for part in content if isinstance(content, list) else []:
        kind, inner = part_of(part)
        {"call": found, "result": results}.get(kind, kept).append(inner)
    if isinstance(content, list):
        message["content"] = kept
    if isinstance(content, dict):
        message["content"] = json.dumps(content, ensure_ascii=False)
    if role != "assistant":
        return [*results, *([message] if kept or not isinstance(content, list) else [])]
    return [message | {"tool_calls": found, "reasoning_content": thoughts or ""}, *results]


def call_of(told: dict) -> dict:
    """A call as OpenAI, LangChain ("args") or Inspect ("function" is the name) write it."""
    function = told.get("function", told)
    if isinstance(function, str):
        return call(function, told.get("arguments") or {})
    return call(function["name"], function.get("arguments", function.get("args")) or {})


def part_of(part) -> tuple[str, object]:
    """("call", call) | ("result", tool message) | ("", text part) of a part of a message."""
    part = part if isinstance(part, dict) else {"type": "text", "text": str(part)}
    kind = part.get("type", "")
    if kind in ("tool_use", "server_tool_use", "tool-call"):
        name, given = part.get("name", part.get("toolName")), part.get("input", part.get("args"))
        return "call", call(name, given or {})
    if inner := part.get("functionCall") or part.get("function_call"):
        return "call", call(inner["name"], inner.get("args") or {})
    if kind.endswith(("tool_result", "tool-result")):
        told = next((part[k] for k in ("content", "output", "result") if k in part), "")
        return "result", {"role": "tool", "content": as_content(told)}
    if inner := part.get("functionResponse") or part.get("function_response"):
        return "result", {"role": "tool", "content": as_content(inner.get("response"))}
    if kind == "refusal":
        return "", {"type": "text", "text": part["refusal"]}
    return "", part


def as_content(told):
    """What a tool returned as the content of a message."""
    if isinstance(told, dict) and isinstance(told.get("text", told.get("value")), str):
        return told.get("text", told.get("value"))
    parts = isinstance(told, list) and all(isinstance(p, dict) and "type" in p for p in told)
    return told if isinstance(told, str) or parts else json.dumps(told, ensure_ascii=False)


def item_of(turn: dict, kind: str) -> list[dict]:
    """An item of the Responses API, other than its messages."""
    if kind == "reasoning":
        parts = [*(turn.get("summary") or []), *(turn.get("content") or [])]
        thoughts = "\n".join(p["text"] for p in parts if isinstance(p.get("text"), str))
        thinking = {"role": "assistant", "content": "", "reasoning_content": thoughts}
        return [thinking | {"item": True}] if thoughts else []
    if kind.endswith(("_output", "_result")):
        return [{"role": "tool", "content": as_content(turn.get("output"))}]
    if not kind.endswith("_call"):
        refuse(f"the type {kind!r}")
    hidden = ("id", "call_id", "type", "status", "name", "output", "results", "outputs")
    given = next((turn[k] for k in ("arguments", "input", "action") if k in turn), None)
    given = {k: v for k, v in turn.items() if k not in hidden} if given is None else given
    name = turn.get("name") or kind.removesuffix("_call")
    called = {"role": "assistant", "content": "", "tool_calls": [call(name, given)], "item": True}
    told = turn.get("output") or turn.get("results") or turn.get("outputs")
    return [called, *([{"role": "tool", "content": as_content(told)}] if told else [])]


def event_of(turn: dict) -> list[dict]:
    """An event of OpenHands: an action of the agent, what came back, a message of the user."""
    given = turn.get("args") or {}
    kind = turn.get("action", turn.get("observation"))
    if kind in ("recall", "agent_state_changed", "change_agent_state", "system", "null", None):
        return []  # its own bookkeeping
    if "observation" in turn:
        return [{"role": "tool", "content": as_content(turn.get("content", ""))}]
    words = given.get("content") or turn.get("message") or ""
    if turn.get("source") != "agent":
        return [{"role": "user", "content": words}]
    if kind == "message":
        return [{"role": "assistant", "content": words}]
    hidden = ("thought", "hidden", "confirmation_state", "security_risk")
    calls = [
        call(kind, {k: v for k, v in given.items() if k not in hidden and v not in (None, "")})
    ]
    return [{"role": "assistant", "content": given.get("thought") or "", "tool_calls": calls}]


def step_of(turn: dict) -> list[dict]:
    """A step of smolagents' memory or of SWE-agent's trajectory."""
    for key, role in (("system_prompt", "system"), ("task", "user"), ("plan", "assistant")):
        if isinstance(turn.get(key), str) and "step_number" not in turn:
            return [{"role": role, "content": turn[key]}]
    if "action" in turn:  # SWE-agent
        said = turn.get("response") or f"{turn.get('thought') or ''}\n{turn['action']}".strip()
        said = {"role": "assistant", "content": said}
        return [said, {"role": "tool", "content": turn.get("observation") or ""}]
    if "step_number" not in turn:
        refuse(f"a turn with the keys {sorted(turn)}")
    said = turn.get("model_output") or (turn.get("model_output_message") or {}).get("content")
    text, _ = spoken({"content": said})
    calls = (
        [] if turn.get("code_action") and turn["code_action"] in text else turn.get("tool_calls")
    )
    messages = [{"role": "assistant", "content": text, "tool_calls": [*map(call_of, calls or [])]}]
    if turn.get("observations"):
        messages.append({"role": "tool", "content": turn["observations"]})
    if error := turn.get("error"):
        told = error.get("message", error) if isinstance(error, dict) else error
        messages.append({"role": "tool", "content": f"Error: {told}"})
    if turn.get("is_final_answer") and turn.get("action_output") is not None:
        final = as_content(turn["action_output"])
        messages.append({"role": "assistant", "content": f"Final answer: {final}"})
    return messages
