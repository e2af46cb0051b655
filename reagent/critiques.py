"""What a critique is worth unread: does it leak the answer, name a thing, say enough, repeat?

Texts are compared as the scorers compare answers: case, accents, punctuation and articles do not
count, numbers are equal by value.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

# ---------------------------------------------------------------- a text as pieces

SPACED, APART, GLUED = "\x01\x02\x03"  # behind white space, another mark, nothing (km in 5km)
_MARK = f"[{SPACED}-{GLUED}]"
_END = rf"(?={_MARK}|\Z)"
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
# a, an, the; not an a between single letters, which may be one of a spaced word
_ARTICLE = re.compile(rf"{_MARK}(?:an|the){_END}|(?<!{_MARK}.){_MARK}a{_END}(?!{_MARK}.{_END})")
_SIGN = re.compile(rf"{_MARK}[-{_SIGNS}]{_END}")
_TRIVIAL = re.compile(rf"(?:{_MARK}(?:.|\d{{1,3}}|yes|no|true|false|none))?")


def pieces(text: str) -> str:
    """The pieces of a text without articles, each behind the mark of what stands before it: words,
    numbers by value, signs; a sign of a script without spaces is one."""
    for pattern, new in _REWRITES:
        text = re.sub(pattern, new, text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) not in "Cf Cc")
    text = unicodedata.normalize("NFD", text.casefold())
    text = unicodedata.normalize("NFC", re.sub("[\u0300-\u036f]", "", text)).translate(_LOOK_ALIKE)
    for pattern, new in _LATEX:
        text = re.sub(pattern, new, text)
    found, end, before = "", 0, "sign"
    for match in _PIECE.finditer(text):
        kind, between, mark = match.lastgroup, text[end : match.start()], APART
        if "sign" not in (kind, before) and re.search(r"\s", between):
            mark = SPACED
        elif not between and {kind, before} <= {"word", "number"}:
            mark = GLUED
        found += mark + (_value(match[0]) if kind == "number" else match[0])
        end, before = match.end(), kind
    return _ARTICLE.sub("", found)


def _value(number: str) -> str:
    """1,234.0 as 1234, .5 and 2/4 as 1/2."""
    over, _, under = re.sub("[,' ]", "", number).partition("/")
    try:
        return str(Fraction(over) / Fraction(under or 1))
    except (ZeroDivisionError, ValueError):  # 1/0, and more digits than int reads
        return number


def holds(text: str, sought: str) -> bool:
    """Whether `sought` stands in the text (both in pieces) as whole words, also spelt with marks
    between its letters (U.S.A., U S A) or run together."""
    for inside in (f"{APART}?", _MARK):
        words = (inside.join(map(re.escape, word)) for word in re.split(_MARK, sought)[1:])
        if re.search(f"[{SPACED}{APART}]{f'{_MARK}?'.join(words)}(?!{GLUED}){_END}", text):
            return True
    return False


# ---------------------------------------------------------------- the answer


def leaks(critique: str, golds: list[str], question: str, trajectory: str) -> bool:
    """Whether the critique states a gold answer that neither question nor trajectory contains.
    Exempt are yes and no, single letters (choices) and whole numbers below 1000, which a critique
    may well say; with a sign of their own ($12, 50%, C++) they count where that stands too."""
    said, known = pieces(critique), question + "\n" + trajectory
    stated = [gold for gold in golds if _states(said, critique, gold)]
    read = pieces(known) if stated else ""
    return any(not _states(read, known, gold) for gold in stated)


def _states(read: str, text: str, gold: str) -> bool:
    """Whether a text, `read` in pieces, states an answer."""
    sought = pieces(re.sub(r"^\s*\$(.*)\$\s*$", r"\1", gold, flags=re.S))
    core = _SIGN.sub("", sought)
    if not sought:  # an emoji, ∞
        return not gold.isascii() and gold.strip() in text
    if not _TRIVIAL.fullmatch(core):
        return holds(_SIGN.sub("", read), core)
    return core != sought and holds(read, sought)


# ---------------------------------------------------------------- length, repetition, names

FEWEST_WORDS = 5  # of an analysis or a critique; with fewer it is worth less, in proportion
MOST_WORDS = 400  # of a critique, which the agent has to read
DISTINCT = 0.7  # share of different ones among its triples of words that a good text has

_CAPITALISED = r"[^\W\d_]\w+"
_OTHER_NAME = re.compile(rf"\d[\d.,]*\d|(?=([{_ALONE}]{{4}}))")  # numbers, four signs in a row


def prose(text: str, most: int = 10_000) -> float:
    """What a text can be worth, 0 to 1: 1 from FEWEST_WORDS to `most` that do not repeat."""
    words = re.split(_MARK, pieces(text))[1:]
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
    return 2 * len(own & wanted) / (len(own) + len(wanted)) if wanted else float(bool(own))


# ---------------------------------------------------------------- what an agent says of a review

_REVIEW = re.compile(r"(?:review|critique|feedback)")  # how words begin that name it
ECHO = 3  # so many words in a row are somebody's wording


def speaks_of_review(said: str, request: str, known: str) -> bool:
    """Whether a text names the review, or repeats ECHO words in a row of the turn that brought it,
    where `known`, all else that its writer could read, does not."""
    own, asked, read = (re.findall(r"\w+", text.lower()) for text in (said, request, known))
    named = {word for word in own if _REVIEW.match(word)} - set(read)
    return bool(named or (_runs(own) & _runs(asked)) - _runs(read))


def _runs(words: list[str]) -> set[tuple]:
    return set(zip(*(words[i:] for i in range(ECHO))))


def leak_shares(episodes: list, request: str) -> dict[str, float]:
    """{"leak/first", "leak/refined"}: the share of attempts that speak of the review. A first one
    has not read any: `request` is the wording of the turn that asks for a refined one."""
    shares = {}
    for stage, name in enumerate(("first", "refined")):
        leaks = []
        for episode in episodes:
            if len(episode.attempts) > stage and not episode.dropped:
                a, b = episode.attempts[stage].messages
                turns, before = episode.messages[a:b], episode.messages[: a - stage]
                said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
                read = [turn["content"] for turn in turns if turn["role"] != "assistant"]
                known = [turn["content"] for turn in before] + read
                asked = episode.messages[a - 1]["content"] if stage else request
                leaks.append(speaks_of_review("\n".join(said), asked, "\n".join(known)))
        if leaks:
            shares[f"leak/{name}"] = sum(leaks) / len(leaks)
    return shares
