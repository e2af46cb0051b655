"""The rule that judges an attempt of the atlas: which pages it looked up, whether its answer is
right and stands on the last of them, and a critique that never holds the answer.
"""

import random
import re

from data.atlas.world import RELATIONS, answers_of, parse_question, tells, trail
from reagent.calls import read_turn
from reagent.scorers import score

LOOKUPS = 0.45  # the score of a whole trail without its answer; a grounded answer scores 1


def shows(result: str, name: str) -> bool:
    """Whether a tool result has the page of `name`: a hit of search, or what browse opened. An
    error, which may repeat what a call held, shows none."""
    if result.startswith(('Results for "', 'No results for "')):
        return bool(re.search(rf"^\d+\. {re.escape(name)} \(doc:.*\)$", result, re.M))
    return result.startswith(f"{name}\n")


def read_attempt(world: dict, question: str, messages: list[dict]) -> dict:
    """What an attempt looked up and answered: path, relations, gold, looked (a bool a page),
    answer, right by the scorer of the rows, grounded. ValueError for another world's question, and
    for a trajectory that is one text.
    """
    start, relations = parse_question(question)
    path, gold = trail(world, start, relations)
    if any(not message["role"] for message in messages):
        raise ValueError("the trajectory is one text: what was shown and what was said is unknown")
    results = [m["content"] for m in messages if m["role"] == "tool"]
    looked = [any(shows(result, name) for result in results) for name in path]
    last = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""
    answer = read_turn(last).answer  # as a rollout reads it
    right = score("hotpotqa", answer, answers_of(gold))["correct"]
    found = dict(path=path, relations=relations, gold=gold, looked=looked, answer=answer)
    return found | {"right": right, "grounded": right and looked[-1]}


def critiques_of(seen: dict, rng: random.Random) -> list[str]:
    """What may be said of an attempt, the best first; the last of them names nothing."""
    looked, answer = seen["looked"], seen["answer"]
    # the first page that could have been asked for: the one after it is not known yet
    at = -1 if looked[-1] else looked.index(False)
    name, what = seen["path"][at], RELATIONS[seen["relations"][at]].label
    if seen["grounded"]:
        # a refined attempt begins in mid-chain, where its critique sent it
        steps = "Every step was looked up and the" if all(looked) else "The"
        return [f"{steps} answer stands on the page of {name}.", f"{steps} answer was looked up."]
    if looked[-1]:
        told = f"The page of {name} was found, but the answer is not its {what}. Look again at"
        if answer is None:
            told = f"The page of {name} was found, but no answer was given. Give the {what} of"
        return [f"{told} {name}.", "The page was found. Read it again and answer what was asked."]
    wordings = [
        f"The answer was not looked up. Search for {name} next and read its {what}.",
        f"You stopped too early: the {what} of {name} is missing. Search for {name}.",
    ]
    return [*rng.sample(wordings, 2), "The answer was not looked up. Search for the next page."]


def judgment(world: dict, question: str, messages: list[dict], rng: random.Random) -> str:
    """think, critique and score of one attempt, in the three blocks. No critique names what the
    agent has not seen, or holds the answer; the think, which no agent sees, quotes it where it was
    shown.
    """
    seen = read_attempt(world, question, messages)
    looked = seen["looked"]
    steps = [f"Page of {name}: read." for name, was in zip(seen["path"], looked) if was]
    if looked[-1]:
        # what is there, then what was said: a small judge compares what it has written down
        steps.append(f"Its {RELATIONS[seen['relations'][-1]].label}: {seen['gold']}.")
        verdict = "the same." if seen["grounded"] else "not the same."
    else:
        steps.append(f"Page of {seen['path'][looked.index(False)]}: not read.")
        verdict = "not looked up."
    think = " ".join([*steps, f"Answer {seen['answer'] or 'none'}:", verdict])
    critique = next(said for said in critiques_of(seen, rng) if not tells(said, seen["gold"]))
    value = 1.0 if seen["grounded"] else LOOKUPS * sum(looked) / len(looked)
    return f"<think>{think}</think><critique>{critique}</critique><score>{value:.2f}</score>"
