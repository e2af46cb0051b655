"""The toy's rule annotator with a score that holds only with probability p; the critique stays.

`annotate = noisy(0.75)` in a file of one's own, then `--rrm=FILE.py`.
"""

import random
from collections.abc import Callable

from data.toy import prepare


def noisy(p: float) -> Callable[[str, list[dict]], str]:
    """-> annotate(question, messages) whose score s is 1 - s with probability 1 - p, drawn from the
    attempt itself: the same attempt gets the same score.
    """

    def annotate(question: str, messages: list[dict]) -> str:
        text = prepare.annotate(question, messages)
        if random.Random(f"{question} {messages}").random() < p:
            return text
        judgment = prepare.blocks(text)
        return prepare.judgment_text(**judgment | {"score": 1 - judgment["score"]})

    return annotate
