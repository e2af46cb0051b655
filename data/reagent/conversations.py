"""Conversations of every layout as the messages of our protocol, and the rows of stage 1."""

import json
import re

from reagent.calls import HERMES
from reagent.chat import assistant_text, check_messages
from reagent.rows import without_nulls

ROLES = dict(human="user", gpt="assistant", model="assistant", bot="assistant")
ROLES |= dict.fromkeys(("observation", "function_response", "tool_response"), "tool")
ROLES |= dict.fromkeys(("function_call", "tool_call"), "call")
RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.S)


class Unfit(ValueError):
    """A record that does not become a row; the text is the reason that the table counts."""


def first_of(record: dict, *keys: str):
    """The value of the first of these keys that has one which is not empty, else None."""
    return next((record[key] for key in keys if record.get(key)), None)


def content_text(content) -> str:
    """The text of a message's content, which may be a list of parts; a part that is not text makes
    the record unfit."""
    if isinstance(content, list):
        if any(not isinstance(part, dict) or "text" not in part for part in content):
            raise Unfit("a message holds an image or a sound")
        return "\n".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise Unfit("a message is not text")
    return content or ""


def as_call(text: str) -> str:
    """A sharegpt function_call turn (JSON without the tags) as the <tool_call> text of our
    protocol."""
    if "<tool_call>" in text:
        return text
    try:
        call = json.loads(text)
    except ValueError as error:
        raise Unfit("a function call is not JSON") from error
    calls = call if isinstance(call, list) else [call]
    if any(not isinstance(one, dict) or "name" not in one for one in calls):
        raise Unfit("a function call has no name")
    return "\n".join(HERMES.write(one["name"], one.get("arguments", {})) for one in calls)


def turns_of(record: dict) -> list[dict]:
    """The turns of a record in any of the layouts, as [{"role", "content", ...}] with the
    publisher's role names."""
    listed = record.get("messages") or record.get("conversations") or record.get("conversation")
    reply = first_of(record, "response", "output", "completion", "chosen")
    answer = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else []
    if listed is None and isinstance(record.get("prompt"), list):
        listed = record["prompt"] + answer
    if listed is None:
        asked = alpaca_turns(record) if answer else []
        if not asked:
            raise Unfit(f"unknown layout, keys {', '.join(map(str, record))}")
        turns = asked + answer
    else:
        listed = json.loads(listed) if isinstance(listed, str) else listed
        turns = [{**without_nulls(turn), **named_alike(turn)} for turn in listed]
    if record.get("system") and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": record["system"]}, *turns]
    return turns


def named_alike(turn: dict) -> dict:
    """Role and content of a turn, as messages or as sharegpt names them."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    return {"role": role, "content": content}


def alpaca_turns(record: dict) -> list[dict]:
    """What was said before the reply: the pairs of a history, then the question; [] without one."""
    question = first_of(record, "instruction", "prompt", "question")
    if not isinstance(question, str):
        return []
    question += "\n" + record["input"] if record.get("input") else ""
    turns = []
    for pair in record.get("history") or []:
        for role, text in zip(("user", "assistant"), pair):
            turns.append({"role": role, "content": text})
    return [*turns, {"role": "user", "content": question}]


def pieces(role: str, text: str) -> list[tuple[str, str]]:
    """A turn cut at its <tool_response> blocks, which become tool turns: rendered as a user's text
    their tags would be broken, and as the agent's they would be trained."""
    cut = [("tool" if i % 2 else role, part) for i, part in enumerate(RESPONSE.split(text))]
    return [(who, part) for who, part in cut if part or who == "tool"] or [(role, text)]


def messages_of(record: dict, cut: bool = True) -> list[dict]:
    """Messages of our protocol: calls as raw text in assistant turns, results in tool turns, no
    assistant turn after another. cut=False leaves turns whole: the request and the judgment of a
    reward model quote <tool_response> blocks, which are no turns."""
    messages: list[dict] = []
    for turn in turns_of(record):
        role, text = ROLES.get(turn["role"], turn["role"]), content_text(turn["content"])
        if role == "call":
            role, text = "assistant", as_call(text)
        elif role == "assistant":
            text = assistant_text({**turn, "content": text})
        whole = not cut or role not in ("user", "tool", "assistant")
        for who, part in [(role, text)] if whole else pieces(role, text):
            if who == "assistant" and messages and messages[-1]["role"] == "assistant":
                messages[-1]["content"] += "\n" + part
            else:
                messages.append({"role": who, "content": part})
    return messages


def schemas_of(tools) -> list[dict]:
    """Tool schemas, a list or its JSON text; {"name", "description", "parameters"} alone is wrapped
    as a function."""
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    wrapped = []
    for tool in without_nulls(list(tools or [])):
        wrapped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return wrapped


def sft_row(record: dict) -> dict:
    """{"messages", "tools"?}; the tools' schemas may be a list or its JSON text. A system prompt
    that holds them as <tools> needs no second copy from the template."""
    messages = messages_of(record)
    if messages and messages[-1]["role"] != "assistant":
        raise Unfit("the last turn is not the agent's")
    if problem := check_messages(messages):
        raise Unfit(re.sub(r"message \d+: ", "", problem))
    shown = any(m["role"] == "system" and "<tools>" in m["content"] for m in messages)
    tools = [] if shown else schemas_of(record.get("tools"))
    return {"messages": messages, **({"tools": tools} if tools else {})}


def system_of(messages: list[dict]) -> str:
    """The system prompt of a conversation, "" where it has none."""
    return next((m["content"] for m in messages if m["role"] == "system"), "")
