"""What a critique is worth unread: does it leak the answer, name a thing, say enough, repeat?

Texts are compared as the scorers compare answers: case, accents, punctuation and articles do not
count, numbers are equal by value.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

# --------------------------------------------------------------------------------------------------
# a text as pieces: words, numbers by value, signs; a sign of a script without spaces is a piece

_LOOK_ALIKE = str.maketrans("асеорхуіјѕԛԝһοøłđðı−–—‐‑⁄∕’", "aceopxyijsqwhoolddi-----//'", "\u00ad")
_REWRITES = [  # in this order
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),
    (r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3})|(?<=\d)(?:\{,\}|\\[,;: ])(?=\d{3})", ","),
]
_LATEX = [
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r" \1\2/\3\4 "),
    (r"\\(?:text|math|operatorname)[a-z]*\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|displaystyle|[,;:! ])", ""),
    (r"\b(?:minus|negative) (?=\d)", "-"),
    (r"(?<=\d) ?(?:percent|per cent)\b", "%"),
]
_DIGITS = r"(?:\d{1,3}(?:[,' ]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_ALONE = "\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
_ALONE += "\U00020000-\U0003ffff"  # Thai to Burmese, Khmer, Han, kana and Hangul
_SIGNS = "$€£¥%°#"  # beside a number that says enough by itself they may be left out
_PIECE = re.compile(
    rf"(?<![\w.])(?P<number>(?:{_DIGITS})(?:e[-+]?\d{{1,3}}(?!\w))?(?: ?/ ?(?:{_DIGITS}))?)"
    rf"|(?P<alone>[{_ALONE}])|(?P<word>[^\W_{_ALONE}]+)"
    rf"|(?P<sign>[{_SIGNS}+=<>^√]|(?<![\w)])-(?=[.\d])|(?<=\d)/|/(?=\d))"
)
_TRIVIAL = {"yes", "no", "true", "false", "none"}


@dataclass(frozen=True)
class Piece:
    """`spaced`: after white space; `glued`: after nothing, on a word or number, as km in 5km."""

    text: str
    kind: str
    spaced: bool
    glued: bool


def pieces(text: str) -> list[Piece]:
    """The pieces of a text, without articles."""
    for pattern, new in _REWRITES:
        text = re.sub(pattern, new, text)
    text = "".join(c for c in unicodedata.normalize("NFKC", text) if not _invisible(c))
    text = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", text.casefold()))
    text = unicodedata.normalize("NFC", text).translate(_LOOK_ALIKE)
    for pattern, new in _LATEX:
        text = re.sub(pattern, new, text)
    found, end = [], 0
    for match in _PIECE.finditer(text):
        kind, between = match.lastgroup, text[end : match.start()]
        plain = found and kind != "sign" and found[-1].kind != "sign"
        spaced = bool(plain and re.search(r"\s", between))
        glued = bool(plain and not between and {kind, found[-1].kind} <= {"word", "number"})
        value = _value(match[0]) if kind == "number" else match[0]
        found.append(Piece(value, kind, spaced, glued))
        end = match.end()
    return [p for i, p in enumerate(found) if not _article(found, i)]


def _invisible(c: str) -> bool:
    return unicodedata.category(c) in ("Cf", "Cc") and c not in "\t\n\r"


def _article(found: list[Piece], i: int) -> bool:
    """a, an, the; not an a between single letters, which may be one of a spaced word."""
    beside = found[max(i - 1, 0) : i] + found[i + 1 : i + 2]
    alone = found[i].text == "a" and any(len(p.text) == 1 for p in beside)
    return found[i].text in ("a", "an", "the") and not alone


def _value(number: str) -> str:
    """1,234.0 as 1234, .5 and 2/4 as 1/2."""
    parts = re.sub("[,' ]", "", number).split("/")
    try:
        value = Fraction(parts[0])
        for part in parts[1:]:
            value /= Fraction(part)
    except (ZeroDivisionError, ValueError):  # 1/0, and more digits than int reads
        return number
    return str(value)


def holds(text: list[Piece], sought: list[Piece]) -> bool:
    """Whether `sought` stands in the text as whole words, also spelt (U.S.A.) or run together."""
    target = "".join(p.text for p in sought)
    breaks = set(accumulate((len(p.text) for p in sought), initial=0))
    ends = {i for i in range(len(text) + 1) if i == len(text) or not text[i].glued}
    for start in ends - {len(text)}:
        joined, gaps, end = "", set(), start
        while end < len(text) and len(joined) < len(target):
            if end > start and text[end].spaced:
                gaps.add(len(joined))
            joined += text[end].text
            if not target.startswith(joined):
                break
            end += 1
        letters = all(len(piece.text) == 1 for piece in text[start:end])
        if joined == target and end in ends and (gaps <= breaks or letters):
            return True
    return False


# --------------------------------------------------------------------------------------------------
# the answer


def leaks(critique: str, golds: list[str], question: str, trajectory: str) -> bool:
    """Whether the critique states a gold answer that neither question nor trajectory contains.

    Exempt are yes and no, single letters (choices) and whole numbers below 1000, which a critique
    may well say; with a sign of their own ($12, 50%, C++) they count where that stands too.
    """
    said = pieces(critique)
    stated = [gold for gold in golds if _states(said, critique, gold)]
    if not stated:
        return False
    known = question + "\n" + trajectory
    read = pieces(known)
    return any(not _states(read, known, gold) for gold in stated)


def _states(found: list[Piece], text: str, gold: str) -> bool:
    sought = pieces(re.sub(r"^\s*\$(.*)\$\s*$", r"\1", gold, flags=re.S))
    core = _without_signs(sought)
    if not sought:  # an emoji, ∞
        return not gold.isascii() and gold.strip() in text
    if not _trivial(core):
        return holds(_without_signs(found), core)
    return len(core) < len(sought) and holds(found, sought)


def _without_signs(text: list[Piece]) -> list[Piece]:
    return [p for p in text if not (p.kind == "sign" and p.text in _SIGNS + "-")]


def _trivial(core: list[Piece]) -> bool:
    joined = "".join(piece.text for piece in core)
    small = len(core) == 1 and joined.isdigit() and len(joined) < 4
    return len(joined) < 2 or joined in _TRIVIAL or small


# --------------------------------------------------------------------------------------------------
# length, repetition, names

FEWEST_WORDS = 5  # of an analysis or a critique; with fewer it is worth less, in proportion
MOST_WORDS = 400  # of a critique, which the agent has to read
DISTINCT = 0.7  # share of different ones among its triples of words that a good text has

_CAPITALISED = r"[^\W\d_]\w+"
_OTHER_NAME = re.compile(rf"\d[\d.,]*\d|(?=([{_ALONE}]{{4}}))")  # numbers, four signs in a row


def prose(text: str, most: int = 10_000) -> float:
    """What a text can be worth, 0 to 1: 1 from FEWEST_WORDS to `most` that do not repeat."""
    words = [piece.text for piece in pieces(text)]
    triples = list(zip(words, words[1:], words[2:])) or words
    if not triples:
        return 0.0
    length = min(1.0, len(words) / FEWEST_WORDS, most / len(words))
    return length * min(1.0, len(set(triples)) / len(triples) / DISTINCT)


@lru_cache(256)
def names(text: str) -> frozenset[str]:
    """Words that have a capital inside a sentence and everywhere, numbers, runs of four signs of
    scripts without capitals."""
    inside = re.findall(rf"(?<!\n)(?<![.!?]\s)\b{_CAPITALISED}", "\n" + text)
    plain = {word for word in re.findall(_CAPITALISED, text) if not word[0].isupper()}
    capital = {word for word in inside if word[0].isupper() and word.lower() not in plain}
    return frozenset({word.casefold() for word in capital} | _other_names(text))


def named(critique: str, trail: frozenset[str]) -> set[str]:
    """Which of these names a critique names."""
    words = {word for word in re.findall(_CAPITALISED, critique) if word[0].isupper()}
    return ({word.casefold() for word in words} | _other_names(critique)) & trail


def _other_names(text: str) -> set[str]:
    return {match[1] or match[0] for match in _OTHER_NAME.finditer(text)}


def name_agreement(critique: str, annotated: str | None, trail: frozenset[str]) -> float:
    """F1 of the names of the trail in two critiques; where the second has none: has the first?"""
    own, wanted = named(critique, trail), named(annotated or "", trail)
    if not wanted:
        return float(bool(own))
    return 2 * len(own & wanted) / (len(own) + len(wanted))
