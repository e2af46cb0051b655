"""The atlas's reward model by rule: `--rrm=data/atlas/annotator.py`. It knows the world (world.json
beside it), which prepare.py writes.
"""

import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]
from data.atlas.rule import judgment
from data.atlas.world import load

WORLD = load(HERE)  # at the start of a run: a missing one is told before any work


def annotate(question: str, messages: list[dict]) -> str:
    """think, critique and score of one attempt, in the three blocks; ValueError for another world's
    question.
    """
    rng = random.Random(f"{question}{len(messages)}")
    return judgment(WORLD, question, messages, rng)
