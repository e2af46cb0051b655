"""data/reagent/prepare.py: every layout of the four released sets becomes our records; what does
not is counted with its reason.
"""

import importlib
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from reagent.chat import check_messages
from tests.helpers.rows import jsonl, prepared

reagent = importlib.import_module("data.reagent.prepare")


# ---------------------------------------------------------------- the released sets
CALL = '<tool_call>\n{"name": "search", "arguments": {"queries": ["x"]}}\n</tool_call>'
BLOCKS = "<think>It guessed.</think><critique>Look it up.</critique><score>0.4</score>"
PLAIN = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": CALL},
    {"role": "tool", "content": "found"},
    {"role": "assistant", "content": r"\boxed{a}"},
]
FUNCTION = {"function": {"name": "search", "arguments": '{"queries": ["x"]}'}}
SFT_LAYOUTS = {
    "messages": {"messages": PLAIN},
    "openai calls": {
        "messages": [
            PLAIN[0],
            {"role": "assistant", "content": None, "tool_calls": [FUNCTION]},
            *PLAIN[2:],
        ]
    },
    "responses in user turns": {
        "messages": [
            *PLAIN[:2],
            {"role": "user", "content": "<tool_response>\nfound\n</tool_response>"},
            PLAIN[3],
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": CALL[12:-13]},
            {"from": "observation", "value": "found"},
            {"from": "gpt", "value": r"\boxed{a}"},
        ]
    },
    "text parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *PLAIN[1:]]
    },
    "json text": {"conversations": json.dumps(PLAIN)},
}


def convert(name, record, files_dir=Path("files")):
    return reagent.convert(name, record, "source", 1, files_dir)


@pytest.mark.parametrize("layout", SFT_LAYOUTS)
def test_sft_layouts_become_the_same_messages(layout):
    row = convert("sft", SFT_LAYOUTS[layout])
    assert row == {"messages": PLAIN} and check_messages(row["messages"]) is None


def test_alpaca_rows_with_history_and_system_become_messages():
    record = {
        "instruction": "do",
        "input": "this",
        "output": "done",
        "system": "s",
        "history": [["a", "b"]],
    }
    row = convert("sft", record)
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]


def test_two_responses_in_one_turn_are_two_tool_messages_and_assistant_turns_in_a_row_one():
    both = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    turns = [
        PLAIN[0],
        {"role": "assistant", "content": "hm"},
        PLAIN[1],
        {"role": "user", "content": both},
        PLAIN[3],
    ]
    messages = convert("sft", {"messages": turns})["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [m["content"] for m in messages[1:4]] == ["hm\n" + CALL, "1", "2"]


@pytest.mark.parametrize(
    "given",
    ['[{"type": "function", "function": {"name": "search"}}]', [{"name": "search", "x": None}]],
)
def test_tools_may_be_json_text_or_lack_their_wrapping(given):
    schemas = [{"type": "function", "function": {"name": "search"}}]
    assert convert("sft", {"messages": PLAIN, "tools": given})["tools"] == schemas


@pytest.mark.parametrize(
    "record",
    [
        {
            "instruction": "q",
            "output": f"{CALL}\n<tool_response>\nfound\n</tool_response>\n\\boxed{{a}}",
        },
        {
            "messages": [
                PLAIN[0],
                PLAIN[1],
                {"role": "user", "content": "<tool_response>\nfound\n</tool_response>"},
                PLAIN[3],
            ]
        },
    ],
)
def test_results_inside_a_turn_are_tool_turns_that_nobody_trains(record):
    assert convert("sft", record)["messages"] == PLAIN


def test_text_after_a_result_stays_the_users():
    turns = [
        *PLAIN[:2],
        {"role": "user", "content": "<tool_response>\nfound\n</tool_response>\nGo on."},
        PLAIN[3],
    ]
    found = convert("sft", {"messages": turns})["messages"]
    assert [(m["role"], m["content"]) for m in found[2:4]] == [
        ("tool", "found"),
        ("user", "Go on."),
    ]


def test_keys_that_parquet_adds_to_calls_and_schemas_are_left_out(tmp_path):
    def call(**arguments):
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }

    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    turns = [PLAIN[0], call(queries=["x"]), results[0], call(code="1"), results[1], PLAIN[3]]
    schemas = [
        {"name": "f", "parameters": {"properties": {"queries": {"type": "array"}}}},
        {"name": "g", "parameters": {"properties": {"code": {"type": "string"}}}},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns, "tools": schemas}]), path)
    (row,) = prepared(reagent, tmp_path / "out", path, "--set=sft")
    assert "null" not in json.dumps(row) and row == convert(
        "sft", {"messages": turns, "tools": schemas}
    )


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"text": "raw"}, "unknown layout, keys text"),
        ({"messages": PLAIN[:1]}, "last turn"),
        (3, "not an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, PLAIN[3]]},
            "image or a sound",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": "search(x)"},
                ]
            },
            "not JSON",
        ),
        ({"messages": [{"role": "critic", "content": "q"}, PLAIN[3]]}, "the role is"),
        ({"messages": "[[]]"}, "broken inside"),
    ],
)
def test_sft_records_left_out_have_a_reason(record, reason):
    with pytest.raises(reagent.Unfit, match=reason):
        convert("sft", record)


JUDGED = {
    "question": "q",
    "trajectory": "[user]\nq",
    "think": "It guessed.",
    "critique": "Look it up.",
    "score": 0.4,
}
ASKED = [
    {"role": "system", "content": "judge"},
    {"role": "user", "content": "Question: q\n\nAgent Trajectory: [user]\nq"},
]


@pytest.mark.parametrize(
    "record",
    [
        JUDGED,
        {"question": "q", "trajectory": "[user]\nq", "output": BLOCKS},
        {"messages": [*ASKED, {"role": "assistant", "content": BLOCKS}]},
        {"prompt": ASKED, "response": BLOCKS},
        {"instruction": ASKED[1]["content"], "input": "", "output": BLOCKS},
        {**JUDGED, "score": "0.4"},
        {"prompt": ASKED, "reward_model": {"ground_truth": BLOCKS}},
    ],
)
@pytest.mark.parametrize("name", ["rrm_sft", "rrm_rl"])
def test_judgment_layouts_become_the_same_row(name, record):
    assert convert(name, record) == JUDGED


def test_rows_for_the_judges_rl_need_only_a_score():
    record = {"prompt": ASKED, "reward_model": {"ground_truth": "0.75"}, "is_correct": 1}
    assert convert("rrm_rl", record) == {
        "question": "q",
        "trajectory": "[user]\nq",
        "score": 0.75,
        "correct": True,
    }
    with pytest.raises(reagent.Unfit, match="no analysis or no critique"):
        convert("rrm_sft", record)


def test_rows_for_the_judges_rl_may_have_correctness_and_gold_instead_of_a_score():
    row = convert("rrm_rl", {"question": "q", "trajectory": "t", "correct": False, "answer": "a"})
    assert row == {"question": "q", "trajectory": "t", "correct": False, "answer": ["a"]}


@pytest.mark.parametrize(
    "request_text",
    [
        "You get a question: judge the agent trajectory: be strict.\nQuestion: Who?\nAgent "
        "Trajectory: [user]\nq",
        "**Question:** Who?\n\n**Agent Trajectory:** [user]\nq",
        "## Question:\nWho?\n## Trajectory:\n[user]\nq",
    ],
)
def test_the_labels_of_a_request_stand_at_the_beginning_of_a_line(request_text):
    row = convert("rrm_sft", {"instruction": request_text, "output": BLOCKS})
    assert (row["question"], row["trajectory"]) == ("Who?", "[user]\nq")


def test_a_trajectory_of_messages_stays_a_list_also_as_json_text():
    assert convert("rrm_sft", {**JUDGED, "trajectory": PLAIN})["trajectory"] == PLAIN
    assert convert("rrm_sft", {**JUDGED, "trajectory": json.dumps(PLAIN)})["trajectory"] == PLAIN


@pytest.mark.parametrize(
    "record, reason",
    [
        ({**JUDGED, "score": 7}, "no score"),
        ({**JUDGED, "critique": "use <score>1</score>"}, "tags inside them"),
        ({"question": "q", "trajectory": "t", "output": "fine, 0.4"}, "not the three blocks"),
        ({"prompt": [{"role": "user", "content": "hi"}], "response": BLOCKS}, "Trajectory"),
    ],
)
def test_judgments_left_out_have_a_reason(record, reason):
    with pytest.raises(reagent.Unfit, match=reason):
        convert("rrm_sft", record)


def test_tasks_get_kind_answers_and_source():
    math = reagent.convert(
        "rl", {"question": "1+1?", "ground_truth": 2}, "DeepScaleR_18_6k_5k", 7, Path("files")
    )
    assert math == {
        "id": "DeepScaleR_18_6k_5k-000007",
        "question": "1+1?",
        "answer": ["2"],
        "kind": "math",
        "meta": {"dataset": "DeepScaleR_18_6k_5k"},
    }
    record = {
        "question": "q",
        "ground_truth": ["a", "b", "a"],
        "category": "search",
        "meta_info": {"source": "nq"},
    }
    qa = convert("rl", record)
    assert (qa["kind"], qa["answer"], qa["meta"]) == (
        "qa",
        ["a", "b"],
        {"dataset": "nq", "category": "search"},
    )
    verl = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "a"}}
    assert convert("rl", verl)["answer"] == ["a"]


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"target": ["Paris", "paris"]}, ["Paris", "paris"]),
        ([["a"], "b", 3], ["a", "b", "3"]),
        (True, None),
        ({"x": 1}, None),
    ],
)
def test_answers_are_texts_or_the_task_is_left_out(given, expected):
    record = {"question": "q", "reward_model": {"ground_truth": given}}
    if expected:
        assert convert("rl", record)["answer"] == expected
    else:
        with pytest.raises(reagent.Unfit, match="neither text nor a number"):
            convert("rl", record)


def test_media_are_found_under_files_dir_by_path_or_name_and_never_outside(tmp_path):
    files = tmp_path / "files"
    (files / "images").mkdir(parents=True)
    (files / "images/1.jpg").write_bytes(b"x")
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (files / "link.jpg").symlink_to(tmp_path / "secret.jpg")

    def files_of(path):
        record = {
            "question": "<image>\nq",
            "ground_truth": "a",
            "multimodal_info": {"images": [{"path": path}]},
        }
        return reagent.convert("rl", record, "s", 1, files)

    for path in ("images/1.jpg", "./images/1.jpg", "/data/train/images/1.jpg", "1.jpg"):
        assert files_of(path)["files"] == ["images/1.jpg"] and files_of(path)["question"] == "q"
    for path in ("../secret.jpg", "link.jpg", "images/2.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(reagent.Unfit, match="not under files_dir"):
            files_of(path)
    with pytest.raises(reagent.Unfit, match="namesakes"):  # another set's first image
        files_of("other/1.jpg")
    for given in (
        {"multimodal_info": '{"image": "images/1.jpg"}'},
        {"images": [{"path": "images/1.jpg"}]},
    ):
        found = reagent.convert(
            "rl", {"question": "<image>\nq", "ground_truth": "a", **given}, "s", 1, files
        )
        assert found["files"] == ["images/1.jpg"]
    with pytest.raises(reagent.Unfit, match="names no file"):
        reagent.convert("rl", {"question": "<image>\nq", "ground_truth": "a"}, "s", 1, files)


def test_a_file_whose_media_are_missing_is_counted_and_the_others_are_written(tmp_path, capsys):
    images = jsonl(
        tmp_path / "a.jsonl", [{"question": "q", "ground_truth": "a", "images": ["x.jpg"]}]
    )
    rows = prepared(
        reagent,
        tmp_path / "out",
        images,
        f"--input={jsonl(tmp_path / 'b.jsonl', [{'question': 'q', 'ground_truth': 'a'}])}",
        "--set=rl",
    )
    assert [row["id"] for row in rows] == [
        "b-000001"
    ] and "1 skipped, its media file is not" in capsys.readouterr().out


def test_ids_that_restart_in_every_file_lose_no_question(tmp_path):
    def tasks(*questions):
        return [
            {"id": i, "question": question, "ground_truth": "a"}
            for i, question in enumerate(questions)
        ]

    first, second = (
        jsonl(tmp_path / "a.jsonl", tasks("p", "q")),
        jsonl(tmp_path / "b.jsonl", tasks("p", "r")),
    )
    rows = prepared(reagent, tmp_path / "out", first, f"--input={second}", "--set=rl")
    assert [row["question"] for row in rows] == ["p", "q", "r"] and len(
        {row["id"] for row in rows}
    ) == 3


def test_the_table_is_printed_and_nothing_left_where_a_set_fails(tmp_path, capsys):
    good, bad = jsonl(tmp_path / "a.jsonl", [{"messages": PLAIN}]), tmp_path / "b.jsonl"
    bad.write_text("{")
    with pytest.raises(SystemExit, match="b.jsonl:1: not JSON"):
        prepared(reagent, tmp_path / "out", good, f"--input={bad}", "--set=sft")
    assert "sft: a.jsonl" in capsys.readouterr().out and not list((tmp_path / "out").glob("*"))
    with pytest.raises(SystemExit, match="b.jsonl:1: not JSON"):
        reagent.main(["--set=sft", f"--input={bad}", "--inspect"])


def test_a_lone_surrogate_does_not_end_the_set(tmp_path):
    rows = prepared(
        reagent,
        tmp_path / "out",
        jsonl(tmp_path / "a.jsonl", [{"question": "hi \ud83d", "ground_truth": "a"}]),
        "--set=rl",
    )
    assert rows[0]["question"] == "hi ?"


def test_a_file_of_mixed_records_is_counted_by_reason(tmp_path, capsys):
    path = tmp_path / "DeepScaleR_18_6k_5k.json"
    path.write_text(json.dumps([{"question": "1+1?", "ground_truth": "2"}, {"question": "x"}]))
    assert len(prepared(reagent, tmp_path / "out", path, "--set=rl")) == 1
    assert (
        "rl: DeepScaleR_18_6k_5k.json: 1 skipped, no question or no ground truth"
        in capsys.readouterr().out
    )


def test_a_file_without_a_fitting_record_is_an_error_that_names_its_keys(tmp_path):
    path = jsonl(tmp_path / "odd.jsonl", [{"foo": 1, "bar": 2}])
    with pytest.raises(
        SystemExit, match="none of 1 records fits the set 'sft'.*keys found: bar, foo"
    ):
        prepared(reagent, tmp_path / "out", path, "--set=sft")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_inspect_shows_keys_and_writes_nothing(tmp_path, capsys):
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": PLAIN, "long": "x" * 999}] * 9)
    reagent.main(["--set=sft", f"--input={path}", f"--out={tmp_path / 'out'}", "--inspect"])
    text = capsys.readouterr().out
    assert (
        text.count("-- ") == 3
        and "messages (list): " in text
        and "long (str): " in text
        and len(text) < 4000
    )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the sets as they are handed out

RUBRIC = (
    "You judge agents.\n\nQuestion: what was asked\nTrajectory: what it did\nNever give the answer."
)
RELEASED = (  # the request of the release, with a trajectory as the release writes it
    "Question: Who?\nAnd when?\n\nAgent Trajectory: <think>\nhm\n</think>\n"
    + CALL
    + "\n<tool_response>\nQuestion: none\nfound\n</tool_response>\n\\boxed{a}"
)
FORM = "Question: {question}\n\nAgent Trajectory: {trajectory}"
REVIEW = BLOCKS.replace("It guessed.", "It read <tool_response>found</tool_response>.")
# LLaMA-Factory's layouts (the release names it for its SFT), veRL's for RL
REQUESTS = {
    "alpaca with a system": {
        "system": RUBRIC,
        "instruction": RELEASED,
        "input": "",
        "output": REVIEW,
    },
    "sharegpt": {
        "system": RUBRIC,
        "conversations": [{"from": "human", "value": RELEASED}, {"from": "gpt", "value": REVIEW}],
    },
    "messages": {
        "messages": [
            {"role": "system", "content": RUBRIC},
            {"role": "user", "content": RELEASED},
            {"role": "assistant", "content": REVIEW},
        ]
    },
    "verl": {
        "data_source": "rrm",
        "prompt": [
            {"role": "system", "content": RUBRIC},
            {"role": "user", "content": RELEASED},
        ],
        "ability": "judge",
        "reward_model": {"style": "rule", "ground_truth": REVIEW},
        "extra_info": {"index": 0, "split": "train"},
    },
}


@pytest.mark.parametrize("layout", REQUESTS)
@pytest.mark.parametrize("name", ["rrm_sft", "rrm_rl"])
def test_a_judgment_whose_request_quotes_tool_results_is_read_and_its_prompts_are_written(
    tmp_path, name, layout
):
    path = jsonl(tmp_path / "rows.jsonl", [REQUESTS[layout]] * 2)
    rows = prepared(reagent, tmp_path / "out", path, f"--set={name}")
    question, _, trajectory = RELEASED.partition("\n\nAgent Trajectory: ")
    assert len(rows) == 2 and rows[0]["question"] == question.removeprefix("Question: ")
    assert rows[0]["trajectory"] == trajectory and rows[0]["score"] == 0.4
    assert rows[0]["think"] == "It read <tool_response>found</tool_response>."
    prompts = tmp_path / "out/prompts"
    assert sorted(file.name for file in prompts.iterdir()) == [
        f"{name}.request.txt",
        f"{name}.system.txt",
    ]
    assert (prompts / f"{name}.system.txt").read_text() == RUBRIC
    assert (prompts / f"{name}.request.txt").read_text() == FORM


def test_a_rubric_before_the_request_belongs_to_its_form(tmp_path):
    record = {"instruction": RUBRIC, "input": RELEASED, "output": REVIEW}
    rows = prepared(
        reagent, tmp_path / "out", jsonl(tmp_path / "a.jsonl", [record]), "--set=rrm_sft"
    )
    prompts = tmp_path / "out/prompts"
    assert rows[0]["question"] == "Who?\nAnd when?"
    assert (prompts / "rrm_sft.request.txt").read_text() == RUBRIC + "\n" + FORM
    assert (prompts / "rrm_sft.system.txt").read_text() == ""


def test_the_commonest_prompt_of_the_agent_comes_first_and_each_is_told(tmp_path, capsys):
    def rows(system, count):
        return [{"messages": [{"role": "system", "content": system}, *PLAIN]}] * count

    path = jsonl(
        tmp_path / "a.jsonl", rows("rare", 1) + rows("common {x}", 2) + [{"messages": PLAIN}]
    )
    (tmp_path / "out/prompts").mkdir(parents=True)
    (tmp_path / "out/prompts/sft.system-7.txt").write_text("of an earlier run")
    (tmp_path / "out/prompts/rrm_sft.system.txt").write_text("of another set")
    prepared(reagent, tmp_path / "out", path, "--set=sft")
    texts = {file.name: file.read_text() for file in (tmp_path / "out/prompts").iterdir()}
    assert texts == {
        "sft.system.txt": "common {x}",
        "sft.system-2.txt": "rare",
        "sft.system-3.txt": "",
        "rrm_sft.system.txt": "of another set",
    }
    printed = capsys.readouterr().out
    assert "sft.system.txt: the system prompt of 50.0% of the rows\n" in printed
    assert (
        "sft.system-3.txt: the system prompt of 25.0% of the rows (empty: no system turn)"
        in printed
    )


def test_schemas_inside_the_system_prompt_are_not_given_twice():
    schema = {"type": "function", "function": {"name": "search", "parameters": {}}}
    system = f"Be brief.\n\n# Tools\n<tools>\n{json.dumps(schema)}\n</tools>"
    record = {"system": system, "messages": PLAIN, "tools": [schema]}
    row = convert("sft", record)
    assert "tools" not in row and row["messages"][0] == {"role": "system", "content": system}


def test_the_released_tasks_by_their_files(tmp_path):
    """The four files that the release's preparation reads; their fields are those it reads."""
    files = tmp_path / "files"
    for name in ("images/7.png", "audio/7.wav"):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_bytes(b"x")
    sets = {
        "DeepScaleR_18_6k_5k": ("1+1?", "2", {}),
        "Hiersearch_13k": ("Who?", ["Ada", "Ada the Elder"], {}),
        "OCR_VQA_8k_5k_converted": ("<image>Title?", "Lamps", {"image": "data/images/7.png"}),
        "HeySQuAD_4k_2k_converted": ("<audio>What?", "A lamp", {"audio": ["data/audio/7.wav"]}),
    }
    inputs = []
    for name, (question, gold, media) in sets.items():
        record = {
            "question": question,
            "ground_truth": gold,
            "category": "",
            "multimodal_info": media,
        }
        record["meta_info"] = {"source": name}
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
        inputs.append(f"--input={tmp_path / name}.json")
    rows = prepared(
        reagent, tmp_path / "out", inputs[0][8:], *inputs[1:], "--set=rl", f"--files_dir={files}"
    )
    assert [(row["kind"], row.get("files")) for row in rows] == [
        ("math", None),
        ("qa", None),
        ("qa", ["images/7.png"]),
        ("qa", ["audio/7.wav"]),
    ]
    assert [row["question"] for row in rows] == ["1+1?", "Who?", "Title?", "What?"]
    assert [row["id"] for row in rows] == [f"{name}-000001" for name in sets]


def test_the_revision_of_a_released_set_is_recorded(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": PLAIN}])
    prepared(reagent, tmp_path / "out", path, "--set=sft")
    meta = json.loads((tmp_path / "out/sft.meta.json").read_text())
    assert meta["rows"] == 1 and meta["revision"].startswith("a.jsonl @ sha256 ")
