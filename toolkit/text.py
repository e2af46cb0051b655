"""Text from outside: what of it is shown, and what a model said after its thoughts."""

import re
import unicodedata


def capped(text: str, most: int) -> str:
    """The text, the middle of one longer than `most` characters left out, and how much was."""
    if len(text) <= most:
        return text
    half, rest = text[: most // 2], text[len(text) - (most - most // 2) :]
    return f"{half}\n[… {len(text) - most:,} characters left out …]\n{rest}"


COMBINING = "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
STACKED = f"(?<=[{COMBINING}]{{8}})[{COMBINING}]+"
# and what turns the direction of a line, and tags
CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f"
TERMINAL = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b."
UNSEEN = re.compile(f"{TERMINAL}|[{CONTROLS}]|{STACKED}")


def clean(text: str) -> str:
    """Text for terminals, pages and JSON: no control codes, no lone surrogates, \\n ends lines."""
    text = UNSEEN.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.encode("utf-8", "replace").decode()


def after_thoughts(text: str) -> str:
    """What a turn says last outside of its thoughts: in <think>…</think>, never closed, or before a
    first </think>, since a template may have opened them. One with nothing behind it is stray."""
    outside = re.sub(r"<think>.*?(?:</think>|\Z)", "</think>", text, flags=re.S)
    return next((said for said in reversed(outside.split("</think>")) if said.strip()), "")


_BOX = re.compile(r"\\f?box(?:ed)?(?![a-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.S)  # \{ and \} are no braces
_BARE = re.compile(r"(?!\\f?box)[-+.\d\\$]\S*|[A-Z]\b")  # may stand behind \boxed without braces
_BLANK = re.compile(r"[\s.…_?]*|\\[lc]?dots|<?(?:your |the |final )*answer(?: here)?>?", re.I)


def last_boxed(text: str) -> str | None:
    """What the last valid \\boxed{} or \\fbox{} (or "\\boxed 5") holds. A box that never closes, is
    blank or only shows the form ("\\boxed{...}") is none."""
    boxes = list(_BOX.finditer(text))
    partner = partners(text) if boxes else {}
    for box in reversed(boxes):
        start, content = box.end(), None
        if start in partner:
            content = text[start + 1 : partner[start]].strip()
        elif bare := _BARE.match(text, start):
            content = bare[0].strip("$").rstrip(".,;:)")
        if content is not None and not _BLANK.fullmatch(content):
            return content
    return None


def partners(text: str) -> dict[int, int]:
    """Where the partner of each opening brace stands; one pass, whatever the text."""
    partner, open_ = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            open_.append(brace.start())
        elif brace[0] == "}" and open_:
            partner[open_.pop()] = brace.start()
    return partner


# what stands around an answer: LaTeX and markdown
STYLES = r"(?:text(?:bf|it|rm|sf|tt|sc|up|normal)?|[mh]box|math(?:rm|bf|it|sf|tt)|operatorname\*?|"
STYLES = rf"\\{STYLES}emph|underline|boldsymbol|bm|boxed|fbox)(?![a-z])\s*"
STYLED = re.compile(STYLES + r"\{([^{}]*)\}")
_STYLE = re.compile(STYLES)
_AROUND = "$$ $$|$ $|\\( \\)|\\[ \\]|*** ***|** **|__ __|``` ```|` `|* *|\" \"|“ ”|' '|‘ ’"
AROUND = [pair.split() for pair in _AROUND.split("|")]
_BOLD = re.compile(r"(\*\*|__|`)(?=\S)([^*`]+?)(?<=\S)\1")
_ACCENTS = dict(zip("'`^~\"cvuHk", "\u0301\u0300\u0302\u0303\u0308\u0327\u030c\u0306\u030b\u0328"))
_ACCENT = re.compile(r"\\(?:([cvuHk'`^~\"])\s*\{\\?([A-Za-z])\}|(['`^~])([A-Za-z]))")


def unwrapped(text: str) -> str:
    """The text without what stands around all of it: $…$, \\text{…}, **…**, `…`, quotes."""
    text = text.strip()
    for _ in range(8):
        if not (inner := _inside(text) or _inside(text.rstrip("."))):
            break
        text = inner
    return text


def _inside(text: str) -> str:
    """What stands inside the marks around all of the text; "" where there are none."""
    style = _STYLE.match(text)
    if style and partners(text).get(style.end()) == len(text) - 1:
        return text[style.end() + 1 : -1].strip()
    for a, b in AROUND:
        inner = text[len(a) : -len(b)]
        if text.startswith(a) and text.endswith(b) and len(text) > len(a + b):
            bare = inner.replace("\\$", "")
            if a not in bare and b not in bare and not inner.endswith("\\"):
                return inner.strip()
    return ""


def plain(text: str) -> str:
    """An answer in words without LaTeX and markdown, in NFC: what QA and choices compare."""
    text = unwrapped(text)
    for _ in range(4):  # one inside another
        text = STYLED.sub(r"\1", _BOLD.sub(r"\2", text))
    text = _ACCENT.sub(lambda m: (m[2] or m[4]) + _ACCENTS[m[1] or m[3]], text)
    text = re.sub(r"(?<=\d)\\[,;: ](?=\d{3})", "", text)  # 12\,345
    text = re.sub(r"\\[,;: ]|(?<=\w)~(?=\w)|\\\\", " ", text)
    text = re.sub(r"\\[()\[\]]|\\([&%$#_{}])", lambda m: m[1] or "", text)
    return unicodedata.normalize("NFC", unwrapped(text))


def spoken(message: dict) -> tuple[str, str]:
    """(text, thoughts) of a message in a chat. The text is one string or parts (an image is named
    only); thoughts stand in `reasoning_content`, `reasoning`, `thinking` or in their own parts."""
    given = (message.get(key) for key in ("reasoning_content", "reasoning", "thinking"))
    thoughts = next((text for text in given if isinstance(text, str) and text), "")
    content, text = message.get("content"), ""
    if isinstance(content, str):
        return content, thoughts
    for part in content if isinstance(content, list) else []:
        part = part if isinstance(part, dict) else {"text": part}
        inner = part.get("thinking", part.get("reasoning"))
        if inner is not None:
            thoughts += inner if isinstance(inner, str) else spoken({"content": inner})[0]
        else:
            text += part["text"] if isinstance(part.get("text"), str) else f"({part.get('type')})"
    return text, thoughts
