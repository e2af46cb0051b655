"""A turn, step, event or item of any framework as OpenAI messages; which: data/trajectories.py."""

import json
import re

from reagent.reward_model import plain_turns
from toolkit.text import spoken

ROLES = {"human": "user", "gpt": "assistant", "ai": "assistant", "model": "assistant"}
ROLES |= {"bot": "assistant", "agent": "assistant", "developer": "system", "exit": "tool"}
ROLES |= {"chatbot": "assistant"}  # Cohere's v1 API, in capitals
ROLES |= {"tool-call": "assistant", "tool_call": "assistant", "function_call": "assistant"}
ROLES |= dict.fromkeys("function observation tool-response tool_response ipython".split(), "tool")
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
LANGCHAIN = {kind: ROLES[kind] for kind in ("human", "ai", "system", "tool", "function")}
LANGCHAIN |= {"AIMessageChunk": "assistant", "HumanMessageChunk": "user", "user": "user"}
OPAQUE = "image audio video media file document screenshot".split()  # in a part's type: no text
MEDIA = "inlineData inline_data fileData file_data image document video".split()
CALLS = ("tool_use", "tool-call", "tool_call", "function_call")  # what the type of a part ends in
GIVEN = ("input", "args", "arguments", "parameters", "inputs", "commands")  # to a tool
RESULTS = ("tool_result", "tool-result", "tool_call_response", "function_result")
# parts and items that say nothing to a reader, and keys of such parts
SILENT = set("step-start redacted_thinking reference mcp_list_tools mcp_approval_request".split())
SILENT |= set("mcp_approval_response item_reference compaction ghost_snapshot".split())
SILENT |= {"cachePoint", "cache_point", "info", "warning", "error"}  # the last three: Gemini CLI's
SILENT |= {"usage", "tool_reference", "agent_handoff", "message_creation"}


def messages_of(turns: list) -> list[dict]:
    """Turns of any layout as {"role", "content"}, calls in the turn that made them. ValueError."""
    messages: list[dict] = []
    if any(isinstance(turn, list) for turn in turns):  # pairs, as OpenHands wrote them
        turns = [turn for pair in turns for turn in (pair if isinstance(pair, list) else [pair])]
    for number, turn in enumerate(as_the_agent_saw(oldest_first(turns))):
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


def oldest_first(turns: list) -> list:
    """OpenAI lists the messages of a thread, and the steps of a run, the newest first."""
    if not all(isinstance(t, dict) and str(t.get("object")).startswith("thread.") for t in turns):
        return turns
    turns = turns[::-1] if turns[0]["created_at"] > turns[-1]["created_at"] else turns
    return sorted(turns, key=lambda turn: turn["created_at"])


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
    turn = plain_keys(turn) if {"Role", "_role"} & set(turn) else turn
    kind = str(turn.get("type", ""))
    role = turn.get("role", turn.get("from"))
    role = plain_keys(role) if isinstance(role, dict) else role
    role = first_of(role, "value", "label") if isinstance(role, dict) else role
    if role is None and kind in LANGCHAIN:
        role = LANGCHAIN[kind]
    if role is not None:
        return message_of(turn, ROLES.get(str(role).lower()) or refuse(f"the role {role!r}"))
    if kind == "gemini":
        return gemini_cli_of(turn)
    if kind.endswith(("Message", "Event")) and "source" in turn:
        return autogen_of(turn, kind)
    if kind:
        return item_of(turn, kind)
    if "source" in turn or "observation" in turn and "extras" in turn:
        return event_of(turn)
    return step_of(turn)


def plain_keys(told: dict) -> dict:
    """A message or part of .NET ("Role", "$type": "FunctionCallContent") or of Haystack 2.9
    ("_role") with the keys that others write."""
    keys = {key: key.lstrip("_$") for key in told}
    told = {key[:1].lower() + key[1:]: told[own] for own, key in keys.items()}
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(told.get("type", ""))).lower()
    return told | ({"type": kind.removesuffix("_content")} if kind else {})


def refuse(what: str):
    raise ValueError(f"{what} is not known")


def call(name, arguments, own_id=None) -> dict:
    """A tool call; arguments that are no object stand under "input"."""
    arguments = arguments if isinstance(arguments, (dict, str)) else {"input": arguments}
    return {"id": own_id, "function": {"name": name, "arguments": arguments}}


def first_of(told: dict, *keys: str):
    """The value of the first of the keys that is there, else None."""
    return next((told[key] for key in keys if key in told), None)


def message_of(turn: dict, role: str) -> list[dict]:
    """A message of a chat; results inside a turn (Anthropic, Gemini) are tool turns, and what the
    agent says after them is a turn of its own."""
    keys = ("content", "value", "parts", "blocks", "items", "contents", "message", "tool_results")
    content = first_of(turn, *keys)
    extra = turn.get("additional_kwargs") or {}
    message = {"role": role, "content": content, "item": turn.get("type") == "message"}
    calls = turn.get("tool_calls") or [turn[k] for k in ("function_call",) if turn.get(k)]
    calls = calls or extra.get("tool_calls") or []
    thoughts = extra.get("reasoning_content")
    for key in ("thinking", "tool_plan", "reasoning_content", "reasoning"):
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
        told = [of["content"] for of in results]  # Semantic Kernel's stand there as text too
        kept = [part for part in kept if role != "tool" or part.get("text") not in told]
        return [*results, *([message | {"content": kept}] if kept else [])]
    in_parts = [called for run in runs for called in run["call"]]  # LangChain's stand twice
    runs[-1]["call"] += [c for c in map(call_of, calls) if not any(same(c, of) for of in in_parts)]
    messages = []
    for run in runs:
        messages += [message | {"content": run[""], "tool_calls": run["call"]}, *run["result"]]
    messages[0]["reasoning_content"] = thoughts or ""
    return messages


def same(one: dict, other: dict) -> bool:
    """Whether two calls are one: by their ids, or by what they call."""
    ids = one["id"], other["id"]
    return ids[0] == ids[1] if all(ids) else one["function"] == other["function"]


def call_of(told: dict) -> dict:
    """A call as OpenAI ("custom" too), LangChain ("args") or Inspect ("function" is the name) write
    it."""
    function, own_id = first_of(told, "function", "custom"), told.get("id")
    if isinstance(function, str):
        return call(function, told.get("arguments") or {}, own_id)
    function = told if function is None else function
    name = first_of(function, "name", "tool_name") or refuse("a call without a name")
    return call(name, first_of(function, *GIVEN) or {}, own_id)


def words_of(told) -> str:
    """The text of a part, however deep: {"value"} of Assistants, "content" of OpenTelemetry, the
    summaries of a thought."""
    if isinstance(told, list):
        return "\n".join(filter(None, map(words_of, told)))
    if isinstance(told, dict):
        keys = "text thinking reasoning reasoning_text content value summary".split()
        return next(filter(None, (words_of(told.get(key)) for key in keys)), "")
    return told if isinstance(told, str) else ""


def parts_read(part) -> list[tuple[str, object]]:
    """("call", call) | ("result", tool message) | ("", text part) for what a part of a message
    holds: one, but for a tool's part of the AI SDK, which is call and result."""
    part = part if isinstance(part, dict) else {"type": "text", "text": str(part)}
    part = plain_keys(part) if "$type" in part else part
    kind = str(first_of(part, "type", "block_type", "content_type") or "")
    name = first_of(part, "name", "toolName", "tool_name", "functionName")
    given = first_of(part, *GIVEN)
    if kind.startswith(("tool-", "dynamic-tool")) and "state" in part:
        called = ("call", call(name or kind.removeprefix("tool-"), given or {}))
        told = part.get("output", part.get("errorText"))
        return [called] if told is None else [called, result(told)]
    if kind == "tool_call" and isinstance(part.get("value"), str):  # LLaMA-Factory's v1
        return [("call", call_of(json.loads(part["value"])))]
    if kind.endswith(CALLS) and kind not in CALLS:  # the Agent Framework's hosted tools
        name = name or kind.removesuffix("_call").removesuffix("_tool")
        given = {"input": words_of(given)} if isinstance(given, list) else given
    if name and (kind.endswith(CALLS) or not kind and given is not None):
        return [("call", call(name, given or {}, first_of(part, "call_id", "callId", "id")))]
    if kind.endswith(RESULTS) or not kind and "result" in part or "outputs" in part:
        told = first_of(part, "content", "output", "result", "response", "outputs")
        return [result(told or "")]
    if inner := first_of(part, "toolUse", "functionCall", "function_call", "tool_call"):
        return [("call", call_of(inner))]  # Bedrock; Gemini; Haystack
    if inner := part.get("toolResult"):
        told = [piece.get("text", piece.get("json", piece)) for piece in inner.get("content") or []]
        return [result(told[0] if len(told) == 1 else told)]
    if inner := first_of(part, "functionResponse", "function_response", "tool_call_result"):
        return [result(first_of(inner, "response", "result"))]
    if inner := first_of(part, "executableCode", "executable_code"):
        return [("call", call("code_execution", inner))]
    if inner := first_of(part, "codeExecutionResult", "code_execution_result"):
        return [result(inner.get("output") or inner)]
    if inner := part.get("reasoningContent"):
        return [("", {"thinking": inner.get("reasoningText", {}).get("text", "")})]
    thought = part.get("thought") is True  # Gemini's; Haystack's have no type
    thought |= not kind and bool({"reasoning", "reasoning_text"} & set(part))
    if thought or kind in ("reasoning", "text_reasoning", "thinking"):
        return [("", {"thinking": words_of(part)})]
    if kind == "refusal":
        return [("", {"type": "text", "text": part["refusal"]})]
    if kind in SILENT or SILENT & set(part):
        return []
    return text_of(part, kind)


def text_of(part: dict, kind: str) -> list[tuple[str, object]]:
    """The text part that a part is; ValueError for one that may be anything."""
    if inner := first_of(part, "citationsContent", "guardContent"):  # Bedrock
        return [("", {"type": "text", "text": words_of(inner)})]
    document = part.get("document")
    if isinstance(document, dict) and "data" in document:  # Cohere's results
        return [("", {"type": "text", "text": as_content(document["data"])})]
    if not isinstance(part.get("text"), str):
        if kind.endswith("text") and words_of(part):
            return [("", {"type": "text", "text": words_of(part)})]
        if not kind and not set(MEDIA) & set(part):
            refuse(f"a part with the keys {sorted(part)}")
    return [("", shown(part) if kind == "document" else part)]


def result(told) -> tuple[str, dict]:
    return "result", {"role": "tool", "content": as_content(told)}


def as_content(told):
    """What a tool returned as the content of a message."""
    if isinstance(told, dict) and isinstance(told.get("text", told.get("value")), str):
        return told.get("text", told.get("value"))
    if isinstance(told, dict) and "image_url" in told:  # a screenshot
        told = [told]
    if isinstance(told, list) and all(isinstance(p, dict) and is_part(p) for p in told):
        return [*map(shown, told)]
    return told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)


def is_part(told: dict) -> bool:
    return "type" in told or [*told] == ["text"] and isinstance(told["text"], str)


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
    """An item of the Responses API, an entry of Mistral's conversations or a step of a run of the
    Assistants, other than their messages."""
    kind = kind.replace(".", "_")
    if isinstance(calls := (turn.get("step_details") or {}).get("tool_calls"), list):
        return [message for called in calls for message in run_call_of(called)]
    if kind == "reasoning":
        thoughts = words_of([turn.get("summary"), turn.get("content")])
        thinking = {"role": "assistant", "content": "", "reasoning_content": thoughts}
        return [thinking | {"item": True}] if thoughts else []
    if kind.endswith(("_output", "_result")):
        return [{"role": "tool", "content": as_content(first_of(turn, "output", "result"))}]
    if kind in SILENT:
        return []
    if not kind.endswith(("_call", "tool_execution")):
        refuse(f"the type {kind!r}")
    hidden = "id call_id type status name output results outputs result".split()  # an image's, last
    given = first_of(turn, "arguments", "input", "action")
    given = {k: v for k, v in turn.items() if k not in hidden} if given is None else given
    name = turn.get("name") or kind.removesuffix("_call")
    called = {"role": "assistant", "content": "", "tool_calls": [call(name, given)], "item": True}
    told = turn.get("output") or turn.get("results") or turn.get("outputs")
    return [called, *([{"role": "tool", "content": as_content(told)}] if told else [])]


def run_call_of(told: dict) -> list[dict]:
    """A call in a step of a run of OpenAI's Assistants, which holds its result."""
    inner = told[told["type"]]
    hidden = ("name", "output", "outputs", "results", "ranking_options")
    given = inner.get("arguments", {k: v for k, v in inner.items() if k not in hidden})
    called = {"role": "assistant", "content": "", "item": True}
    called["tool_calls"] = [call(inner.get("name") or told["type"], given, told.get("id"))]
    came = first_of(inner, "output", "outputs", "results")
    return [called, *([] if came is None else [result(came)[1]])]


def is_openhands(event: dict) -> bool:
    return str(event.get("kind", "")).endswith("Event") and "source" in event


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


def gemini_cli_of(turn: dict) -> list[dict]:
    """A message of the model in a session of Gemini CLI: its calls hold their results."""
    calls = turn.get("toolCalls") or []
    thoughts = [f"{t.get('subject')}: {t.get('description')}" for t in turn.get("thoughts") or []]
    said = {"content": turn.get("content") or "", "reasoning": "\n".join(thoughts)}
    messages = message_of(said | {"tool_calls": calls}, "assistant")
    for told in filter(None, (of.get("result") for of in calls)):
        told = told if isinstance(told, list) else [{"functionResponse": {"response": told}}]
        messages += message_of({"content": told}, "user")
    return messages


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
    told = {k: v for k, v in given.items() if k not in hidden and v not in (None, "")}
    said = {"role": "assistant", "content": given.get("thought") or ""}
    return [said | {"tool_calls": [call(kind, told)]}]


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
    code = turn.get("code_action")
    calls = [] if code and code in text else turn.get("tool_calls") or []
    messages = [{"role": "assistant", "content": text, "tool_calls": [*map(call_of, calls)]}]
    if turn.get("observations"):
        messages.append({"role": "tool", "content": turn["observations"]})
    if error := turn.get("error"):
        told = error.get("message", error) if isinstance(error, dict) else error
        messages.append({"role": "tool", "content": f"Error: {told}"})
    if turn.get("is_final_answer") and turn.get("action_output") is not None:
        final = as_content(turn["action_output"])
        messages.append({"role": "assistant", "content": f"Final answer: {final}"})
    return messages
