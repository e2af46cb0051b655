"""Text from outside: what of it is shown, and what a model said after its thoughts."""

import re


def capped(text: str, most: int) -> str:
    """The text with its middle left out where it is longer than `most` characters, and a note of
    how much.
    """
    if len(text) <= most:
        return text
    half, rest = text[: most // 2], text[len(text) - (most - most // 2) :]
    return f"{half}\n[… {len(text) - most:,} characters left out …]\n{rest}"


COMBINING = "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"

STACKED = f"(?<=[{COMBINING}]{{8}})[{COMBINING}]+"

CONTROLS = (  # and what turns the direction of a line, and tags
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f"
)

UNSEEN = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b."  # terminal sequences
    f"|[{CONTROLS}]|{STACKED}"
)

MARKED = re.compile(f"[{CONTROLS}\r\u200e\u200f\u2028\u2029\ufeff]|{STACKED}")


def clean(text: str) -> str:
    """Text that a terminal, a page and a JSON file can show: no control codes, no lone surrogates,
    \\n at line ends.
    """
    text = UNSEEN.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return (
        text.encode("utf-8", "replace").decode("utf-8")
        if re.search("[\ud800-\udfff]", text)
        else text
    )


def visible(text: str) -> str:
    """Any text as a page shows it to somebody who must see what is there: what `clean` takes out
    stands as an escape.
    """
    text = text.replace("\r\n", "\n").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return MARKED.sub(_escaped, text)


def _escaped(found: re.Match) -> str:
    return "" if re.match(f"[{COMBINING}]", found[0]) else ascii(found[0])[1:-1]


def after_thoughts(text: str) -> str:
    """What a turn says last outside of its thoughts: those between <think> and </think>, those that
    are never closed, and those before a first </think>, since a template or a server may have
    opened them. A closer with nothing behind it is a stray one.
    """
    outside = re.sub(r"<think>.*?(?:</think>|\Z)", "</think>", text, flags=re.S)
    return next((said for said in reversed(outside.split("</think>")) if said.strip()), "")


_BOX = re.compile(r"\\f?box(?:ed)?(?![a-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.S)  # \{ and \} are no braces
_BARE = re.compile(
    r"(?!\\f?box)[-+.\d\\$]\S*|[A-Z]\b"
)  # what may stand behind \boxed without braces
_BLANK = re.compile(r"[\s.…_?]*|\\[lc]?dots|<?(?:your |the |final )*answer(?: here)?>?", re.I)


def last_boxed(text: str) -> str | None:
    """What the last valid \\boxed{} or \\fbox{} (or "\\boxed 5") holds. A box that never closes, is
    blank or only shows the form ("\\boxed{...}") is none.
    """
    if not (boxes := list(_BOX.finditer(text))):
        return None
    partner, open_ = {}, []  # brace -> where its partner stands; one pass, whatever the text
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            open_.append(brace.start())
        elif brace[0] == "}" and open_:
            partner[open_.pop()] = brace.start()
    for box in reversed(boxes):
        start, content = box.end(), None
        if start in partner:
            content = text[start + 1 : partner[start]].strip()
        elif bare := _BARE.match(text, start):
            content = bare[0].strip("$").rstrip(".,;:)")
        if content is not None and not _BLANK.fullmatch(content):
            return content
    return None
