"""What a turn of the policy holds: tool calls in the format of its template, and the answer.

Structure (thoughts, calls, boxes) is never searched inside the strings of a call. A slip that
leaves the meaning unambiguous is read and counted; anything else is told to the agent.
"""

import json
import math
import re
from dataclasses import dataclass, field

from reagent.rows import MAX_DEPTH
from toolkit.text import last_boxed

MAX_CALLS = 64  # of one turn


@dataclass(frozen=True)
class Call:
    """A tool call. `problem` is what the agent is told in place of a result, "" if none."""

    name: str = ""
    arguments: object = field(default_factory=dict)
    problem: str = ""
    repaired: bool = False  # a slip was mended to read it


@dataclass(frozen=True)
class Turn:
    """What a turn says outside of its thoughts. A turn with calls goes on, whatever its answer."""

    calls: list[Call]
    answer: str | None
    spans: list[tuple[int, int]]  # [a, b) of each call in the text


# ---------------------------------------------------------------- JSON as models write it

_STRING = r'"(?:[^"\\]|\\.)*+(?:"|\Z)'
_JSON = re.compile(_STRING + r"|[\[{]|[\]}]|</?tool_call>", re.S)
_SLIP = re.compile(_STRING + r"|,(?=\s*[\]}])", re.S)
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/bfnrt]|)')
_FENCE = re.compile(r"\s*```\w*(.*?)```\s*", re.S)


def read_json(text: str) -> tuple[object, bool]:
    """(the value, whether a slip was mended): raw line ends and tabs in strings, bad escapes, a
    trailing comma, a fence. Else a ValueError that says what strict JSON lacks."""
    if max((depth for _, depth in _depths(text)), default=0) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    try:
        return _load(text), False
    except ValueError as error:
        fenced = _FENCE.fullmatch(text)
        mended = _SLIP.sub(_mended, fenced[1] if fenced else text)
        try:
            return _load(mended, strict=False), True
        except ValueError:
            raise error from None


def _load(text: str, **options):
    options |= dict(parse_constant=_finite, parse_float=_finite)
    return json.loads(text, object_pairs_hook=_no_duplicates, **options)


def _mended(match: re.Match) -> str:
    if match[0] == ",":
        return ""
    return _ESCAPE.sub(lambda escape: escape[0] if escape[1] else r"\\", match[0])


def _depths(text: str, at: int = 0):
    """The strings, brackets and tags after `at`, each with how many brackets are open behind it."""
    depth = 0
    for token in _JSON.finditer(text, at):
        depth += (token[0] in "[{") - (token[0] in "]}")
        yield token, depth


def _json_end(text: str, at: int) -> int:
    """Where the first object or list after `at` ends, its strings skipped; `at` if none does."""
    for token, depth in _depths(text, at):
        if token[0][0] == "<" or depth <= 0 and token[0] in "]}":
            return at if token[0][0] == "<" else token.end()
    return at


def _no_duplicates(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is not JSON")
    return float(number)


# ---------------------------------------------------------------- the two formats

_CLOSER = re.compile(r"\s*(?:```\s*)?(</tool_call>)")
_STOP = re.compile(r"(</tool_call>)|(?=<tool_call>)|\Z")
_UNCLOSED = "The tool call has no closing </tool_call>."


@dataclass(frozen=True)
class CallFormat:
    """How a template writes calls: `write` a call, `read` one behind <tool_call>, and its end."""

    lead: str = "\n"  # between what a turn says and its first call
    between: str = "\n"  # between two calls
    trail: str = ""  # between the last call and the end of the turn
    form = ""  # what the agent is told to write


class HermesCalls(CallFormat):
    """JSON: Hermes, Qwen2.5, Qwen3 and many others."""

    form = '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'

    def write(self, name: str, arguments: dict) -> str:
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{call}\n</tool_call>"

    def read(self, text: str, at: int, kinds: dict) -> tuple[Call, int]:
        stop, problem = _STOP.search(text, at), _UNCLOSED
        # behind the first whole object; else up to the next tag, wherever it stands
        for end in (_CLOSER.match(text, _json_end(text, at)), stop):
            try:
                if end and end[0]:
                    return _call_of(*read_json(text[at : end.start(1)])), end.end()
            except ValueError as error:
                problem = f"The tool call is not valid JSON: {str(error)[:200]}"
        return Call(problem=problem if stop[0] else _UNCLOSED), stop.end()


def _call_of(value, repaired: bool) -> Call:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return Call(problem='A tool call is {"name": ..., "arguments": {...}}.')
    given = [key for key in ("arguments", "parameters") if value.get(key) is not None]
    if len(given) > 1:
        return Call(name, problem=f"The call of {name} has both arguments and parameters.")
    arguments = value[given[0]] if given else {}
    if isinstance(arguments, str):  # quoted once too often
        try:
            arguments, repaired = read_json(arguments)[0], True
        except ValueError:
            return Call(name, problem=f"The arguments of {name} are not a JSON object.")
    if isinstance(arguments, dict):
        return Call(name, arguments, repaired=repaired or given == ["parameters"])
    kind = type(arguments).__name__
    return Call(name, arguments, f"The arguments of {name} are a JSON object, not {kind}.")


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_NEXT = r"(?=\s*(?:<parameter=|</function>))"
_PARAMETER = re.compile(rf"\s*<parameter=([^>\n]+)>(.*?)</parameter>{_NEXT}", re.S)
_XML_END = re.compile(r"\s*</function>\s*</tool_call>")
_LITERALS = {"True": "true", "False": "false", "None": "null"}  # some templates write Python's


class XmlCalls(CallFormat):
    """<function=…><parameter=…>: Qwen3-Coder, Qwen3.5, Nemotron 3. The schema says what is JSON."""

    form = "<tool_call>\n<function=name>\n<parameter=name>\nvalue\n</parameter>\n</function>"
    form += "\n</tool_call>"

    def write(self, name: str, arguments: dict) -> str:
        lines = ["<tool_call>", f"<function={name}>"]
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines += [f"<parameter={key}>", text, "</parameter>"]
        return "\n".join([*lines, "</function>", "</tool_call>"])

    def read(self, text: str, at: int, kinds: dict) -> tuple[Call, int]:
        function, pairs = _FUNCTION.match(text, at), []
        end = function.end() if function else at
        name = function[1].strip() if function else ""
        while function and (parameter := _PARAMETER.match(text, end)):
            key, value = parameter[1].strip(), parameter[2].removeprefix("\n").removesuffix("\n")
            pairs.append((key, _typed(value, kinds.get(name), key)))
            end = parameter.end()
        closer = _XML_END.match(text, end) if function else None
        if closer and len(dict(pairs)) == len(pairs):
            return Call(name, dict(pairs)), closer.end()
        if closer:
            return Call(name, problem=f"The call of {name} has a parameter twice."), closer.end()
        stop = _STOP.search(text, at)
        problem = f"A tool call is {self.form}" if stop[0] else _UNCLOSED
        return Call(name, problem=problem), stop.end()


def _typed(value: str, kinds: dict | None, key: str):
    """A parameter's value by its schema; without one lists and objects are read, others texts."""
    kind = (kinds or {}).get(key)
    try:
        decoded, _ = read_json(_LITERALS.get(value.strip(), value))
    except ValueError:
        return value
    is_text = "string" in kind if kind else not isinstance(decoded, (dict, list))
    return value if is_text else decoded


HERMES = HermesCalls()
FORMATS = (HERMES, XmlCalls())


# ---------------------------------------------------------------- a turn

_MARK = re.compile(r"</?think>|<tool_call>")
_BARE = re.compile(r"""\{\s*["']name["']\s*:|["'](?:arguments|parameters)["']\s*:|<function=""")


def read_turn(text: str, form: CallFormat = HERMES, tools: list[dict] = ()) -> Turn:
    """The calls and the answer of a turn, its thoughts left out. A call that is only rehearsed in
    the thoughts is nothing where a call or an answer follows; else the agent is told."""
    kinds = {}  # {tool: {parameter: JSON type or None}}
    for tool in (tool["function"] for tool in tools):
        properties = (tool.get("parameters") or {}).get("properties") or {}
        kinds[tool["name"]] = {key: schema.get("type") for key, schema in properties.items()}
    calls, spans, said, rehearsed = _scan(text, form, kinds)
    answer = last_boxed(said)
    if not calls and answer is None:
        if "</tool_call>" in said or _BARE.search(said):
            calls = [Call(problem="The tool call has no opening <tool_call>.")]
        elif rehearsed or _BARE.search(text):
            cure = "write it after </think>"
            calls = [Call(problem=f"A tool call in the thoughts is not made: {cure}.")]
    return Turn(calls, answer, spans)


def made_up_result(text: str, form: CallFormat) -> int | None:
    """Where the model begins to write a tool result itself; inside a call it is only a text."""
    starts = [match.start() for match in re.finditer("<tool_response>", text)]
    turn = read_turn(text if starts else "", form)
    quoted = [span for span, call in zip(turn.spans, turn.calls) if not call.problem]
    return next((at for at in starts if not any(a < at < b for a, b in quoted)), None)


def _scan(text: str, form: CallFormat, kinds: dict):
    """-> (calls, their spans, text outside of thoughts and calls, does one stand in thoughts?)."""
    calls, spans, said = [], [], []
    at = begin = tries = 0  # reading one may take time in proportion to the turn
    thinking = tagged = rehearsed = False
    while mark := _MARK.search(text, at):
        at = mark.end()
        if mark[0] == "<tool_call>":
            tries += 1
            call, end = Call(problem=f"A turn has at most {MAX_CALLS} calls."), len(text)
            if tries <= MAX_CALLS:
                call, end = form.read(text, at, kinds)
            if thinking:
                rehearsed, at = True, at if call.problem else end
                continue
            said.append(text[begin : mark.start()])
            calls.append(call)
            spans.append((mark.start(), end))
            begin = at = end
        elif mark[0] == "<think>":
            if not thinking:
                said.append(text[begin : mark.start()])
            thinking = tagged = True
        elif thinking:
            thinking, begin = False, at
        elif not tagged and text[at:].strip():  # thoughts that the template or the server opened
            rehearsed, tagged, begin = rehearsed or bool(calls), True, at
            calls, spans, said = [], [], []
        else:  # a stray closer
            said.append(text[begin : mark.start()])
            begin = at
    if not thinking:
        said.append(text[begin:])
    return calls, spans, "\n".join(said), rehearsed
