"""What the loop reads in each row of a file: a turn, a judgment or a verdict.

    python rollout.py read FILE.jsonl [--model=FOLDER]  # a folder or name: the chat format of turns

FILE holds {turn}, {content, reasoning_content} or {reply}, a row a line.
"""

import json
from dataclasses import dataclass

from reagent.calls import HERMES, read_turn
from reagent.config import parse_config
from reagent.reward_model import read_judgment
from reagent.rows import JsonlRows
from results.verdicts import parse_verdict
from tools import TOOLS, schema_of

JUDGMENT_KEYS = {"content", "reasoning_content", "reasoning", "thinking"}


@dataclass
class Config:
    model: str = ""  # a folder or name: the chat format of its turns; "": Hermes


def check_reply(row: dict) -> str | None:
    """One sampled turn, a judge's reply or a reward model's message."""
    texts = [row[key] for key in ("turn", "reply") if key in row]
    known = texts or JUDGMENT_KEYS & set(row)
    if not known or not all(isinstance(text, str) for text in texts):
        return f"a row has 'turn', 'reply' or 'content' with a text; found the keys {sorted(row)}"


def read_reply(row: dict, chat=None) -> dict:
    """What is read in a turn (under the chat format of `chat`), a judgment or a verdict."""
    if "turn" in row:
        opened, form = (chat.opened, chat.calls) if chat else ("", HERMES)
        text = row["turn"] if row["turn"].startswith("<think>") else opened + row["turn"]
        said = read_turn(text, form, [schema_of(tool) for tool in TOOLS.values()])
        calls = [dict(name=c.name, arguments=c.arguments) for c in said.calls if not c.problem]
        errors = [call.problem for call in said.calls if call.problem]
        return dict(calls=calls, errors=errors, answer=None if said.calls else said.answer)
    if "reply" in row:
        return {"verdict": parse_verdict(row["reply"])}
    judgment = read_judgment(row)
    return {"judgment": judgment and vars(judgment)}


def main(argv: list[str]) -> None:
    words = [arg for arg in argv if not arg.startswith("-")]
    cfg, chat = parse_config(Config, [arg for arg in argv if arg not in words]), None
    if len(words) != 2 or words[0] != "read":
        raise SystemExit(__doc__)
    if cfg.model:
        from reagent.policy import load_chat

        chat = load_chat(cfg.model)
    try:
        rows = JsonlRows(words[1], check_reply)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for row in rows:
        print(json.dumps(read_reply(row, chat)))
