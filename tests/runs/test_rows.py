"""JSONL files by byte offsets, the check of RL rows, and the stateless cursor over rows."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from reagent.rows import (
    JsonlRows,
    batch_indices,
    check_rl_row,
    seed_of,
    sft_messages,
    sft_tools,
    shown_question,
)
from sft import check_row

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
RL_ROW = {"id": "a", "question": "q", "answer": "1", "kind": "math"}


@pytest.fixture
def write(tmp_path):
    def write_text(text: str | bytes) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write_text


# ---------------------------------------------------------------- JsonlRows


def test_rows_come_back_in_any_order(write):
    rows = [{"id": i, "text": "ü🦜\u2028" * i} for i in range(50)]
    read = JsonlRows(write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows)))
    assert len(read) == 50 and list(read) == rows
    assert [read[i] for i in (49, 0, -1, 25)] == [rows[i] for i in (49, 0, 49, 25)]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows(write):
    assert list(JsonlRows(write('\ufeff{"id": 1}\r\n\r\n  \n{"id": 2}\r\n\n'))) == [
        {"id": 1},
        {"id": 2},
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"id": 1}\n\n{"id": 2, "te', "rows.jsonl:3: not a JSON line"),
        (b'{"id": 1}\n{"id": "\xff"}\n', "rows.jsonl:2: not a JSON line"),
        ("[" * 100_000, "rows.jsonl:1: not a JSON line"),
        ('{"id": 1}\n[2]\n', "rows.jsonl:2: a row is an object, not list"),
        ('{"id": "x"}\n{"id": "y"}\n{"id": "x"}\n', "rows.jsonl:3: id 'x' stands in line 1 too"),
        ('{"id": [1]}\n{"id": [1]}\n', "rows.jsonl:2: id .1. stands in line 1 too"),
    ],
)
def test_a_line_that_cannot_be_read_is_an_error_that_names_file_and_line(write, text, problem):
    with pytest.raises(SystemExit, match=problem):
        JsonlRows(write(text))


def test_a_row_that_fails_the_check_is_an_error_that_names_file_and_line(write):
    with pytest.raises(SystemExit, match="rows.jsonl:3: 'kind' is 'essay'"):
        path = write(
            "\n\n".join(json.dumps(row) for row in (RL_ROW, {**RL_ROW, "id": "b", "kind": "essay"}))
        )
        JsonlRows(path, check_rl_row)


def test_different_ids_with_one_python_hash_are_two_rows(write):
    assert hash(-1) == hash(-2) and hash(1) == hash(1.0)
    assert (
        len(JsonlRows(write('{"id": -1}\n{"id": -2}\n{"id": 1}\n{"id": 1.0}\n{"id": "1"}\n'))) == 5
    )


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_ends_the_program_with_the_hint(write, text):
    with pytest.raises(SystemExit, match="rows.jsonl is empty: run prepare.py"):
        JsonlRows(write(text), hint="run prepare.py")


def test_a_missing_file_ends_the_program_with_the_hint(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):  # a folder is no file
        with pytest.raises(SystemExit, match=f"no file {path}: run prepare.py"):
            JsonlRows(path, hint="run prepare.py")


@pytest.mark.slow
def test_a_million_rows_open_within_a_minute_and_100_megabytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for i in range(1_000_000):
            file.write(
                json.dumps({**RL_ROW, "id": f"row-{i}", "question": f"How much is {i} + 1? " * 10})
                + "\n"
            )
    script = f"""
import time
from reagent.rows import JsonlRows, check_rl_row
def peak():  # of this program alone: ru_maxrss has the one's that started it
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
before, start = peak(), time.process_time()
rows = JsonlRows({str(path)!r}, check_rl_row)
print(time.process_time() - start, peak() - before, rows[999_999]["id"])
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    seconds, megabytes, last = run.stdout.split()
    print(f"{seconds} CPU seconds, {megabytes} MB")
    assert last == "row-999999" and float(seconds) < 60 and float(megabytes) < 100, run.stdout


def test_rows_need_no_torch_to_be_read():
    script = (
        "import sys, reagent.rows, reagent.config, reagent.chat; print([name for name in ('torch', "
        "'transformers', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.strip() == "[]"


# ---------------------------------------------------------------- RL rows


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"answer": ["1", "one"]},
        {"docs": []},
        {"docs": [{"title": "t", "text": ""}]},
        {"files": ["a.png"]},
        {"id": 0},
        {"meta": {"level": 1}},
        {"docs": None, "files": None, "meta": None},
        {"meta": {"a": [[{}]]}},
    ],
)
def test_good_rl_rows_pass(more):
    assert check_rl_row({**RL_ROW, **more}) is None


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"id": None}, "needs 'id'"),
        ({"question": ""}, "needs 'question'"),
        ({"answer": []}, "needs 'answer'"),
        ({"question": ["q"]}, "'question' is a text"),
        ({"answer": 42}, "a text or a list of texts"),
        ({"answer": ["1", None]}, "a text or a list of texts"),
        ({"answer": " "}, "a text or a list of texts"),
        ({"kind": None}, "math, qa, gaia or choice"),
        ({"docs": "text"}, "'docs' is a list"),
        ({"docs": [{"title": "t"}]}, "'docs' is a list"),
        ({"docs": [{"title": "t", "text": None}]}, "'docs' is a list"),
        ({"files": "a.png"}, "'files' is a list"),
        ({"files": [1]}, "'files' is a list"),
        ({"files": ["a\0"]}, "'files' is a list"),
        ({"docs": 0}, "'docs' is a list"),
        ({"id": [1]}, "'id' is a text"),
        ({"id": True}, "'id' is a text"),
        ({"id": 1.5}, "'id' is a text"),
        ({"id": "\ud800"}, "'id' is a text"),
        ({"files": ["\ud800"]}, "'files' is a list"),
        ({"meta": [1]}, "'meta' is an object"),
        ({"meta": "x"}, "'meta' is an object"),
        ({"meta": json.loads('{"a": ' + "[" * 400 + "]" * 400 + "}")}, "'meta' is an object"),
    ],
)
def test_a_bad_rl_row_gets_a_text_that_names_the_key(more, problem):
    assert problem in check_rl_row({**RL_ROW, **more})


def test_a_question_without_files_is_shown_as_it_is():
    assert shown_question({"question": "q", "files": None}) == "q"


# ---------------------------------------------------------------- SFT rows


ASKED = {"role": "user", "content": "q"}
SEARCH = {"name": "search", "arguments": {"queries": ["a"]}}
SCHEMA = {"name": "search", "parameters": {"type": "object", "properties": {"queries": {}}}}


def said(row: dict) -> list[tuple]:
    assert check_row(row) is None
    return [
        (m["role"], m["content"], m.get("reasoning_content", ""), m.get("tool_calls", []))
        for m in sft_messages(row)
    ]


LAYOUTS = {
    "messages": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [{"function": SEARCH}]},
            {"role": "tool", "tool_call_id": "x", "name": "search", "content": "r"},
            {"role": "assistant", "content": "done"},
        ]
    },
    "arguments as text": {
        "messages": [
            ASKED,
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": SEARCH}],
            },
            {"role": "tool", "content": [{"type": "text", "text": "r"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "do"}, {"text": "ne"}]},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(SEARCH)},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "done"},
        ]
    },
    "a text of turns": {
        "messages": json.dumps(
            [
                ASKED,
                {"role": "assistant", "content": "", "tool_calls": [{"function": SEARCH}]},
                {"role": "environment", "content": "r"},
                {"role": "assistant", "content": "done"},
            ]
        )
    },
    "ms-swift": {
        "tools": json.dumps([{"type": "function", "function": SCHEMA}]),
        "messages": [
            ASKED,
            {"role": "tool_call", "content": json.dumps(SEARCH)},
            {"role": "tool_response", "content": "r"},
            {"role": "assistant", "content": "done"},
        ],
    },
    "LLaMA-Factory's v1": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
            {"role": "assistant", "tool_calls": [{"function": SEARCH}], "loss_weight": 1.0},
            {"role": "tool", "content": [{"type": "text", "value": "r"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "done"}]},
        ]
    },
    "Hermes's tags of results": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(SEARCH)},
            {"from": "tool", "value": "<tool_response>\nr\n</tool_response>\n"},
            {"from": "gpt", "value": "done"},
        ]
    },
    "Llama": {
        "messages": [
            ASKED,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": SEARCH}]},
            {"role": "ipython", "content": "r"},
            {"role": "assistant", "content": "done"},
        ]
    },
    "the call of before": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "function_call": SEARCH},
            {"role": "function", "name": "search", "content": "r"},
            {"role": "assistant", "content": "done"},
        ]
    },
    "parquet": {
        "instruction": None,
        "messages": [
            {"role": "user", "content": "q", "tool_calls": None, "name": None},
            {
                "role": "assistant",
                "content": None,
                "name": None,
                "tool_calls": [
                    {"function": {"name": "search", "arguments": {"queries": ["a"], "code": None}}}
                ],
            },
            {"role": "tool", "content": "r", "tool_calls": None, "name": "search"},
            {"role": "assistant", "content": "done", "tool_calls": None, "name": None},
        ],
        "tools": None,
        "images": [],
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_call_and_its_result_in_every_layout(name):
    user, call, result, answer = said(LAYOUTS[name])
    assert user[:2] == ("user", "q") and result[:2] == ("tool", "r")
    assert call[0] == "assistant" and not call[1] and answer[:2] == ("assistant", "done")
    (made,) = call[3]
    assert (made["name"], made["arguments"]) == ("search", {"queries": ["a"]})


def test_what_is_said_before_a_sharegpt_call_stands_in_its_turn():
    calls = [SEARCH, {"name": "other", "arguments": None}]
    for before in ("", "<think>\nhm\n</think>"):
        turns = [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "let me"},
            {"from": "function_call", "value": before + json.dumps(calls)},
        ]
        (_, (_, text, _, made)) = said({"conversations": turns})
        assert text == "\n".join(filter(None, ("let me", before)))
        assert [call["name"] for call in made] == ["search", "other"]
    (_, (_, text, _, made)) = said({"conversations": [turns[0], turns[2]]})
    assert text == "<think>\nhm\n</think>" and len(made) == 2
    raw = {"from": "function_call", "value": "<tool_call>{}</tool_call>"}
    assert said({"conversations": [turns[0], raw]})[1][1] == "<tool_call>{}</tool_call>"


def test_turns_of_calls_one_after_another_are_one_turn():
    calls = [{"role": "tool_call", "content": json.dumps(SEARCH)}] * 2
    results = [{"role": "tool_response", "content": text} for text in ("r", "s")]
    first = {"role": "assistant", "content": "<think>hm</think>"}
    for before in ([], [first]):
        turns = said({"messages": [ASKED, *before, *calls, *results, ASKED | {"content": "w"}]})
        assert [turn[0] for turn in turns] == ["user", "assistant", "tool", "tool", "user"]
        assert turns[1][1] == "".join(turn["content"] for turn in before)
        assert [made["name"] for made in turns[1][3]] == ["search", "search"]


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_three_names(key):
    row = {"messages": [ASKED, {"role": "assistant", "content": "a", key: "hm"}]}
    assert said(row)[1] == ("assistant", "a", "hm", [])


def test_alpaca_rows_with_history_system_and_input():
    row = {"instruction": "do", "input": "this", "output": "done", "system": "s"}
    assert [turn[:2] for turn in said(row | {"history": [["a", "b"]]})] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]
    assert len(said(row | {"history": None, "input": None})) == 3


def test_a_developer_is_a_system_and_a_system_key_is_its_first_turn():
    turns = [{"role": "developer", "content": "s"}, ASKED, {"role": "assistant", "content": "a"}]
    assert said({"messages": turns})[0][:2] == ("system", "s")
    assert said({"messages": turns[1:], "system": "s"})[0][:2] == ("system", "s")


def test_tags_of_results_go_where_they_enclose_them_alone():
    both = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    page = "It says <tool_response>x</tool_response>."
    for given, kept in ((both, "1\n2"), (page, page)):
        turns = [ASKED, {"role": "assistant", "content": "a"}, {"role": "tool", "content": given}]
        assert said({"messages": turns})[2][:2] == ("tool", kept)


@pytest.mark.parametrize(
    "key", ["loss", "weight", "loss_mask", "loss_weight", "trainable", "train"]
)
def test_a_turn_may_be_marked_as_not_trained(key):
    for mark in (0, False, 1, True):
        turns = [ASKED, {"role": "assistant", "content": "a", key: mark}]
        turns += [ASKED | {key: 0}, {"role": "assistant", "content": "b"}]
        trained = [m.get("trained") for m in sft_messages({"messages": turns})]
        assert trained == [None, bool(mark), None, True]
    assert "no assistant turn to train on" in check_row({"messages": [ASKED, turns[1] | {key: 0}]})


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": SCHEMA}],
        [SCHEMA],
        [{"type": "function", **SCHEMA}],
        json.dumps([SCHEMA]),
        [json.dumps(SCHEMA)],
        [{"type": "function", "function": SCHEMA | {"strict": None}, "name": None}],
    ],
)
def test_tools_as_schemas_bare_or_wrapped_or_json(tools):
    for key, other in (("tools", "functions"), ("functions", "tools")):
        row = {key: tools, other: None}
        assert sft_tools(row) == [{"type": "function", "function": SCHEMA}]


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools):
    assert sft_tools({"tools": tools}) == []


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ("hello", "message 1"),
        ({"role": "bot", "content": "a"}, "message 1: the role"),
        ({"role": "assistant", "content": 7}, "message 1: 'content' is a text, not int"),
        ({"role": "assistant", "content": None}, "message 1: .*holds nothing"),
        ({"role": "assistant", "content": "a", "audio": {"id": 1}}, "message 1: .*'audio'"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "message 1: .*no text"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a", "train": False}]},
            "message 1: .*mask of its own",  # axolotl's
        ),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "message 1: .*0.5"),
        ({"role": "assistant", "content": "a", "loss": "no"}, "message 1: .*'no'"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "message 1: .*'name'"),
        ({"role": "assistant", "tool_calls": ["search"]}, "message 1"),
        ({"role": "assistant", "tool_calls": [SEARCH | {"arguments": "{"}]}, "message 1: .*JSON"),
        ({"role": "assistant", "tool_calls": [SEARCH | {"arguments": "[]"}]}, "message 1: .*obj"),
        ({"role": "assistant", "content": "a", "reasoning": "b", "thinking": "c"}, "twice"),
        ({"role": "assistant", "content": "a", "reasoning": ["b"]}, "message 1"),
        ({"role": "function_call", "content": "search a"}, "message 1: .*Expecting value"),
        ({"role": "function_call", "content": None}, "message 1"),
    ],
)
def test_a_turn_that_is_not_understood_is_refused_at_opening(write, turn, problem):
    row = {"messages": [ASKED, turn]}
    with pytest.raises(SystemExit, match=f"rows.jsonl:1: .*{problem}"):
        JsonlRows(write(json.dumps(row)), check_row)


@pytest.mark.parametrize(
    "more",
    [
        {"images": ["a.png"]},
        {"label": False},
        {"kto_tag": False},
        {"tools": "search"},
        {"tools": [{"description": "x"}]},
        {"tools": 7},
        {"messages": "[]"},
        {"messages": None},
        {"system": "s", "messages": [{"role": "system", "content": "t"}, ASKED, ASKED]},
        {"messages": None, "instruction": "a", "output": "b", "history": ["x"]},
        {"messages": None, "instruction": 1, "output": "b"},
    ],
)
def test_a_row_that_is_not_understood_is_refused_at_opening(write, more):
    row = {"messages": [ASKED, {"role": "assistant", "content": "a"}]}
    with pytest.raises(SystemExit, match="rows.jsonl:1: "):
        JsonlRows(write(json.dumps(row | more)), check_row)


def test_a_reply_that_is_called_good_is_trained():
    row = {"messages": [ASKED, {"role": "assistant", "content": "a"}]}
    for label in (True, 0, 1, "x", None):
        assert said(row | {"label": label})[1][:2] == ("assistant", "a")


# ---------------------------------------------------------------- the cursor


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_holds_every_row_once(n, batch):
    epochs = 2 * batch  # steps cross the seams of the epochs
    stream = [i for step in range(2 * n) for i in batch_indices(step, batch, n, seed=0)]
    for epoch in range(epochs):
        assert Counter(stream[epoch * n : (epoch + 1) * n]) == Counter(range(n))


def test_a_step_depends_on_nothing_but_its_number():
    forwards = [batch_indices(step, 4, 10, seed=3) for step in range(20)]
    assert [batch_indices(step, 4, 10, seed=3) for step in reversed(range(20))] == forwards[::-1]


def test_the_order_is_that_of_other_processes():
    script = (
        "from reagent.rows import batch_indices; print([batch_indices(s, 5, 1000, 1) for s in "
        "range(3)])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] == f"{[batch_indices(s, 5, 1000, 1) for s in range(3)]}\n"


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(batch_indices(epoch, 50, 50, seed)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_a_step_within_an_epoch_has_no_row_twice():
    assert all(len(set(batch_indices(step, 8, 2000, seed=0))) == 8 for step in range(250))


# ---------------------------------------------------------------- real rows


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real rows here")
def test_real_files_open_with_every_line():
    for path in sorted(SHARED.glob("*/*.jsonl")):
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        assert list(JsonlRows(path)) == lines


def test_every_part_of_a_seed_counts_and_where_one_ends():
    parts = (0, 1, "task", 2)
    others = [parts[:i] + (9,) + parts[i + 1 :] for i in range(4)]
    others += [parts[:-1], (*parts, 0), ("01", "task", 2), (0, 1, "task2"), parts[::-1]]
    seeds = {seed_of(*each) for each in (parts, *others)}
    assert len(seeds) == 10 and all(0 <= seed < 2**62 for seed in seeds)
    assert seed_of(*parts) == seed_of(0, 1, "task", 2)
