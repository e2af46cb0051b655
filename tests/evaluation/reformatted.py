"""Real gold answers written otherwise: how often does a scorer call the same answer wrong, or
another one right? Truth is by construction: a rewriting keeps the value, a change alters it.

    python -m tests.evaluation.reformatted ../shared/data [--most=23012] [--seed=0] [--show]

Prints pairs, false rights and false wrongs of each scorer; --show also the fallen pairs. Without
--most all pairs are scored.
"""

import csv
import json
import re
import sys
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path
from random import Random

from reagent.scorers import score
from results.journal import unsealed

QA = ("hotpotqa", "2wiki", "musique", "bamboogle")


def golds_of(folder: Path) -> dict[str, list]:
    """The gold answers by data set: texts, for QA lists of aliases."""

    def lines(name):
        with open(folder / name, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    golds = {
        "math500": [row["answer"] for row in lines("math500/test.jsonl")],
        "gsm8k": [row["answer"].rpartition("#### ")[2] for row in lines("gsm8k/test.jsonl")],
        "bamboogle": [row["answer"] for row in lines("bamboogle/test.jsonl")],
    }
    for name in ("hotpotqa", "2wiki", "musique", "webwalker"):
        golds[name] = [row["answer"] for row in lines(f"{name}/arpo200.jsonl")]
    golds["hotpotqa"] += [row["answers"] for row in lines("hotpotqa/train100_distractor.jsonl")]
    golds["musique"] += [row["answers"] for row in lines("musique/train100.jsonl")]
    golds["2wiki"] += [row["answers"] for row in lines("2wiki/dev50_questions.jsonl")]
    with open(folder / "xbench/DeepSearch-2505.csv", encoding="utf-8-sig") as file:
        golds["xbench"] = [unsealed(row["answer"], row["canary"]) for row in csv.DictReader(file)]
    return golds


def filled(forms: str, *values) -> list[str]:
    """Forms between lines of text, one a line, with {0}, {1} … filled in."""
    return [form.strip().format(*values) for form in forms.strip("\n").split("\n") if form.strip()]


# --------------------------------------------------------------------------------------------------
# around an answer: for every scorer

AROUND = """
$ {0} $
\\({0}\\)
\\[{0}\\]
**{0}**
`{0}`
{0}.
**{0}**.
$\\boxed{{{0}}}$
*{0}*
"{0}"
"""
STYLES = ("text", "textbf", "textit", "mathrm", "mathbf", "emph", "mbox", "textrm")


def wrapped(text: str, words: bool) -> list[str]:
    """The answer as a model sets it: LaTeX and markdown around it."""
    made = [*filled(AROUND, text), f"  {text}\n"]
    if words:
        escaped = re.sub(r"([&%$#_])", r"\\\1", text)
        made += [f"\\{style}{{{escaped}}}" for style in STYLES]
        made += filled("$\\text{{{0}}}$\n\\textbf{{\\text{{{0}}}}}\n**\\text{{{0}}}**", escaped)
    return made


# --------------------------------------------------------------------------------------------------
# numbers

SAME_NUMBER = """
+{0}
{0}.0
x = {0}
n={0}
({0})
\\boxed{{{0}}}
The answer is {0}.
Answer: {0}
so \\boxed {0}
#### {0}
\\frac{{{0}}}{{1}}
\\mathbf{{{0}}}
\\text{{{0}}}
{0} units
"""
WITH_UNIT = """
{0} dollars
{0} apples
{0} hours
{0} miles per hour
{0} kg
{0}cm
{0} square feet
{0} \\text{{ cm}}
{0}\\text{{ students}}
{0} \\mathrm{{km}}
{0}\\,\\text{{m}}
\\${0}
${0}
{0}\\%
{0}%
{0}^\\circ
{0}^{{\\circ}}
{0}°
{0} degrees
"""
OTHER_NUMBER = """
{0}1
2{0}
-{0}
{0} thousand
{0} million
{0} dozen
{0}k
{0}x
{0}\\pi
{0}^3
{0}\\sqrt{{2}}
{0} + 1
{0}.0000000001
{0}e3
{0}/7
x > {0}
({0}, 0)
{0}, 5{0}
{0} or 7{0}
{0} and 3
at least {0}
not {0}
"""


def plain_number(gold: str) -> str | None:
    """The digits of a gold that is one whole number, else None."""
    text = re.sub(r"\\!\s*|\\?\$|(?<=\d),(?=\d{3})", "", gold).strip()
    return text if re.fullmatch(r"-?\d+", text) else None


def of_number(number: str, gold: str) -> list[str]:
    """The same number written otherwise."""
    sign, digits = ("-", number[1:]) if number[0] == "-" else ("", number)
    made = filled(SAME_NUMBER, number) + (filled(WITH_UNIT, number) if "$" not in gold else [])
    made += filled("−{0}\n–{0}\n- {0}", digits) if sign else []
    if len(digits) > 3 and digits[0] != "0":
        groups = f"{int(digits):,}".split(",")
        made += [sign + mark.join(groups) for mark in (",", "{,}", "\\,", ",\\!", "\\ ", "\u202f")]
    if (value := int(digits)) > 1:
        forms = "{0}\\frac{{{2}}}{{2}}\n{0}{3}/3\n{0}\\sqrt{{{4}}}\n{0}\\frac{{{3}}}3"
        made += filled(forms, sign, value, 2 * value, 3 * value, value**2)
    return made


def not_number(number: str, rng: Random) -> list[str]:
    """Other numbers that look alike, and what is none."""
    sign, digits = ("-", number[1:]) if number[0] == "-" else ("", number)
    made = filled(OTHER_NUMBER, number) if int(digits) > 1 else []
    at = rng.randrange(len(digits))
    changed = (int(digits[at]) + rng.randint(1, 9)) % 10
    made += [f"{sign}{digits[:at]}{changed}{digits[at + 1 :]}", f"{sign}{digits[::-1]}9"]
    if len(digits) > 1:
        made += [f"{sign}{digits[0]}{mark}{digits[1:]}" for mark in (".", "_", "/", "-", ":", ";")]
        made += [sign + digits[:-1] + "+" + digits[-1]]
    if len(digits) in (2, 3):  # with four and more, three digits behind a mark are thousands
        made += [f"{digits[0]}{mark}{digits[1:]}" for mark in (",", ", ", " ")]
    if sign:
        made += [digits]
    return [text for text in made if not text.startswith("--")]


# --------------------------------------------------------------------------------------------------
# fractions, lists, tuples and intervals

FRACTION = re.compile(r"(-?)\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
VULGAR = {Fraction(unicodedata.numeric(c)).limit_denominator(10): c for c in "½¼¾⅓⅔⅛⅜⅝⅞⅕⅖⅗⅘⅙⅚"}
SAME_FRACTION = """
{0}{1}/{2}
{0}{1} / {2}
{0}\\frac{{{3}}}{{{4}}}
\\frac{{{0}{1}}}{{{2}}}
{0}\\dfrac {{{1}}} {{{2}}}
{0}\\tfrac{{{1}}}{{{2}}}
{0}{1} \\div {2}
{0}\\frac{{{1}.0}}{{{2}}}
{0}\\left(\\frac{{{1}}}{{{2}}}\\right)
{0}{1}⁄{2}
x = {0}\\frac{{{1}}}{{{2}}}
"""
OTHER_FRACTION = """
{0}\\frac{{{2}}}{{{1}}}
{0}\\frac{{{5}}}{{{2}}}
{0}\\frac{{{1}}}{{{6}}}
{0}{1}{2}
{0}{1},{2}
{0}{1}.{2}
{0}{7:.4f}1
{0}{7:.10f}1
{0}{1}/{2}x
{8}{1}/{2}
"""


def fraction_of(gold: str) -> tuple[str, int, int] | None:
    """(sign, p, q) of a gold that is one proper ratio."""
    found = FRACTION.fullmatch(gold.strip())
    return found and (found[1], int(found[2] or found[3]), int(found[4] or found[5]))


def of_fraction(gold: str) -> list[str]:
    """p/q as other fractions, as a mixed number, as a decimal where that ends."""
    sign, p, q = fraction_of(gold)
    made = filled(SAME_FRACTION, sign, p, q, 2 * p, 2 * q)
    if p > q:
        made += filled("{0}{1}\\frac{{{2}}}{{{3}}}\n{0}{1} {2}/{3}", sign, *divmod(p, q), q)
    if (10**12 * p) % q == 0:
        decimal = sign + format(p / q, ".12f").rstrip("0")
        made += [decimal, decimal + "00", decimal.replace("0.", ".", 1) if p < q else decimal]
    if Fraction(p, q) in VULGAR:
        made += [sign + VULGAR[Fraction(p, q)]]
    return made


def not_fraction(gold: str) -> list[str]:
    sign, p, q = fraction_of(gold)
    return filled(OTHER_FRACTION, sign, p, q, 0, 0, p + 1, q + 1, p / q, "" if sign else "-")


LIST = re.compile(r"-?\d+(?:\s*,\s*-?\d+)+")


def of_list(gold: str) -> list[str]:
    """The elements in another order, other spacing and with words between them."""
    items = [item.strip() for item in gold.split(",")]
    turned = items[::-1]
    marks = (", ", ",", " , ", " and ", " or ", "; ", ",\\ ", " \\text{ and } ", ",\\,")
    made = [mark.join(order) for mark in marks for order in (items, turned)]
    made += [f"\\{{{', '.join(turned)}\\}}", f"{{{','.join(items)}}}"]
    made += [", ".join(turned[:-1]) + f" and {turned[-1]}"]
    return made + ["x = " + " \\text{ or } x = ".join(turned)]


def not_list(gold: str) -> list[str]:
    items = [item.strip() for item in gold.split(",")]
    made = ["".join(items), items[0], ", ".join(items[1:]), ", ".join([*items, "97"])]
    made += [", ".join([*items[:-1], items[-1] + "1"]), ", ".join(items[:1] * len(items))]
    return made + [
        "-".join(items),
        "+".join(items),
        ".".join(items[:2]),
        "(" + ", ".join(turn(items)) + ")",
    ]


def turn(items: list[str]) -> list[str]:
    return [*items[1:], items[0]]


TUPLE = re.compile(r"(?:\\left)?\s*([(\[])(.*?)(?:\\right)?\s*([)\]])")


def tuple_of(gold: str) -> tuple[str, list[str], str] | None:
    """(left bracket, elements, right bracket) of a gold that is a tuple or an interval."""
    found = TUPLE.fullmatch(gold.strip())
    if not found or "," not in found[2] or "cup" in gold:
        return None
    return found[1], [item.strip() for item in found[2].split(",")], found[3]


def of_tuple(gold: str) -> list[str]:
    """Other spacing and brackets; an interval as an inequality."""
    left, items, right = tuple_of(gold)
    made = [f"{left}{', '.join(items)}{right}", f"{left} {' , '.join(items)} {right}"]
    made += [
        f"\\left{left} {','.join(items)} \\right{right}",
        f"\\big{left}{','.join(items)}\\big{right}",
    ]
    if len(items) == 2 and (left + right != "()" or "\\infty" in gold):
        low, high = items
        a, b = ("<" if left == "(" else "\\le"), ("<" if right == ")" else "\\leq")
        if low == "-\\infty":
            made += [f"x {b} {high}", high + (" > x" if right == ")" else " \\ge x")]
        elif high == "\\infty":
            made += [f"x {'>' if left == '(' else '≥'} {low}", f"{low} {a} x"]
        else:
            made += [f"{low} {a} x {b} {high}"]
        made += [f"x \\in {gold}"]
    return made


def not_tuple(gold: str) -> list[str]:
    """A bracket, the order or the number of elements changed."""
    left, items, right = tuple_of(gold)
    flip = {"(": "[", "[": "(", ")": "]", "]": ")"}
    made = [f"{flip[left]}{', '.join(items)}{right}", f"{left}{', '.join(items)}{flip[right]}"]
    made += [f"{left}{', '.join(turn(items))}{right}"] if turn(items) != items else []
    made += [f"{left}{', '.join(items[:-1])}{right}", f"{left}{', '.join([*items, '0'])}{right}"]
    return made + [items[0], "".join(items), f"\\{{{', '.join(items)}\\}}"]


# --------------------------------------------------------------------------------------------------
# other formulas

REWRITES = [
    (r" ", ""),
    (r"\\frac", r"\\dfrac"),
    (r"\\left|\\right", ""),
    (r"\\left([(\[])", r"\\bigl\1"),
    (r"-", "−"),
    (r"pmatrix", "bmatrix"),
    (r"\\sqrt\{?(\d+)\}?", r"√\1"),
    (r"\\sqrt\{?(\d+)\}?", r" sqrt(\1)"),
    (r"\\sqrt\{?(\d+)\}?", r"\\sqrt{\1}"),
    (r"\\sqrt\{?(\d+)\}?", r" {\1}^{1/2}"),
    (r"(\d)\s*\\sqrt", r"\1 \\cdot \\sqrt"),
    (r"(\d)\s*\\sqrt\{?(\d+)\}?", r"\1*sqrt(\2)"),
    (r"\\pi(?![a-z])", "π"),
    (r"\\pi(?![a-z])", " pi"),
    (r"\\infty", "∞"),
    (r"\\infty", "inf"),
    (r"\\cup", "∪"),
    (r"\\pm", "±"),
    (r"\\text\{", r"\\mathrm{"),
    (r"\\mbox", r"\\text"),
    (r"^", r"\\displaystyle "),
]
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
CHANGES = [
    (r"\+", "-"),
    (r" - ", " + "),
    (r"\\sqrt", ""),
    (r"\\sqrt\s*(?=\{)", r"\\sqrt[3]"),
    (r"\\pi(?![a-z])", "3.14159265358979323846"),
    (r"\\pi(?![a-z])", "e"),
    (r"\\cup", r"\\cap"),
    (r"\\pm", "+"),
    (r"\\pm", "-"),
    (r"_\{?(\d+)\}?", r"_{1\1}"),
    (r"_", ""),
    (r"(?<=\d)i$", ""),
    (r"(?<![a-zA-Z\\])x(?![a-z]| \\in)", "t"),
    (r"(?<=[a-z])\^\{?(\d)\}?", r"^{1\1}"),
    (r"(?<=[a-z])\^\{?(\d)\}?", ""),
    (r"\\infty", "99"),
    (r"\\begin\{pmatrix\} -?\d+", r"\\begin{pmatrix} 77"),
    (r"(?<![\d.])1(?![\d.])", "1.0000000001"),
]


def of_latex(gold: str) -> list[str]:
    """The same formula in another hand."""
    made = [re.sub(pattern, to, gold) for pattern, to in REWRITES]
    if "\\!" in gold:
        made = [text for text in made if text.replace(" ", "") == gold.replace(" ", "")]
    raised = re.compile(r"\^(?:\{(\d+)\}|(\d))")
    made += [raised.sub(lambda m: (m[1] or m[2]).translate(SUPERSCRIPTS), gold)]
    if not re.search(r"\\(text|mbox|begin|frac|sqrt)|[_^]", gold):
        made += [re.sub(r"(\d)([a-zA-Z])", r"\1 \2", gold), re.sub(r"(\d)([a-z])", r"\1*\2", gold)]
    if not re.search(r"\\text|\d\s*\\frac", gold):
        made += [FRACTION.sub(lambda m: f"{m[1]}({m[2] or m[3]}/{m[4] or m[5]})", gold)]
    if terms := sum_terms(gold):
        made += ["".join(turn(terms)).removeprefix("+"), " ".join(terms[::-1]).removeprefix("+")]
    return made


def not_latex(gold: str, rng: Random) -> list[str]:
    """One digit, sign, root, letter or exponent of the formula changed."""
    made = [re.sub(pattern, to, gold, count=1) for pattern, to in CHANGES]
    masked = re.sub(r"begin.*|frac\d\d", lambda m: "_" * len(m[0]), gold)
    if digits := [m.start() for m in re.finditer("[1-8]", masked)]:
        at = rng.choice(digits)
        made += [f"{gold[:at]}{int(gold[at]) + 1}{gold[at + 1 :]}"]
    if sum_terms(gold) or "\\sqrt" in gold and "," not in gold:
        made += filled("-({0})\n2({0})\n({0})^3\n({0}) + 10^{{-30}}\n\\sqrt{{{0}}}", gold)
    return [text for text in made if text != gold]


def sum_terms(gold: str) -> list[str]:
    """The signed terms of a sum, or nothing where it is none."""
    rest = re.sub(r"\\(?:sqrt|frac|pi)|\{\w+\}|\^\{?\w\}?", "", gold)
    if re.search(r"[,=()\[\]<>{}\\]", rest):
        return []
    terms = [term.strip() for term in re.findall(r"[+-]?\s*[^+-]+", gold.strip())]
    terms = [term if term[0] in "+-" else "+" + term for term in terms]
    return terms if len(terms) > 1 else []


def math_pairs(gold: str, rng: Random):
    """(prediction, truth, kind) of a gold of mathematics."""
    rights = {"wrapped": wrapped(gold, words="\\" not in gold)}
    wrongs = {}
    if number := plain_number(gold):
        rights["number"], wrongs["number"] = of_number(number, gold), not_number(number, rng)
    elif words := re.fullmatch(r"\\text\{(\(?[A-Za-z]+\)?)\}", gold):
        forms = "{0}\n{1}\n\\textbf{{{0}}}\n\\mathrm{{{0}}}\n{0}.\n**{0}**"
        rights["words"] = filled(forms, words[1], words[1].lower())
        wrongs["words"] = [words[1][::-1], f"not {words[1]}", words[1] + "zz", "X", "7"]
    else:
        rights["latex"], wrongs["latex"] = of_latex(gold), not_latex(gold, rng)
    if fraction_of(gold):
        rights["fraction"], wrongs["fraction"] = of_fraction(gold), not_fraction(gold)
    if LIST.fullmatch(gold.strip()) and not number:
        rights["list"], wrongs["list"] = of_list(gold), not_list(gold)
    if tuple_of(gold):
        rights["tuple"], wrongs["tuple"] = of_tuple(gold), not_tuple(gold)
    for truth, groups in ((True, rights), (False, wrongs)):
        for kind, texts in groups.items():
            yield from ((text, truth, kind) for text in dict.fromkeys(texts))


# --------------------------------------------------------------------------------------------------
# words, GAIA, choices


def of_words(gold: str) -> list[str]:
    made = wrapped(gold, words=True) + [gold.upper(), gold.lower(), f"the {gold}", f"{gold}!"]
    return made + [f" {gold.replace(' ', '  ')} ", unicodedata.normalize("NFD", gold)]


def not_words(gold: str, rng: Random, others: list[str]) -> list[str]:
    made = [rng.choice(others), f"not {gold}", f"{gold} {rng.choice(others)}"]
    words = gold.split()
    made += [" ".join(words[1:]), " ".join(words[:-1]), " ".join(words[::-1])]
    return made + [re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), gold, count=1), f"{gold}x"]


def bare(text: str) -> str:
    """What a change must change: letters and digits, without articles."""
    text = unicodedata.normalize("NFC", text).lower()
    return re.sub(r"\b(?:a|an|the)\b|[\W_]", "", text)


def word_pairs(gold: list[str], rng: Random, others: list[str]):
    name, known = rng.choice(gold), {bare(name) for name in gold}
    yield from ((text, True, "words") for text in dict.fromkeys(of_words(name)))
    for text in dict.fromkeys(not_words(name, rng, others)):
        if bare(text) and bare(text) not in known:
            yield text, False, "words"


GAIA_SAME = "{0}\n${0}\n{0}%\n{0}.0\n\\${0}\n{0}\\%\n\\text{{{0}}}\n**{0}**\n{0}e0\n{1:,}"
GAIA_OTHER = "1{0}\n{0}1\n{0}, 5\n{0}.0000000001\n{0} {0}\n{0}/1\n0x{0}\n{2}_{3}5"


def gaia_pairs(gold: str, rng: Random, others: list[str]):
    """GAIA's rule has numbers and texts here, lists are made below."""
    if number := plain_number(gold):
        head = number[: -2 if len(number) < 4 else 1] or "5"
        yield from ((text, True, "number") for text in filled(GAIA_SAME, number, int(number)))
        changed = filled(GAIA_OTHER, number, 0, head, number[len(head) :] or "7")
        yield from ((text, False, "number") for text in changed)
        return
    texts = wrapped(gold, words=True) + [gold.upper(), gold.lower()]
    yield from ((text, True, "words") for text in dict.fromkeys(texts))
    for text in (rng.choice(others), f"{gold}x", f"not {gold}"):
        if bare(text) != bare(gold):
            yield text, False, "words"


def gaia_list_pairs(items: list[str]):
    gold = ", ".join(items)
    for text in (*wrapped(gold, words=True), gold.replace(", ", ","), gold.replace(", ", "; ")):
        if not text.endswith("."):  # the leaderboard compares the elements with their dots
            yield text, gold, True, "list"
    for text in (", ".join(turn(items)), ", ".join(items[:2]), gold + ", Rome", "".join(items)):
        yield text, gold, False, "list"


CHOSEN = """
{0}
({0})
{0}.
{0})
**{0}**
\\text{{{0}}}
\\textbf{{({0})}}
$\\textbf{{({0})}}$
[{0}]
`{0}`
\\boxed{{{0}}}
{1}
({1}) because it fits
The answer is {0}
The answer is **{0}**.
The correct answer is ({0}).
the correct option is {0}
Answer: {0}
Option {0}
I choose {0}.
{0} is correct
{0}. {2}
{0}) {2}
({0}) {2}
{0}: {2}
"""
NOT_CHOSEN = """
{3}
({3})
The answer is {3}
{3}. {2}
{0}, {3}
{3}, {0}
{0} or {3}
{3} or {0}
{0} and {3}
{0}/{3}
A, B, C, D, E
none of {0}, {3}
not {0}
It is not {0}
{0} is wrong, so {3}
either {0} or {3}
{0}{3}
({0}) ({3})
({0}) and ({3})
The answer is {0} or {3}
Both {0} and {3}
"""


def choice_pairs(letter: str, words: str, rng: Random):
    values = letter, letter.lower(), words, rng.choice([c for c in "ABCDE" if c != letter])
    yield from ((text, True, "choice") for text in filled(CHOSEN, *values))
    yield from ((text, False, "choice") for text in filled(NOT_CHOSEN, *values))


# --------------------------------------------------------------------------------------------------


def pairs_of(golds: dict[str, list], seed: int = 0):
    """(scorer, prediction, gold, truth, kind)."""
    rng = Random(seed)
    for name in ("math500", "gsm8k"):
        for gold in dict.fromkeys(golds.get(name, [])):
            yield from (("math", text, gold, *rest) for text, *rest in math_pairs(gold, rng))
            gold = gold.replace(",", "")
            if name == "gsm8k" and rng.random() < 0.3:
                yield from (
                    ("gaia", text, gold, *rest) for text, *rest in gaia_pairs(gold, rng, [])
                )
    for name in QA:
        others = [gold[0] for gold in golds.get(name, [])]
        for gold in golds.get(name, []):
            yield from ((name, text, gold, *rest) for text, *rest in word_pairs(gold, rng, others))
            if not re.search(r"[,;]|^[\d.]+$", gold[0]) and rng.random() < 0.3:
                made = gaia_pairs(gold[0], rng, others)
                yield from (("gaia", text, gold[0], *rest) for text, *rest in made)
    for name in ("webwalker", "xbench"):
        for gold in golds.get(name, []):
            texts = wrapped(gold, words=len(gold) < 60)
            yield from (("hotpotqa", text, gold, True, name) for text in texts)
    names = [gold[0] for gold in golds["hotpotqa"] if re.fullmatch(r"[\w .'-]{3,30}", gold[0])]
    for _ in range(50):
        yield from (("gaia", *rest) for rest in gaia_list_pairs(rng.sample(names, 3)))
        letter = rng.choice("ABCDE")
        made = choice_pairs(letter, rng.choice(names), rng)
        yield from (("choice", text, letter, *rest) for text, *rest in made)


def fallen(pairs) -> tuple[Counter, list]:
    """({(scorer, what): how many}, the pairs that are scored against their truth)."""
    counts, fell = Counter(), []
    for scorer, pred, gold, truth, kind in pairs:
        counts[scorer, "pairs"] += 1
        if score(scorer, pred, gold)["correct"] != truth:
            counts[scorer, "false wrong" if truth else "false right"] += 1
            fell.append((scorer, kind, truth, pred, gold))
    return counts, fell


def main(folder: str, *options: str) -> None:
    given = dict(option.lstrip("-").partition("=")[::2] for option in options)
    seed = int(given.get("seed", 0))
    pairs = list(pairs_of(golds_of(Path(folder)), seed))
    if most := int(given.get("most", 0)):
        pairs = Random(seed).sample(pairs, most)
    counts, fell = fallen(pairs)
    for name in [*dict.fromkeys(scorer for scorer, _ in counts), "all"]:
        of = [
            sum(n for (s, w), n in counts.items() if w == what and name in (s, "all"))
            for what in ("pairs", "false right", "false wrong")
        ]
        print("{:10} {:7,} pairs {:5} false right {:5} false wrong".format(name, *of))
    for line in fell if "show" in given else []:
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
