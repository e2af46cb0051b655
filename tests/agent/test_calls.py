"""What is read in a turn: calls in both formats, slips that are mended, thoughts, answers."""

import json
import time
from pathlib import Path

import pytest

from reagent.calls import FORMATS, HERMES, MAX_CALLS, read_turn
from toolkit.text import after_thoughts

CASES = Path(__file__).parents[1] / "cases" / "turns.jsonl"
XML = FORMATS[1]
SCHEMA = {
    "queries": {"type": "array", "items": {"type": "string"}},
    "code": {"type": "string"},
    "top_k": {"type": "integer"},
    "fresh": {"type": "boolean"},
    "note": {"type": ["string", "null"]},
}
TOOLS = [
    {"type": "function", "function": {"name": "search", "parameters": {"properties": SCHEMA}}},
    {"type": "function", "function": {"name": "bare", "parameters": None}},
]
TAGS = "</think> <think> </tool_call> <tool_call> <tool_response> ```"


def call(arguments: str, name: str = "search") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def only(text: str, form=HERMES):
    (read,) = read_turn(text, form, TOOLS).calls
    return read


# ---------------------------------------------------------------- calls that are read


def test_the_cases():
    for line in CASES.read_text().splitlines():
        case = json.loads(line)
        turn = read_turn(case["turn"])
        problems = [read.problem for read in turn.calls]
        if case["expected"] == "call":
            assert problems == [""], case
        elif case["expected"] == "observation":
            assert len(problems) == 1 and problems[0], case
        else:
            assert not problems and turn.answer in case["expected"].split(", ")[0].split(" or ")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"queries": ["a", 'ü "b" \\ \n\t']},
        {"code": "if a < b:\n\n    print('</tool_call>')\n"},
        {"code": "", "top_k": 3, "fresh": True},
        {"code": "3"},
        {"code": '{"a": [1]}', "note": "null"},
        {"queries": [TAGS], "code": TAGS},
    ],
)
def test_what_is_written_is_read_back(form, arguments):
    text = form.write("search", arguments)
    for whole in (text, f"<think>hm</think>\n\n{text}", f"so:\n{text}\n"):
        read = only(whole, form)
        assert (read.name, read.arguments, read.problem) == ("search", arguments, "")
        assert not read.repaired


@pytest.mark.parametrize("form", FORMATS)
def test_several_calls_come_in_their_order_with_their_places(form):
    a, b = form.write("search", {"code": "a"}), form.write("search", {"code": TAGS})
    text = f"one {a}two\n{b}\n"
    turn = read_turn(text, form, TOOLS)
    assert [read.arguments["code"] for read in turn.calls] == ["a", TAGS]
    assert [text[i:j] for i, j in turn.spans] == [a, b]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (call('{"code": "x\n\ty"}'), {"code": "x\n\ty"}),
        (call('{"code": "x\r\ny"}'), {"code": "x\r\ny"}),
        (call(r'{"code": "\d+ \s \( \'"}'), {"code": r"\d+ \s \( \'"}),
        (call(r'{"code": "\\d \u00e9 \uZZ"}'), {"code": r"\d é \uZZ"}),
        (call('{"code": "a",}'), {"code": "a"}),
        (call('{"queries": ["a, ]", ], }'), {"queries": ["a, ]"]}),
        (call('{"code": "a"},'), {"code": "a"}),
        ('<tool_call>\n```json\n{"name": "search", "arguments": {}}\n```\n</tool_call>', {}),
        ('<tool_call>```{"name": "search", "arguments": {}}```</tool_call>', {}),
        ('<tool_call>{"name": "search", "parameters": {"top_k": 1}}</tool_call>', {"top_k": 1}),
        (call(json.dumps('{"code": "</tool_call>"}')), {"code": "</tool_call>"}),
        (call('{"code": "</tool_call>",}'), {"code": "</tool_call>"}),
    ],
)
def test_a_slip_that_leaves_the_meaning_clear_is_mended_and_counted(text, arguments):
    read = only(text)
    assert (read.name, read.arguments, read.problem, read.repaired) == (
        "search",
        arguments,
        "",
        True,
    )


@pytest.mark.parametrize("text", [call("null"), '<tool_call>{"name": "search"}</tool_call>'])
def test_a_call_without_arguments_has_none(text):
    assert (only(text).arguments, only(text).problem) == ({}, "")


# ---------------------------------------------------------------- calls that are not


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<tool_call>{"name": "search"', "no closing"),
        (call("{}").removesuffix("</tool_call>"), "no closing"),
        (call("{'code': 1}"), "not valid JSON"),
        (call('{"code": "print("a")"}'), "not valid JSON"),
        (call('{"code": NaN}'), "not valid JSON"),
        (call('{"code": 1e999}'), "1e999 is not JSON"),
        (call('{"code": ' + "9" * 5000 + "}"), "not valid JSON"),
        (call('{"code": 1, "code": 2}'), "appears twice"),
        (call('{"code": "a",,}'), "not valid JSON"),
        (call('{"code": "a"}').replace("}}", "}"), "not valid JSON"),
        (call('{"code": "a"}} extra {'), "not valid JSON"),
        ("<tool_call></tool_call>", "not valid JSON"),
        (f"<tool_call>[{call('{}')[11:-12]}]</tool_call>", "A tool call is"),
        ('<tool_call>{"arguments": {}}</tool_call>', "A tool call is"),
        (call('""'), "not a JSON object"),
        (call('"[1]"'), "JSON object, not list"),
        (call("7"), "JSON object, not int"),
        ('<tool_call>{"name": "s", "arguments": {}, "parameters": {"a": 1}}</tool_call>', "both"),
        (call("[" * 500 + "]" * 500), "nested more than"),
        (call(json.dumps('{"a": ' + "[" * 500 + "]" * 500 + "}")), "not a JSON object"),
        (call("[" * 100_000), "nested more than"),
    ],
)
def test_a_call_that_cannot_be_read_is_told(text, problem):
    assert problem in only(text).problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>\n<function=search>\n</function>", "no closing"),
        ("<tool_call>\n<function=search>\n<parameter=code>\na\n</function>\n</tool_call>", "is <"),
        ("<tool_call>\n<function=>\n</function>\n</tool_call>", "A tool call is <tool_call>"),
        (call("{}"), "A tool call is <tool_call>"),
        (XML.write("search", {"code": "a"}).replace("</function>", ""), "A tool call is"),
        (
            "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter>"
            "</function></tool_call>",
            "twice",
        ),
    ],
)
def test_an_xml_call_that_cannot_be_read_is_told(text, problem):
    assert problem in only(text, XML).problem


def test_one_broken_call_leaves_the_next_whole():
    broken = call('{"code": "say "hi}')
    calls = read_turn(broken + call('{"code": "b"}')).calls
    assert calls[0].problem and calls[1].arguments == {"code": "b"}


@pytest.mark.parametrize(
    ("value", "kinds", "read"),
    [
        ("True", True, True),
        ("None", True, None),
        ("[1, 2", True, "[1, 2"),
        ("7", False, "7"),
        ('["a"]', False, ["a"]),
    ],
)
def test_the_schema_says_what_is_a_text_in_xml(value, kinds, read):
    name = "search" if kinds else "unknown"
    text = (
        f"<tool_call><function={name}><parameter=fresh>{value}</parameter></function></tool_call>"
    )
    assert only(text, XML).arguments == {"fresh": read}


# ---------------------------------------------------------------- turns without a whole call


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("end", ["</think>", "</think>\n\nI will search.", ""])
def test_a_call_that_stands_only_in_the_thoughts_is_told(form, end):
    read = only(f"<think>plan {form.write('search', {'code': 'a'})}{end}", form)
    assert "thoughts" in read.problem


@pytest.mark.parametrize("made", [call("{}"), call("7"), "<tool_call>[]</tool_call>"])
def test_a_call_in_thoughts_that_were_opened_elsewhere_is_told(made):
    assert "thoughts" in only(f"plan {made}</think>\n\nI will search.").problem


@pytest.mark.parametrize(
    "text",
    [
        call("{}").removeprefix("<tool_call>"),
        call("{}")[11:-12],
        f"```json{call('{}')[11:-12]}```",
        '{"name": "search", "parameters": {"a": 1}}',
        "{'name': 'search', 'arguments': {}}",
        '[{"arguments": {}, "name": "search"}]',
        "<think>hm</think>" + call("{}")[11:-12],
        "<function=search>\n</function>\n</tool_call>",
    ],
)
def test_a_call_that_lacks_its_tags_is_told(text):
    for form in FORMATS:
        assert "opening" in only(text, form).problem


def test_bare_json_in_the_thoughts_alone_is_told():
    assert "thoughts" in only(f"<think>{call('{}')[11:-12]}</think>").problem


@pytest.mark.parametrize("rehearsed", [call("{}"), call("{'a'}"), "<tool_call>", call("{}")[11:]])
def test_a_call_rehearsed_before_a_call_or_an_answer_is_nothing(rehearsed):
    thoughts = f"<think>so {rehearsed} or so</think>"
    turn = read_turn(f"{thoughts}\\boxed{{5}}")
    assert (turn.calls, turn.answer) == ([], "5")
    assert only(thoughts + call('{"code": "a"}')).arguments == {"code": "a"}


def test_thoughts_may_stand_between_calls_and_have_been_opened_elsewhere():
    a, b = call('{"code": "a"}'), call('{"code": "b"}')
    for text in (f"<think>x</think>{a}<think>y</think>{b}", f"{a}<think>{a}</think>{b}"):
        assert [read.arguments["code"] for read in read_turn(text).calls] == ["a", "b"]
    assert only(f"x {a} y</think>{b}").arguments == {"code": "b"}
    assert only(f"<think>x</think>{a}</think>").arguments == {"code": "a"}


def test_a_rehearsed_string_does_not_end_the_thoughts():
    quoted = call('{"code": "</think>"}')
    turn = read_turn(f"<think>{quoted} {call('{}')}</think>\\boxed{{2}}")
    assert (turn.calls, turn.answer) == ([], "2")


def test_the_calls_of_a_turn_are_bounded():
    calls = read_turn(call("{}") * (MAX_CALLS + 9)).calls
    assert len(calls) == MAX_CALLS + 1 and "at most" in calls[-1].problem


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>"' * 8000,
        "<tool_call>" * 8000,
        '<tool_call>{"a": "\\"' * 3000,
        "<think>" + '<tool_call>{"a":' * 6000,
        "<tool_call><function=x>" + "<parameter=a>" * 6000,
        "<tool_call>" + "{" * 100_000,
        "</think>" * 10_000,
        "<tool_call>" + ", " * 50_000 + "</tool_call>",
        "\\boxed{" * 10_000,
    ],
)
def test_reading_takes_no_long_time_whatever_a_turn_holds(text):
    began = time.process_time()
    for form in FORMATS:
        read_turn(text, form)
    assert time.process_time() - began < 3


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{a}", "a"),
        ("\\boxed{a} then \\boxed{b}", "b"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("<think>\\boxed{a}</think>none", None),
        ("<think>\\boxed{a}", None),
        ("</think>\\boxed{a}<think>\\boxed{b}", "a"),
        ("<think>x</think>\\boxed{a}<think>\\boxed{b}</think>", "a"),
        ("<think>x</think>\\boxed{a}</think>", "a"),
        ("\\boxed{a}</think>", "a"),
        ("\\boxed{a}</think>\n\n\\boxed{b}", "b"),
        ("<think>x</think>\\boxed{a} since <think> is a tag", "a"),
        ("\\boxed{a} in the form \\boxed{...}", "a"),
        ("\\boxed{", None),
        ("\\boxed{ }", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_box_outside_of_the_thoughts(text, answer):
    assert read_turn(text).answer == answer


def test_a_box_inside_a_call_is_no_answer():
    assert read_turn(call('{"code": "\\\\boxed{1}"}')).answer is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", "yes"),
        ("<think>no</think>yes", "yes"),
        ("no</think>yes", "yes"),
        ("<think>no</think>yes</think>", "yes"),
        ("<think>no</think>yes<think>hm", "yes"),
        ("<think>no</think>yes<think>hm</think>\n", "yes"),
        ("<think>no", ""),
        ("<think>no</think>", ""),
        ("", ""),
    ],
)
def test_what_is_said_after_the_thoughts(text, said):
    assert after_thoughts(text) == said
