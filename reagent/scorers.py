"""Scorers with the official semantics of the benchmarks: pure functions from (prediction, gold) to
right or wrong.

score(scorer, pred, gold) -> {"correct": bool, "status": "ok" | "timeout", "em"?, "f1"?}. An empty
prediction is never correct, whatever a normalisation makes of the gold answer.
"""

import math
import multiprocessing
import re
import string
from collections import Counter
from functools import partial

from toolkit.text import last_boxed

MATH_SECONDS = (
    5.0  # math-verify can hang for longer than its own timeout: a child is killed after this
)

# --------------------------------------------------------------------------------------------------
# open answers: exact match and token F1


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's and HotpotQA's evaluation
    scripts).
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(pred: str, gold: str, yes_no_exact: bool) -> float:
    """F1 over normalised tokens. HotpotQA: yes, no and noanswer must be equal as a whole, and
    nothing against nothing is 0; MuSiQue (SQuAD): nothing against nothing is 1."""
    a, b = normalize(pred), normalize(gold)
    if yes_no_exact and a != b and {a, b} & {"yes", "no", "noanswer"}:
        return 0.0
    a_tokens, b_tokens = a.split(), b.split()
    if not a_tokens or not b_tokens:
        return 0.0 if yes_no_exact else float(a_tokens == b_tokens)
    common = sum((Counter(a_tokens) & Counter(b_tokens)).values())
    return 2 * common / (len(a_tokens) + len(b_tokens))


def score_qa(pred: str, golds: list[str], yes_no_exact: bool) -> dict:
    """The best over the aliases."""
    em = max(normalize(pred) == normalize(gold) for gold in golds)
    return {
        "correct": em,
        "em": float(em),
        "f1": max(token_f1(pred, gold, yes_no_exact) for gold in golds),
    }


# --------------------------------------------------------------------------------------------------
# GAIA


def _number(text: str) -> float:
    for mark in "$%,":
        text = text.replace(mark, "")
    try:
        return float(text)
    except ValueError:
        return math.inf


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _squeezed(text: str, punctuation: bool) -> str:
    text = re.sub(r"\s", "", text).lower()
    return text if punctuation else "".join(c for c in text if c not in string.punctuation)


def score_gaia(pred: str, gold: str) -> bool:
    """The leaderboard's rule: the gold answer says whether a number, a list (, or ;) or a text is
    compared.
    """
    if _is_number(gold):
        return _number(pred) == float(gold)
    if "," in gold or ";" in gold:
        golds, preds = (re.split("[,;]", text) for text in (gold, pred))
        if len(golds) != len(preds):
            return False
        pairs = zip(preds, golds)
        return all(
            _number(p) == float(g) if _is_number(g) else _squeezed(p, True) == _squeezed(g, True)
            for p, g in pairs
        )
    return _squeezed(pred, False) == _squeezed(gold, False)


# --------------------------------------------------------------------------------------------------
# mathematics


def plain_latex(text: str) -> str:
    """The normal form in which the MATH benchmark compares answers as strings (Hendrycks et al.
    2021).
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = (
        text.replace("tfrac", "frac")
        .replace("dfrac", "frac")
        .replace("\\left", "")
        .replace("\\right", "")
    )
    for junk in ("^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(junk, "")
    if text.count("\\text{ ") == 1:  # a unit behind the number
        text = text.partition("\\text{ ")[0]
    text = text.replace("\\%", "").replace("%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    head, sign, tail = text.partition("=")
    if sign and "=" not in tail and len(head) <= 2:
        text = tail
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _braced_fractions(text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    ratio = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return f"\\frac{{{int(ratio[1])}}}{{{int(ratio[2])}}}" if ratio else text


def _braced_fractions(text: str) -> str:
    text = re.sub(r"\\frac([^{\s])([^{\s])", r"\\frac{\1}{\2}", text)
    return re.sub(r"\\frac([^{\s])\{", r"\\frac{\1}{", text)


def score_gsm8k(pred: str, gold: str) -> bool:
    """GSM8K's own rule: the first "#### number", thousands commas removed, compared as text."""
    found = [re.search(r"#### (\-?[0-9\.\,]+)", text) for text in (pred, gold)]
    return all(found) and found[0][1].strip().replace(",", "") == found[1][1].strip().replace(
        ",", ""
    )


def math_answer(text: str) -> str:
    """What a solution states: after ####, else its last box, else all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed


def score_math(pred: str, gold: str) -> dict:
    """Equal text, equal LaTeX or equal number; else math-verify decides, in a child that is killed
    when it hangs.
    """
    pred, gold = math_answer(pred), math_answer(gold)
    if not pred.strip():
        return {"correct": False}
    if plain_latex(pred) == plain_latex(gold):
        return {"correct": True}
    a, b = (
        text.replace(",", "").replace("\\$", "").replace("$", "").rstrip(".")
        for text in (pred, gold)
    )
    if _is_number(a) and _is_number(b):
        return {"correct": float(a) == float(b)}
    verdict = _Verifier.ask(pred, gold)
    return {"correct": bool(verdict), "status": "timeout" if verdict is None else "ok"}


class _Verifier:
    """math-verify in a process of its own, started on first use and again after every kill."""

    process = pipe = None

    @classmethod
    def ask(cls, pred: str, gold: str) -> bool | None:
        if cls.process is None or not cls.process.is_alive():
            context = multiprocessing.get_context("spawn")
            cls.pipe, theirs = context.Pipe()
            cls.process = context.Process(target=_verify_forever, args=(theirs,), daemon=True)
            cls.process.start()
            cls.pipe.send(("1", "1"))
            cls.pipe.poll(
                60
            ) and cls.pipe.recv()  # imports count as start-up, not as the answer's time
        cls.pipe.send((pred[:10_000], gold[:10_000]))
        if cls.pipe.poll(MATH_SECONDS):
            return cls.pipe.recv()
        cls.process.kill()
        cls.process.join()
        cls.process = None
        return None


def _verify_forever(pipe) -> None:
    from math_verify import parse, verify

    while True:
        pred, gold = pipe.recv()
        try:
            sides = [parse(f"${text}$", parsing_timeout=None) for text in (gold, pred)]
            pipe.send(bool(verify(*sides, timeout_seconds=None)))
        except Exception:  # what cannot be parsed is not equal
            pipe.send(False)


def score_choice(pred: str, gold: str) -> bool:
    """The option's letter: alone, in brackets, or before a delimiter."""
    found = re.match(
        r"^\W*(?:option\s+|answer:?\s+|choice\s+)?\(?([A-Za-z])\)?(?:[\s.:,)]|$)",
        pred.strip(),
        re.I,
    )
    return bool(found) and found[1].upper() == gold.strip().strip("().").upper()


# --------------------------------------------------------------------------------------------------


def score(scorer: str, pred: str | None, gold) -> dict:
    """One prediction against one gold answer or a list of aliases; an unknown scorer is a
    ValueError.
    """
    if problem := unknown(scorer):
        raise ValueError(problem)
    pred = "" if pred is None else str(pred)
    result = SCORERS[scorer](
        pred, [str(g) for g in gold] if isinstance(gold, list) else [str(gold)]
    )
    result["correct"] = bool(result["correct"] and pred.strip())
    return {"status": "ok", **result}


def unknown(scorer) -> str | None:
    """What is wrong with the name of a scorer, or None."""
    known = isinstance(scorer, str) and scorer in SCORERS
    return None if known else f"no scorer {scorer!r}: {', '.join(SCORERS)}"


def _any(rule):
    return lambda pred, golds: {"correct": any(rule(pred, gold) for gold in golds)}


def _math(pred: str, golds: list[str]) -> dict:
    results = [score_math(pred, gold) for gold in golds]
    return next((result for result in results if result["correct"]), results[0])


_exact_yes_no = partial(score_qa, yes_no_exact=True)

SCORERS = {  # name: prediction, gold answers -> {"correct", ...}
    "gaia": _any(score_gaia),
    "gsm8k_official": _any(score_gsm8k),
    "hendrycks_is_equiv": _any(lambda pred, gold: plain_latex(pred) == plain_latex(gold)),
    "choice": _any(score_choice),
    "math": _math,
    "hotpotqa": _exact_yes_no,
    "2wiki": _exact_yes_no,
    "bamboogle": _exact_yes_no,
    "musique": partial(score_qa, yes_no_exact=False),
}

SCORER_OF_KIND = {"qa": "hotpotqa", "math": "math", "gaia": "gaia", "choice": "choice"}

F1_FLOOR = 0.3  # a token F1 below it earns nothing (the released reward)


def rule_reward(row: dict, answer: str | None) -> tuple[float, bool]:
    """R_rule of an RL row and whether the answer is right by the benchmark's own metric.

    1 for a right answer, else (qa only) the token F1 if it is at least 0.3, as the release has it.
    """
    if answer is None or not answer.strip():
        return 0.0, False
    result = score(SCORER_OF_KIND[row["kind"]], answer, row["answer"])
    reward = float(result["correct"])
    if not result["correct"] and result.get("f1", 0.0) >= F1_FLOOR:
        reward = result["f1"]
    return reward, result["correct"]
