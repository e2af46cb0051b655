"""When two answers of mathematics are the same. Both are read: notation (LaTeX, Unicode or plain),
then form (list, tuple, interval, matrix, equation), then values, which are compared exactly.

same(pred, gold) -> bool. What cannot be read equals its own text only. The work is bounded by the
length of the texts and a budget: an answer can neither hang nor fill the memory.
"""

import ast
import re
import unicodedata
from fractions import Fraction
from functools import cache
from math import comb, factorial
from operator import add, mul, neg, pos, sub, truediv
from random import Random

from mpmath import MPContext

from toolkit.text import STYLED, unwrapped

MOST_CHARS = 1000  # of an answer that is read; a longer one equals its own text only
MOST_ITEMS = 50  # of a list that may stand in another order
MOST_BITS = 20_000  # of an exact number: 2004! has 19,120


# ---------------------------------------------------------------- one notation

_NAMES = "le leq leqslant ge geq geqslant ne neq lt gt infty infinity inf cup pm mp in cdot times"
_NAMES += " approx ast div circ degree emptyset varnothing lvert rvert vert langle rangle"
COMMANDS = dict(zip(_NAMES.split(), "≤≤≤≥≥≥≠≠<>∞∞∞∪±∓∈··≈·/°°∅∅|||()"))
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho"
_GREEK += " - sigma tau upsilon phi chi psi omega"  # between rho and sigma stands its final form
for _i, _name in enumerate(_GREEK.split()):
    COMMANDS |= {_name: chr(ord("α") + _i), _name.capitalize(): chr(ord("Α") + _i)}
_COMMAND = re.compile(r"\\((?:var)?([a-zA-Z]+))\s*")  # \theta is θ, \leq is ≤, unknown ones stay
SIGNS = str.maketrans("−–—‐‑×⋅∙*÷⁄∕⟨⟩′’", "-----····///()''", "\u200b\u2061\u2062")
FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc exp log ln".split()
THOUSANDS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_SPACE = r"(?:\\[,;: ]|~|\s|\{,\}|,\s*\\!\s*|\\!)"  # between three digits and three
_SPACED = re.compile(rf"(?<![\w.,])[1-9]\d{{0,2}}(?:{_SPACE}\d{{3}})+(?!\d)")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
REWRITES = [  # in this order
    (r"\\\\(?:\[\w*\])?", "↵"),
    (r"\\(?:left|right)\s*\.|\\(?:left|right|middle|[Bb]igg?[lrm]?)(?![a-zA-Z])", ""),
    (r"\\(?:displaystyle|textstyle|limits)(?![a-z])|\\!\s*", ""),
    (r"\\[dtc](frac|binom)", r"\\\1"),
    (r"\\[,;:> \n]|~|\\q?quad(?![a-z])|\s+", " "),
    (r"(?<=\d) ?x ?(?=10\^)", "·"),
    (r"\((\d+)\)(?=_)", r"\1"),
    (r"\\\$|US(?:D|\\?\$)\s*(?=\d)", "$"),
    (r"\^\s*(?:\{\s*)?\\prime(?:\s*\})?", "'"),
    (r"\^\s*(?:\{\s*)?(?:\\circ|∘)(?:\s*\})?", "°"),
    (r"\\([%#&_])", r"\1"),
    (r">=", "≥"),
    (r"<=", "≤"),
    (r"(?<=[\w)}])··(?=[\w({-])", "^"),
    (r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
    (r"√|(?<![A-Za-z\\])sqrt", r"\\sqrt "),
    (r"(?<![A-Za-z\\])(pi|infinity|inf|theta|alpha|beta|gamma|lambda)(?![A-Za-z])", r"\\\1"),
    (r"(?<=[_^])\s*(-?\d+|[A-Za-z])", r"{\1}"),
]
_LEAD = re.compile(r"^(?:(?:so|thus) )?(?:the )?(?:final |correct )?answer\s*(?:is|:|=)\s*:?", re.I)


@cache
def _character(c: str) -> str:
    """½ as \\frac{1}{2}, ₂ as _{2}, full-width and mathematical letters as plain ones."""
    kind, _, codes = unicodedata.decomposition(c).rpartition(">")
    told = "".join(chr(int(code, 16)) for code in codes.split()) if kind else c
    if kind == "<fraction":
        return "\\frac{%s}{%s}" % tuple([*told.split("⁄"), ""][:2])
    return f"_{{{told}}}" if kind == "<sub" else told


def _styled(style: re.Match) -> str:
    """\\text{ cm} as «cm»; separators, single letters and numbers without a mark."""
    words = style[1].strip(" ~\\,;")
    if style[0].startswith(("\\boxed", "\\fbox")):
        return words
    counted = re.search(r"[\d})]\s*$", style.string[: style.start()]) and words in set("mgslLhV")
    if counted or (re.search(r"[A-Za-z]{2}", words) and words not in (*FUNCTIONS, "and", "or")):
        return words if re.search(r"[\d«]", words) else f"«{words}»"
    return f" {words} " if words in ("and", "or") else style[1]


def _fraction(repeating: re.Match) -> str:
    """0.1\\overline{6} as (16 - 1) / 90."""
    whole, head, tail = repeating.groups()
    top = int(whole + head + tail) - int(whole + head or 0)
    return f"({top}/{(10 ** len(tail) - 1) * 10 ** len(head)})"


def canonical(text: str) -> str:
    """The answer in the one notation, spaces kept; «…» are words."""
    for _ in range(3):  # one style inside another
        text = STYLED.sub(_styled, text)
    text = unwrapped(_LEAD.sub("", unwrapped(text), count=1))
    if not re.sub(r"\\\$|[^$]", "", text).count("$") % 2:  # marks of mathematics, not of money
        text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", unicodedata.normalize("NFC", text))
    text = "".join(map(_character, text)).translate(SIGNS)
    text = _SPACED.sub(lambda number: re.sub(r"\D", "", number[0]), text).replace("{,}", ",")
    for pattern, to in REWRITES:
        text = re.sub(pattern, to, text)
    text = _REPEATING.sub(_fraction, text)
    text = _COMMAND.sub(lambda c: COMMANDS.get(c[1]) or COMMANDS.get(c[2], f"\\{c[1]} "), text)
    text = text.strip().rstrip(".,;").strip()
    return re.sub(r"(?<![\w)}])\+∞", "∞", text)


_WORDS = "|".join(FUNCTIONS)
_CALLS = re.compile(rf"\\[A-Za-z]+|{_WORDS}")
_IN_WORDS = re.compile(r"«|[A-Za-z]{3}|\s[A-Za-z]{2}(?:$|[\s.])|^\([A-Z]\)$")


def _same_text(a: str, b: str) -> bool:
    """Equal without spaces, but for those between digits; words also without case and dots."""
    words = any(_IN_WORDS.search(_CALLS.sub("", text)) for text in (a, b))
    a, b = (re.sub(r"(?<=\d)\s+(?=\d)", "_", text) for text in (a, b))
    a, b = (re.sub(r"[«»\s]", "", text).removeprefix("+") for text in (a, b))
    if words:
        a, b = (re.sub(r"(?<!\d)\.|\.(?!\d)", "", text.lower()) for text in (a, b))
    return a == b != ""


# ---------------------------------------------------------------- form

AND, OR = r",?\s*(?<![A-Za-z])and(?![A-Za-z])", r",?\s*(?<![A-Za-z])or(?![A-Za-z])"
SEPARATORS = f"{AND}|{OR}|[,;]"
_GROUPED = re.compile(r"\\?[(\[{«][^][(){}«»]*[)\]}»]")
_NAME = re.compile(  # x, x_1, AB, f(x), (x, y)
    r"[A-Z]{2,3}|[A-Za-zΑ-Ωα-ω](?:_\{\w+\})?'*(?:\([a-z](?:, *[a-z])*\))?|\([a-z](?:, *[a-z])+\)"
)
_BUILDER = re.compile(r"\\\{ *([A-Za-z]) *(?:∈[^|]*)?(?:\\mid|[|:])(?=.*\1)(.*[<>≤≥≠].*)\\\}")
_MATRIX = re.compile(r"\\begin *\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end *\{\1\}", re.S)


def _masked(text: str) -> str:
    """The text with all that stands in brackets blanked out."""
    while (masked := _GROUPED.sub(lambda group: "\0" * len(group[0]), text)) != text:
        text = masked
    return text


def _split(text: str, at: str) -> list[str]:
    """The pieces of the text between what matches `at` outside all brackets."""
    cuts = list(re.finditer(at, _masked(text)))
    starts, ends = [0, *(cut.end() for cut in cuts)], [*(cut.start() for cut in cuts), len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends)]


def _read(text: str) -> tuple | str:
    """The form of an answer in the one notation: (kind, ...) or a text, which is one value."""
    text = _BUILDER.sub(r"\2", re.sub(r"^[A-Za-z] *∈", "", text.strip())).strip()
    text = re.sub(r"^(\w)\s*≠(.*)", r"\1<\2 or \1>\2", text.replace("\\mathbb {R}", "(-∞,∞)"))
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in matrix[2].split("↵") if row.strip()]
        cells = [_read(cell) for row in rows for cell in row.split("&")]
        return ("tuple", "()", cells) if len(rows) == len(cells) else ("matrix", len(rows), cells)
    relation = re.search("[≤≥<>]", text)
    if len(parts := _split(text, f"∪|{OR}" if relation else "∪")) > 1:
        return ("∪", [_read(part) for part in parts])
    if relation:
        return _interval(re.split("[≤≥<>]", text), re.findall("[≤≥<>]", text)) or text
    around = re.fullmatch(r"\\?([(\[{])(.*?)\\?([)\]}])", text, re.S)
    if around and around[2] and not re.search(r"[][(){}]", _masked(around[2])):
        brackets, inside = around[1] + around[3], around[2]  # in brackets 1,000 may be two items
        items = _items(_ungrouped(inside) if re.search(r"[,;]\s", inside) else inside)
        if len(items) > 1:
            return ("set", items) if brackets == "{}" else ("tuple", brackets, items)
        return _read(inside) if brackets in ("()", "{}") or "\\begin" in inside[:8] else text
    if len(items := _items(_ungrouped(text))) > 1:
        return ("list", items)
    exact, _, rounded = items[0].partition("≈")  # what is rounded counts where nothing exact stands
    text = rounded if rounded and (not exact or _NAME.fullmatch(exact.strip())) else exact
    sides = _split(text, "=")
    return ("=", sides) if len(sides) > 1 else sides[0]


def _ungrouped(text: str) -> str:
    """1,000 as 1000."""
    return THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)


def _items(text: str) -> list:
    """The elements of a list; one with ± is two."""
    signs = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
    each = ([piece.translate(sign) for sign in signs] for piece in _split(text, SEPARATORS))
    pieces = [piece for two in each for piece in dict.fromkeys(two)]
    return [_read(piece) for piece in pieces] if len(pieces) > 1 else pieces


def _interval(terms: list[str], signs: list[str]) -> tuple | None:
    """x > 3, 3 < x and 0 ≤ x < 5 as (tuple, brackets, bounds, name)."""
    if signs[0] in ">≥":
        signs = [dict(zip("<>≤≥", "><≥≤"))[sign] for sign in reversed(signs)]
        terms = terms[::-1]
    terms = [term.strip() for term in terms]
    if len(signs) == 1 and _NAME.fullmatch(terms[0]):
        terms, signs = ["-∞", *terms], ["<", *signs]
    elif len(signs) == 1:
        terms, signs = [*terms, "∞"], [*signs, "<"]
    if len(signs) > 2 or set(signs) - set("<≤") or not _NAME.fullmatch(terms[1]):
        return None
    brackets = {"<": "()", "≤": "[]"}
    return ("tuple", brackets[signs[0]][0] + brackets[signs[1]][1], terms[::2], terms[1])


def same(pred: str, gold: str) -> bool:
    """Whether two answers say the same."""
    if max(len(pred), len(gold)) > MOST_CHARS:
        return pred.strip() == gold.strip() != ""
    pred, gold = canonical(pred), canonical(gold)
    try:
        return _same_text(pred, gold) or (pred != "" and _equal(_read(pred), _read(gold)))
    except RecursionError:
        return False


def _equal(a: tuple | str, b: tuple | str) -> bool:
    kinds = [node[0] if isinstance(node, tuple) else "value" for node in (a, b)]
    if kinds == ["=", "="]:
        return _same_equation(a[1], b[1])
    if "=" in kinds:
        return _equal(_said(a), _said(b))
    if kinds == ["value", "value"]:
        return _same_value(a, b)
    if set(kinds) == {"list", "tuple"}:  # (3, 5) without its brackets
        items, (_, brackets, others, *_) = (a[1], b) if kinds[0] == "list" else (b[1], a)
        return brackets == "()" and _pairwise(items, others)
    if set(kinds) <= {"list", "set"} or kinds == ["∪", "∪"]:
        return _unordered(a[1], b[1])
    names = {*a[3:], *b[3:]}  # of intervals that were inequalities
    return kinds[0] == kinds[1] and a[1] == b[1] and len(names) < 2 and _pairwise(a[2], b[2])


def _said(node: tuple | str) -> tuple | str:
    """What x = 5 or f(x) = 2x says of its left side; of 1/2 = 0.5 either side."""
    if isinstance(node, str) or node[0] != "=":
        return node
    first, *others = node[1]
    if _NAME.fullmatch(first):
        return _read(others[-1])
    return first if all(_agree(first, other) for other in others) else "=".join(node[1])


def _same_equation(a: list[str], b: list[str]) -> bool:
    """Equal side by side, or with the same solutions: the sides' differences have a fixed ratio."""
    if len(a) == len(b) and _same_text(a[0], b[0]):
        return _pairwise(*([_read(side) for side in sides[1:]] for sides in (a, b)))
    if len(a) != 2 or len(b) != 2:
        return False
    pairs = _values(*(f"({left})-({right})" for left, right in (a, b)))
    if len(pairs) < 2 or _close(pairs[0][0], 0) or _close(pairs[0][1], 0):
        return False
    return all(_close(x * pairs[0][1], y * pairs[0][0]) for x, y in pairs[1:])


def _pairwise(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(_equal, a, b))


def _unordered(a: list, b: list) -> bool:
    """Each of `a` has its own equal in `b`."""
    if len(a) != len(b) or len(a) > MOST_ITEMS:
        return False
    left = list(b)
    for item in a:
        if (at := next((i for i, other in enumerate(left) if _equal(item, other)), None)) is None:
            return False
        del left[at]
    return True


# ---------------------------------------------------------------- units

_UNITS = """cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre
in inch inche|ft foot feet|yd yard|mi mile|kg kilogram|g gram|mg milligram|lb pound|oz ounce
s sec second|min minute|h hr hour|d day|wk week|yr year|L l liter litre|mL ml milliliter
° deg degree|% percent pct|$ dollar USD usd buck|¢ c cent|€ euro EUR|£|mph|kmh|°F|°C| unit"""
UNITS = {name: line.split(" ")[0] for line in re.split("[|\n]", _UNITS) for name in line.split()}
POWERS = {"square": "^{2}", "sq": "^{2}", "cubic": "^{3}", "cu": "^{3}"}
_NO = "thousand million billion trillion hundred dozen half halves third quarter fourth fifth sixth"
_NO += " eighth tenth hundredth plus minus times over squared cubed factorial more less than to not"
_NO += " maybe perhaps approximately roughly wrong incorrect negative"
NO_UNITS = {"or", "and", *_NO.split(), *FUNCTIONS}
_UNIT = r"«[^^]*|°\s?[CF]?|[%¢€£$]|\s[A-Za-z][A-Za-z /.]*|[a-zA-Z]{2,3}"
_WITH_UNIT = re.compile(rf"(.*?[\d)}}!π.])\s*({_UNIT})(\^\{{\d\}})?")


def _quantity(text: str) -> tuple[str, str]:
    """(value, unit): "$29", "29 dollars" and "29" without a unit."""
    if money := re.fullmatch(r"(-?)\s*([$€£])\s*(.*)", text):
        return money[1] + money[3], money[2]
    if not (found := _WITH_UNIT.fullmatch(text)):
        return text, ""
    first, *rest = words = re.split(r"[\s/.«»]+", found[2].replace("° ", "°").strip("«» ."))
    power = POWERS.get(first.lower(), "")
    words = [word.removesuffix("s") or word for word in (rest if power else words)]
    long = 3 if found[2][0] == " " else 0 if found[2][0] == "«" else 99
    known = all(word in UNITS or len(word) >= long for word in words)
    if len(words) > 4 or not known or NO_UNITS & {word.lower() for word in words}:
        return text, ""
    unit = "/".join(UNITS.get(word, word) for word in words if word != "per")
    return found[1], unit and unit + (found[3] or power)


def _same_value(a: str, b: str) -> bool:
    """Equal texts, or equal values in units that agree; p % is p or p / 100."""
    if _same_text(a, b):
        return True
    (x, unit), (y, other) = _quantity(a), _quantity(b)
    if unit != other and unit and other:
        return False
    if unit != other and "%" in (unit, other) and not _agree(x, y):
        x, y = (f"({x})/100", y) if unit == "%" else (x, f"({y})/100")
    return _agree(x, y)


# ---------------------------------------------------------------- values

MP = MPContext()
MP.dps = 500
PRIMES = (17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
CONSTANTS = {"e": +MP.e, "π": +MP.pi, "i": MP.mpc(0, 1)}
_GROUP = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_ATOM = r"(?:\d++(?:\.\d+)?|[A-Za-zΑ-Ωα-ω](?:_\w+)?(?:\*\*\([^()]*\))?|@(?:root|abs)" + _GROUP + ")"
_ARGUMENT = rf"({_GROUP}|{_ATOM}(?:\s*{_ATOM})*+)"
_F = rf"\\({_WORDS})"
BELOW = str.maketrans("+-", "pm")  # of a_{n+1}, as part of a name
_FIRST = [
    (rf"(?<![\\A-Za-z])({_WORDS})(?=[A-Za-z]?(?![A-Za-z]))", r"\\\1 "),
    (r"(?<![\w.}/])(\d+) ?(\\frac ?(?:\{\d+\}|\d) ?(?:\{\d+\}|\d)|(?<= )\d+ ?/ ?\d+)", r"(\1+\2)"),
    (r"(\\(?:frac|binom|sqrt) *(?:\[\w+\])?) *(\w)", r"\1{\2}"),
    (rf"\\sqrt *({_GROUP})", r"\\sqrt{\1}"),
]
_INSIDE_OUT = [
    (rf"{_F} *\{{([^{{}}]*)\}}", r"\\\1(\2)"),
    (r"(\\(?:frac|binom) *\{[^{}]*\}) *(\w)", r"\1{\2}"),
    (r"\\frac *\{([^{}]*)\} *\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\binom *\{([^{}]*)\} *\{([^{}]*)\}", r"@binom((\1),(\2))"),
    (r"\\sqrt *\[([^][{}]*)\] *\{([^{}]*)\}", r"@root((\2),(\1))"),
    (r"\\sqrt *\{([^{}]*)\}", r"@root((\1),2)"),
    (r"\^ *\{([^{}]*)\}", r"**(\1)"),
    (r"_\{([\w+-]+)\}", lambda below: f"_{below[1].translate(BELOW)} "),
    (r"\\(sin|cos|tan) *\*\*\(-1\)", r"\\arc\1 "),
    (rf"{_F} *\*\*\(([^()]*)\) *{_ARGUMENT}", r"(@\1(\3))**(\2)"),
    (rf"{_F} *(_\w+)? *{_ARGUMENT}", r"@\1\2(\3)"),
    (r"\|([^|]*)\|", r"@abs(\1)"),
    (r"(?<!sqrt)(?<!sqrt )\[([^][]*)\]", r"(\1)"),
    (rf"(\d+|[A-Za-z]|{_GROUP}) *!", r"@factorial(\1)"),
    (r"(\d+(?:\.\d+)?) *°", r"(\1*π/180)"),
]
_PLAIN = re.compile(r"(\\[A-Za-z]+ ?|[}\]] ?)?\{([^{}]*)\}")
_NUMBER = r"\d+\.\d+e-?\d{1,3}|1e-\d{1,3}|\d+e\d{1,3}|\d+(?:\.\d*)?(?:E[+-]?\d{1,3})?|\.\d+"
_LETTER = r"[A-Za-zΑ-Ωα-ω](?:_\w+)?'*"
_TOKEN = re.compile(rf"\s*(?:({_NUMBER})|@(\w+)(?=\()|({_LETTER})|(\*\*|[-+·/(),]))")


def _parsed(text: str) -> ast.expr:
    """The expression as Python's own parser reads it, implied products written out."""
    if "@" in text:  # it marks what is called below
        raise ValueError(text)
    for pattern, to in _FIRST:
        text = re.sub(pattern, to, text)
    before = ""
    while text != before:
        before = text
        for pattern, to in _INSIDE_OUT:
            text = re.sub(pattern, to, text)
        if text == before:  # braces that only group
            text = _PLAIN.sub(lambda m: m[0] if m[1] else f"({m[2]})", text)
    letters = re.sub(r"@\w+", "", text)  # three alone and four together are words, not products
    if re.search("[A-Za-z]{4}|^[A-Za-z]{3}$", letters) or _TOKEN.sub("", text).strip():
        raise ValueError(text)
    python, product = "", False
    for number, function, name, sign in _TOKEN.findall(text):
        if product and number:  # 3 4 is no product
            raise ValueError(text)
        python += "*" if product and (function or name or sign == "(") else ""
        word = function or name.replace("'", "_p") or sign.replace("·", "*")
        python += f"({Fraction(number)})" if number else word
        product = bool(number or name or sign == ")")
    try:
        return ast.parse(python, mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError(text) from error


def _value(node: ast.expr, point: tuple[int, int]):
    """Its value at a point (number, sign of the variables): exact if rational, else 500 digits."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.Name):
        draw = Random(f"{node.id} {point[0]}")
        drawn = Fraction(point[1] * draw.choice(PRIMES), draw.choice((7, 11, 13)))
        return CONSTANTS.get(node.id, drawn)
    name = type(getattr(node, "op", None)).__name__
    operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    if isinstance(node, ast.Call):
        name, operands = node.func.id, node.args
    value = _applied(name, [_value(operand, point) for operand in operands])
    if not isinstance(value, Fraction) or _bits(value) <= MOST_BITS:
        return value
    raise ValueError("too long")


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


ARITHMETIC = dict(Add=add, Sub=sub, Mult=mul, Div=truediv, USub=neg, UAdd=pos, abs=abs)
COUNTS = {"factorial": factorial, "binom": comb}
CALLED = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "log": "log10"}
CALLED |= {name: name for name in (*FUNCTIONS[3:-2], "factorial")}


def _applied(name: str, values: list):
    """One operation; ValueError where it is not known or its result would be too long."""
    exact = all(isinstance(value, Fraction) for value in values)
    if name in ARITHMETIC:
        return ARITHMETIC[name](*(values if exact else map(MP.convert, values)))
    if exact and name in ("Pow", *COUNTS) and values[-1].denominator == 1:
        return _whole(name, values)
    x, *rest = map(MP.convert, values)
    if name == "root" and not MP.im(x) and x < 0 and rest[0] % 2 == 1:  # as of real numbers
        return -MP.root(-x, int(rest[0]))
    if name in ("Pow", "root"):
        power = rest[0] if name == "Pow" else 1 / rest[0]
        if x and abs(power * MP.log(x)) > 10**5:
            raise ValueError("too long")
        return MP.power(x, power)
    name, _, base = name.partition("_")
    if name not in CALLED or abs(x) > 10**5:
        raise ValueError(f"no {name} of {x}")
    return MP.log(x) / MP.log(int(base)) if base else getattr(MP, CALLED[name])(x)


def _whole(name: str, values: list[Fraction]) -> Fraction:
    """A power, factorial or binomial of exact values, the last one whole."""
    if name == "Pow":
        if _bits(values[0]) * abs(values[1]) > MOST_BITS:
            raise ValueError("too long")
        return values[0] ** int(values[1])
    if not all(n.denominator == 1 and 0 <= n < 3000 for n in values):
        raise ValueError(f"no {name} of {values}")
    return Fraction(COUNTS[name](*map(int, values)))


def _values(a: str, b: str) -> list[tuple]:
    """The values of two expressions at several points (one where there are no variables); [] where
    one has none. With roots and logarithms the variables are positive."""
    negative = 1 if re.search(r"sqrt|log|ln|\^\{[^}]*[^}\d-]", a + b) else -1
    try:
        nodes = _parsed(a), _parsed(b)
        names = {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}
        variables = names - {*CONSTANTS, *CALLED, *COUNTS, *ARITHMETIC, "root"}
        points = [(0, 1), (1, negative), (2, 1)][: 3 if variables else 1]
        pairs = [tuple(_value(node, point) for node in nodes) for point in points]
    except (ArithmeticError, TypeError, ValueError):  # mpmath raises ValueError too
        return []
    if all(isinstance(value, Fraction) for pair in pairs for value in pair):
        return pairs
    return [tuple(map(MP.convert, pair)) for pair in pairs]


def _close(x, y) -> bool:
    """Equal Fractions, or equal but for the last half of the digits; what is 0 has no digits."""
    if isinstance(x, Fraction):
        return x == y
    return abs(x - y) <= max((abs(x) + abs(y)) / 10**250, MP.mpf(10) ** -400)


def _agree(a: str, b: str) -> bool:
    """Whether two expressions have the same value at every point."""
    pairs = _values(a, b)
    return bool(pairs) and all(_close(x, y) for x, y in pairs)
