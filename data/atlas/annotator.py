"""The atlas's reward model by rule: `--rrm=data/atlas/annotator.py`. It knows the world (world.json
beside it).
"""

import random
import sys
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1])]
from data.atlas.world import RELATIONS, load, parse_question, plain, trail
from toolkit.text import after_thoughts, last_boxed

LOOKUPS = 0.45  # the score of a whole trail without its answer; a grounded answer scores 1


@cache
def world() -> dict:
    return load(HERE)


def annotate(question: str, messages: list[dict]) -> str:
    """think, critique and score of one attempt, in the three blocks; ValueError for another world's
    question.
    """
    rng = random.Random(f"{question}{len(messages)}")
    return judgment(world(), question, messages, rng)


def read_attempt(world: dict, question: str, messages: list[dict]) -> dict:
    """What an attempt looked up and answered: path, relations, looked (a bool a page), answer,
    right, grounded.
    """
    start, relations = parse_question(question)
    path, gold = trail(world, start, relations)
    shown = " ".join(m["content"] for m in messages if m["role"] == "tool")
    looked = [f". {name} (" in shown for name in path]  # how a search result begins
    last = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""
    answer = last_boxed(after_thoughts(last))
    right = bool(answer) and plain(answer) == plain(gold)
    return {
        "path": path,
        "relations": relations,
        "looked": looked,
        "answer": answer,
        "right": right,
        "grounded": right and looked[-1],
    }


def judgment(world: dict, question: str, messages: list[dict], rng: random.Random) -> str:
    """The annotator on a given world. No critique names what the agent has not seen, or its
    answer.
    """
    seen = read_attempt(world, question, messages)
    path, looked = seen["path"], seen["looked"]
    steps = [f"Page of {name}: read." for name, was in zip(path, looked) if was]
    answer = f"Answer {seen['answer'] or 'none'}:"
    if looked[-1]:
        name, what = path[-1], RELATIONS[seen["relations"][-1]].label
        verdict = "as the page says." if seen["grounded"] else "not what the page says."
        critique = (
            f"The page of {name} was found, but the answer is not its {what}. Look again at {name}."
        )
        if seen["grounded"]:
            critique = f"Every step was looked up and the answer stands on the page of {name}."
    else:
        # the first page that could have been asked for: the one after it is not known yet
        missing = looked.index(False)
        name, what = path[missing], RELATIONS[seen["relations"][missing]].label
        steps.append(f"Page of {name}: not read.")
        verdict = "not looked up."
        critique = rng.choice(
            [
                f"The answer was not looked up. Search for {name} next and read its {what}.",
                f"You stopped too early: the {what} of {name} is missing. Search for {name}.",
            ]
        )
    score = 1.0 if seen["grounded"] else LOOKUPS * sum(looked) / len(path)
    think = " ".join([*steps, answer, verdict])
    return f"<think>{think}</think><critique>{critique}</critique><score>{score:.2f}</score>"
