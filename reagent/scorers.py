"""Scorers with the official semantics of the benchmarks: pure functions from (prediction, gold) to
right or wrong, whose work is bounded by their texts, so chains may score inside the event loop.

score(scorer, pred, gold) -> {"correct": bool, "em"?, "f1"?}. LaTeX and markdown around an answer
are taken off first, since the prompt asks for \\boxed{}. An empty prediction is never correct.
"""

import re
import string
from collections import Counter
from decimal import Decimal, InvalidOperation

from reagent.mathematics import same
from toolkit.text import last_boxed, plain, unwrapped


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's and HotpotQA's evaluation
    scripts: 3.5 is 35 to them), of text in Unicode's NFC."""
    text = "".join(c for c in plain(text).lower() if c not in string.punctuation)
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


def _number(text: str) -> Decimal | None:
    """The number that the text is, exactly; None: it is none, or not finite."""
    try:
        return number if (number := Decimal(text)).is_finite() else None
    except InvalidOperation:
        return None


def _same_item(pred: str, gold: str, dropped: str) -> bool:
    """A number without $, % and commas for thousands; a text without case, spaces and `dropped`."""
    if (number := _number(gold)) is None:
        pred, gold = (re.sub(r"\s", "", text).lower() for text in (pred, gold))
        return [c for c in pred if c not in dropped] == [c for c in gold if c not in dropped]
    pred = re.sub("[$%]", "", pred)
    if "," in pred and not re.fullmatch(r"\s*[-+]?\d{1,3}(,\d{3})+(\.\d*)?\s*", pred):
        return False
    return _number(pred.replace(",", "")) == number


def score_gaia(pred: str, gold: str) -> bool:
    """The leaderboard's rule: the gold answer says whether a number, a list (, or ;) or a text is
    compared. The texts in a list keep their punctuation."""
    pred, gold, dropped = plain(pred), plain(gold), string.punctuation
    golds, preds = [gold], [pred]
    if _number(gold) is None and re.search("[,;]", gold):
        golds, preds, dropped = re.split("[,;]", gold), re.split("[,;]", pred), ""
    each = (_same_item(said, wanted, dropped) for said, wanted in zip(preds, golds))
    return len(preds) == len(golds) and all(each)


def score_math(pred: str, gold: str) -> bool:
    """Whether two solutions state (after ####, else in the last box, else in all) the same."""
    stated = []
    for text in (pred, gold):
        boxed = None if "####" in text else last_boxed(text)
        stated.append(text.rpartition("####")[2].strip() if boxed is None else boxed)
    return same(*stated)


_SAYS = r"(?:is|are|would be|should be|must be|:|=)"
_ANSWER = r"(?:the )?(?:(?:final|correct|right|best|only) )*(?:answer|option|choice)"
_LEAD = re.compile(rf"^(?:(?:so|thus|hence|therefore),? )?{_ANSWER} ?{_SAYS}?:?\s*", re.I)
_MARKED = re.compile(r"[(\[]?([A-Z])(?:[)\].:\n]| [-–—:]|$):?\s*(.*)", re.S | re.I)
_OTHER = re.compile(  # another option among the words of one
    r"\([A-Ja-j]\)|(?:^|[\s,;/&])[A-J]\)|[,;\n]\s*[A-J][.:]"
    r"|^(?:or|and|is|[,;/&])(?!\w)|\b(?:or|and) [A-J]\b|(?:^|\n)[A-J](?:\n|$)"
)
_CUE = r"\b(?:is|be|choose|pick|select|option|answer|choice|with)"
_SAID = re.compile(rf"(?:{_CUE}|:) \(?([A-Z])\)?(?![\w'])")
_IS_IT = re.compile(r"\(?([A-Z])\)? is (?:the )?(?:correct|right|best|answer)")
_LETTER = re.compile(r"(?<![\w'])([B-HJ-Z]|[AI](?! [a-z]))(?![\w'])")  # no article, no pronoun
_DENIED = re.compile(r"\b(?:not|none|neither|nor|except|but|wrong|incorrect|false)\b|n't\b", re.I)


def read_choice(text: str) -> tuple[str, str]:
    """(the one letter that is chosen or "", the option's words or ""): "(B) Paris", "The answer is
    B", "B because …". Several letters, or a letter that is denied, are no choice."""
    text = plain(text)
    if len(text) > 1000:
        return "", text
    claim = re.split(r"(?i),? *\b(?:because|since)\b", text, maxsplit=1)[0].strip()
    claim = unwrapped(_LEAD.sub("", claim, count=1)).strip(" .,;!")
    if marked := _MARKED.fullmatch(claim):
        letter, words = marked[1].upper(), marked[2]
        if not _OTHER.search(words) and f" {chr(ord(letter) + 1)}. " not in words:
            return letter, words
    said = _SAID.search(claim) or _IS_IT.match(claim)
    if said and set(_LETTER.findall(claim)) <= {said[1]} and not _DENIED.search(claim):
        return said[1], ""
    return "", text


def score_choice(pred: str, gold: str) -> bool:
    """The option's letter or its words."""
    (letter, words), (right, option) = read_choice(pred), read_choice(gold)
    if option and words:
        return normalize(words) == normalize(option) and (not right or letter in ("", right))
    return bool(right) and letter == right


RULES = {  # name: prediction, gold answer -> is it right?
    "gaia": score_gaia,
    "choice": score_choice,
    "math": score_math,
}
SCORERS = (*RULES, "hotpotqa", "2wiki", "bamboogle", "musique")  # these by the words


def score(scorer, pred: str | None, gold) -> dict:
    """One prediction against a gold answer or a list of aliases, by a scorer's name or by a rule
    like those of RULES; ValueError: no such scorer."""
    rule = RULES.get(scorer, scorer)
    if not callable(rule) and (problem := unknown(scorer)):
        raise ValueError(problem)
    pred = "" if pred is None else str(pred)
    golds = list(map(str, gold if isinstance(gold, list) else [gold]))
    if callable(rule):
        result = {"correct": any(rule(pred, gold) for gold in golds)}
    else:  # the best over the aliases
        em = normalize(pred) in map(normalize, golds)
        f1 = max(token_f1(pred, gold, yes_no_exact=scorer != "musique") for gold in golds)
        result = {"correct": em, "em": float(em), "f1": f1}
    return result | {"correct": bool(result["correct"] and pred.strip())}


def unknown(scorer) -> str | None:
    """What is wrong with the name of a scorer, or None."""
    return None if scorer in SCORERS else f"no scorer {scorer!r}: {', '.join(SCORERS)}"


SCORER_OF_KIND = {"qa": "hotpotqa", "math": "math", "gaia": "gaia", "choice": "choice"}
F1_FLOOR = 0.3  # a token F1 below it earns nothing (the released reward)


def rule_reward(row: dict, answer: str | None) -> tuple[float, bool]:
    """R_rule of an RL row and whether the answer is right by the benchmark's own metric: 1 for a
    right answer, else (qa only) the token F1 if it is at least 0.3, as the release has it."""
    if answer is None or not answer.strip():
        return 0.0, False
    result = score(SCORER_OF_KIND[row["kind"]], answer, row["answer"])
    right, f1 = result["correct"], result.get("f1", 0.0)
    return (f1 if not right and f1 >= F1_FLOOR else float(right)), right
