"""Trajectories of any agent, as the question and the turns that a reward model reads.

What is read: OpenAI messages (tool_calls, function_call, parts), Anthropic, Bedrock and Gemini
messages, items of the Responses API and the OpenAI Agents SDK, LangChain, LangGraph and LlamaIndex
dumps, smolagents' steps, AutoGen, Pydantic AI and ADK runs, the AI SDK's messages, SWE-agent's and
mini-swe-agent's .traj, OpenHands' events, ATIF, Inspect's logs, sessions of Claude Code and Codex,
tau-bench, sharegpt, our episodes, RRM rows, plain text; in json, jsonl or text. Where a row names
no question, what the user says before the agent's first turn is it, or what the user says first;
what else stands before that turn, system turns too, is not the agent's work.
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reagent.reward_model import plain_turns
from toolkit.text import spoken

QUESTION = "question task problem_statement instruction query problem prompt input".split()
QUESTION += "original_input originalInput".split()
TURNS = "trajectory messages conversations history steps traj new_items items output".split()
TURNS += "newItems generated_items generatedItems completion response events".split()
# keys of a list of rows
ROWS = "trajectories episodes samples simulations results rows data".split()
NAMES = "id instance_id task_id run_id name".split()  # what a row may call itself
# that a folder is searched for; a text is named itself
SUFFIXES = (".json", ".jsonl", ".traj", ".eval")
ROLES = {"human": "user", "gpt": "assistant", "ai": "assistant", "model": "assistant"}
ROLES |= {"bot": "assistant", "agent": "assistant", "developer": "system", "exit": "tool"}
ROLES |= {"tool-call": "assistant", "tool_call": "assistant", "function_call": "assistant"}
ROLES |= dict.fromkeys("function observation tool-response tool_response".split(), "tool")
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
LANGCHAIN = {kind: ROLES[kind] for kind in ("human", "ai", "system", "tool", "function")}
LANGCHAIN |= {"AIMessageChunk": "assistant", "HumanMessageChunk": "user"}
TURN_KEYS = set("role from type lc step_number action observation rawItem raw_item".split())
TURN_KEYS |= set("step_id llm_message invocation_id invocationId".split())
OPAQUE = "image audio video media file document".split()  # in the type of a part: never text
MEDIA = "inlineData inline_data fileData file_data image document video".split()


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
    if path.endswith(".eval"):
        yield from samples_of(path)
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


def is_openhands(event: dict) -> bool:
    return str(event.get("kind", "")).endswith("Event") and "source" in event


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


# --------------------------------------------------------------------------------------------------
# turns


def messages_of(turns: list) -> list[dict]:
    """Turns of any layout as {"role", "content"}, calls in the turn that made them. ValueError."""
    messages: list[dict] = []
    for number, turn in enumerate(as_the_agent_saw(turns)):
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


def as_the_agent_saw(turns: list) -> list:
    """AutoGen 0.2 writes a chat as its user proxy saw it, which calls itself the assistant."""
    first = turns[0] if isinstance(turns[0], dict) else {}
    if first.get("role") != "assistant" or "user" not in str(first.get("name")).lower():
        return turns
    other = {"assistant": "user", "user": "assistant"}
    return [turn | {"role": other.get(turn["role"], turn["role"])} for turn in turns]


def join(last: dict, message: dict) -> None:
    """Reasoning, words and calls that one reply of a model sent as items, in one turn."""
    texts, thoughts = zip(spoken(last), spoken(message))
    last["content"] = "\n".join(filter(None, texts))
    last["reasoning_content"] = "\n".join(filter(None, thoughts))
    last["tool_calls"] = [*(last.get("tool_calls") or []), *(message.get("tool_calls") or [])]


def converted(turn: dict) -> list[dict]:
    """One turn, step, event or item as OpenAI messages."""
    if not isinstance(turn, dict):
        raise ValueError(f"an object is expected, not {turn!r:.40}")
    if inner := turn.get("rawItem") or turn.get("raw_item"):  # the Agents SDK's run items
        return converted(inner)
    if "invocation_id" in turn or "invocationId" in turn:  # an event of the ADK
        role = "user" if turn.get("author") == "user" else "model"
        return converted({"role": role} | turn["content"]) if turn.get("content") else []
    if is_pydantic(turn):
        return parts_of(turn)
    if is_openhands(turn):
        return new_event_of(turn)
    if "step_id" in turn:
        return atif_of(turn)
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
    if kind.endswith(("Message", "Event")) and "source" in turn:
        return autogen_of(turn, kind)
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
    """A message of a chat; results inside a turn (Anthropic, Gemini) are tool turns, and what the
    agent says after them is a turn of its own."""
    held = (turn[key] for key in ("content", "value", "parts", "blocks") if key in turn)
    content, extra = next(held, None), turn.get("additional_kwargs") or {}
    message = {"role": role, "content": content, "item": turn.get("type") == "message"}
    calls = turn.get("tool_calls") or [turn[k] for k in ("function_call",) if turn.get(k)]
    calls = calls or extra.get("tool_calls") or []
    thoughts = extra.get("reasoning_content")
    for key in ("reasoning_content", "reasoning"):
        thoughts = turn[key] if isinstance(turn.get(key), str) else thoughts
    if not isinstance(content, list):
        if isinstance(content, dict):
            message["content"] = json.dumps(content, ensure_ascii=False)
        said = {"tool_calls": [*map(call_of, calls)], "reasoning_content": thoughts or ""}
        return [message | said if role == "assistant" else message]
    runs: list[dict[str, list]] = [{"": [], "call": [], "result": []}]
    for kind, inner in [piece for part in content for piece in parts_read(part)]:
        if kind != "result" and runs[-1]["result"]:
            runs.append({"": [], "call": [], "result": []})
        runs[-1][kind].append(inner)
    if role != "assistant":
        kept = [part for run in runs for part in run[""]]
        results = [told for run in runs for told in run["result"]]
        return [*results, *([message | {"content": kept}] if kept else [])]
    runs[-1]["call"] += map(call_of, calls)
    messages = []
    for run in runs:
        messages += [message | {"content": run[""], "tool_calls": run["call"]}, *run["result"]]
    messages[0]["reasoning_content"] = thoughts or ""
    return messages


def call_of(told: dict) -> dict:
    """A call as OpenAI, LangChain ("args") or Inspect ("function" is the name) write it."""
    function = told.get("function", told)
    if isinstance(function, str):
        return call(function, told.get("arguments") or {})
    return call(function["name"], function.get("arguments", function.get("args")) or {})


def parts_read(part) -> list[tuple[str, object]]:
    """("call", call) | ("result", tool message) | ("", text part) for what a part of a message
    holds: one, but for a tool's part of the AI SDK, which is call and result."""
    part = part if isinstance(part, dict) else {"type": "text", "text": str(part)}
    kind = part.get("type", part.get("block_type", ""))
    name, given = part.get("name", part.get("toolName")), part.get("input", part.get("args"))
    if kind.startswith(("tool-", "dynamic-tool")) and "state" in part:
        called = ("call", call(name or kind.removeprefix("tool-"), given or {}))
        told = part.get("output", part.get("errorText"))
        return [called] if told is None else [called, result(told)]
    if kind in ("tool_use", "server_tool_use", "tool-call"):
        return [("call", call(name, given or {}))]
    if inner := part.get("toolUse"):  # Bedrock
        return [("call", call(inner["name"], inner.get("input") or {}))]
    if inner := part.get("functionCall") or part.get("function_call"):
        return [("call", call(inner["name"], inner.get("args") or {}))]
    if kind.endswith(("tool_result", "tool-result")):
        return [result(next((part[k] for k in ("content", "output", "result") if k in part), ""))]
    if inner := part.get("toolResult"):
        told = [piece.get("text", piece.get("json", piece)) for piece in inner.get("content") or []]
        return [result(told[0] if len(told) == 1 else told)]
    if inner := part.get("functionResponse") or part.get("function_response"):
        return [result(inner.get("response"))]
    if inner := part.get("reasoningContent"):
        return [("", {"thinking": inner.get("reasoningText", {}).get("text", "")})]
    if kind in ("reasoning", "thinking") and isinstance(told := part.get("text"), str):
        return [("", {"thinking": told})]
    if kind == "refusal":
        return [("", {"type": "text", "text": part["refusal"]})]
    if kind == "step-start":
        return []
    if not kind and not isinstance(part.get("text"), str) and not set(MEDIA) & set(part):
        refuse(f"a part with the keys {sorted(part)}")
    return [("", shown(part) if kind == "document" else part)]


def result(told) -> tuple[str, dict]:
    return "result", {"role": "tool", "content": as_content(told)}


def as_content(told):
    """What a tool returned as the content of a message."""
    if isinstance(told, dict) and isinstance(told.get("text", told.get("value")), str):
        return told.get("text", told.get("value"))
    if isinstance(told, list) and all(isinstance(p, dict) and "type" in p for p in told):
        return [*map(shown, told)]
    return told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)


def shown(part: dict) -> dict:
    """A part of a tool's result: one without a text of its own that is no picture, recording or
    file (such as a search result) is shown as JSON, without what only its provider can read."""
    kind, source = str(part.get("type", part.get("block_type"))), part.get("source")
    as_text = isinstance(source, dict) and source.get("type") in ("text", "content")
    if isinstance(part.get("text"), str) or not as_text and any(word in kind for word in OPAQUE):
        return part
    open_to_all = {k: v for k, v in part.items() if not k.startswith("encrypted")}
    return {"type": "text", "text": json.dumps(open_to_all, ensure_ascii=False)}


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


def is_pydantic(turn: dict) -> bool:
    return turn.get("kind") in ("request", "response") and isinstance(turn.get("parts"), list)


def parts_of(turn: dict) -> list[dict]:
    """A request or a response of Pydantic AI: parts of several roles."""
    messages, calls, words, thoughts = [], [], [], []
    for part in turn["parts"]:
        kind, told = part["part_kind"], part.get("content")
        if kind in ("tool-call", "builtin-tool-call"):
            calls.append(call(part["tool_name"], part.get("args") or {}))
        elif kind in ("tool-return", "retry-prompt", "builtin-tool-return"):
            messages.append(result(told)[1])
        elif kind in ("system-prompt", "user-prompt"):
            messages += message_of({"content": told}, kind.removesuffix("-prompt"))
        elif kind in ("text", "thinking"):
            (words if kind == "text" else thoughts).append(told or "")
        else:
            refuse(f"the part {kind!r}")
    if turn["kind"] == "request":
        return messages
    said = {"role": "assistant", "content": "\n".join(words), "tool_calls": calls}
    return [said | {"reasoning_content": "\n".join(thoughts)}, *messages]


def autogen_of(turn: dict, kind: str) -> list[dict]:
    """A message or an event of AutoGen's AgentChat."""
    told, said = turn.get("content"), {"role": "assistant", "content": ""}
    if kind == "ToolCallRequestEvent":
        return [said | {"tool_calls": [*map(call_of, told)], "item": True}]
    if kind in ("ToolCallExecutionEvent", "CodeExecutionEvent"):
        results = told if isinstance(told, list) else [{"content": turn["result"]["output"]}]
        return [result(of["content"])[1] for of in results]
    if kind == "ThoughtEvent":
        return [said | {"reasoning_content": told, "item": True}]
    if kind.endswith("Event") and kind != "CodeGenerationEvent":
        return []  # its own bookkeeping
    return message_of({"content": told}, "user" if "user" in turn["source"] else "assistant")


def atif_of(turn: dict) -> list[dict]:
    """A step of the Agent Trajectory Interchange Format, as Harbor and Terminal-Bench write it."""
    role = {"agent": "assistant"}.get(turn["source"], turn["source"])
    calls = [
        call(c["function_name"], c.get("arguments") or {}) for c in turn.get("tool_calls") or []
    ]
    said = {
        "content": turn.get("message") or "",
        "reasoning_content": turn.get("reasoning_content"),
    }
    (message, *_) = message_of(said, role)
    told = (turn.get("observation") or {}).get("results") or []
    results = [result(of.get("content") or "")[1] for of in told]
    return [message | ({"tool_calls": calls} if calls else {}), *results]


def new_event_of(turn: dict) -> list[dict]:
    """An event of the OpenHands SDK (V1)."""
    kind, told = turn["kind"], turn.get("observation") or {}
    if kind == "MessageEvent":
        return converted(turn["llm_message"])
    if kind == "ActionEvent":
        given = turn.get("tool_call") or {"name": turn["tool_name"], "arguments": turn["action"]}
        thoughts = {"reasoning_content": turn.get("reasoning_content") or ""}
        said = message_of({"content": turn.get("thought") or ""} | thoughts, "assistant")[0]
        return [said | {"tool_calls": [call_of(given)], "item": True}]
    if kind == "ObservationEvent":
        rest = {key: value for key, value in told.items() if key != "kind"}
        return [result(told.get("content", rest))[1]]
    if kind in ("AgentErrorEvent", "UserRejectObservationEvent"):
        return [result(f"Error: {turn.get('error', turn.get('rejection_reason', ''))}")[1]]
    return []  # its own bookkeeping


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
