"""The toy's rule annotator with a score that says only whether an attempt is right and grounded
(1) or not (0); the critique is the same: `--rrm=data/toy/verdict.py`.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]
from data.toy import prepare


def annotate(question: str, messages: list[dict]) -> str:
    judgment = prepare.blocks(prepare.annotate(question, messages))
    return prepare.judgment_text(**judgment | {"score": float(judgment["score"] == 1.0)})
