"""The rows of stage 2: a question, a trajectory and what was said of it."""

import json
import re

from data.reagent.conversations import Unfit, messages_of, system_of
from data.reagent.tasks import gold_answers
from reagent.reward_model import parse_judgment

JUDGED = re.compile(
    r"^[ *#]*question[ *]*:[\s*]*(.+?)\s*^[ *#]*"
    r"(?:agent(?:'s)? +)?trajectory(?: of the agent)?[ *]*:[\s*]*(.+)",
    re.S | re.I | re.M,
)


def number_in_unit(value) -> float | None:
    """A score in [0, 1] given as a number or as its text, else None."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return score if 0 <= score <= 1 else None


def judged_parts(record: dict) -> tuple[str, object, str, dict[str, str]]:
    """(question, trajectory, text of the judgment or "", its prompts) of a record: from its own
    fields or from its conversation, which alone has prompts."""
    keys = ("judgment", "response", "output", "completion")
    reply = next((record[key] for key in keys if isinstance(record.get(key), str)), "")
    if record.get("question") and record.get("trajectory"):
        return record["question"], record["trajectory"], reply, {}
    messages = messages_of(record, cut=False)
    asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if messages[-1]["role"] == "assistant":
        reply = messages[-1]["content"]
    # a rubric before the request may name its parts too: alpaca has the request apart from it
    apart = record.get("input")
    start = len(asked) - len(apart) if isinstance(apart, str) and asked.endswith(apart) else 0
    match = JUDGED.search(asked, start) or JUDGED.search(asked)
    if not match:
        raise Unfit("no 'Question: ... Trajectory: ...' in the request")
    form = asked[: match.start(1)] + "{question}" + asked[match.end(1) : match.start(2)]
    prompts = {"system": system_of(messages), "request": form + "{trajectory}"}
    return match[1], match[2], reply, prompts


def rrm_row(record: dict, for_sft: bool) -> dict:
    """{"question", "trajectory", "think", "critique", "score", "correct"?, "answer"?}; RL needs a
    score or correct."""
    question, trajectory, reply, _ = judged_parts(record)
    trajectory = parsed(trajectory) if isinstance(trajectory, str) else trajectory
    if isinstance(trajectory, list):
        trajectory = messages_of({"messages": trajectory})
    label = record.get("reward_model") if isinstance(record.get("reward_model"), dict) else {}
    if isinstance(label.get("ground_truth"), str) and "<score>" in label["ground_truth"]:
        reply = reply or label["ground_truth"]
    parts = {
        "think": record.get("think") or record.get("reasoning"),
        "critique": record.get("critique"),
        "score": number_in_unit(record.get("score", label.get("ground_truth"))),
    }
    if judgment := parse_judgment(reply):
        parts = {"think": judgment.think, "critique": judgment.critique, "score": judgment.score}
    row = {"question": question, "trajectory": trajectory}
    row |= {key: value for key, value in parts.items() if value not in ("", None)}
    if record.get("correct", record.get("is_correct")) in (True, False):
        row["correct"] = bool(record.get("correct", record.get("is_correct")))
    if not isinstance(question, str) or not isinstance(trajectory, (str, list)):
        raise Unfit("question or trajectory is not text")
    if gold := record.get("answer") or record.get("gold"):
        row["answer"] = gold_answers(gold)
    if "score" not in row and (for_sft or "correct" not in row):
        raise Unfit("the judgment is not the three blocks" if reply else "no score between 0 and 1")
    if for_sft:
        think, critique = row.get("think", ""), row.get("critique", "")
        blocks = f"<think>{think}</think><critique>{critique}</critique><score>0.5</score>"
        if parse_judgment(blocks) is None:
            raise Unfit("no analysis or no critique, or tags inside them")
    return row


def parsed(text: str):
    """A trajectory given as the JSON text of a list of messages, as that list; any other text as it
    is."""
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    is_turns = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    return value if is_turns else text
