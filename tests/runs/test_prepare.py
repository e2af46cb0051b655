"""data/*/prepare.py: every layout that is read becomes our records; what does not is told with its
place.
"""

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from reagent.chat import check_messages
from reagent.rows import check_rl_row

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
hotpot = importlib.import_module("data.hotpotqa.prepare")
benchmarks = importlib.import_module("data.benchmarks.prepare")
reagent = importlib.import_module("data.reagent.prepare")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(script, tmp_path, path, *arguments):
    """The rows that a prepare.main wrote for one input file; `out` is the file of hotpotqa and the
    folder of others.
    """
    out = tmp_path / "out.jsonl" if script is hotpot else tmp_path / "out"
    script.main([f"--input={path}", f"--out={out}", *arguments])
    return read(out if script is hotpot else next(out.glob("*.jsonl")))


# ---------------------------------------------------------------- hotpotqa, musique, 2wiki
HOTPOT = {
    "_id": "5a",
    "question": "Who? ",
    "answer": "Ada",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Rome", 0], ["Nile", 1], ["Rome", 1]],
    "context": [
        ["Rome", ["Ada lived here.", " It is old."]],
        ["Nile", ["A river."]],
        ["Empty", []],
    ],
}
HOTPOT_ROW = {
    "id": "5a",
    "question": "Who?",
    "answer": ["Ada"],
    "kind": "qa",
    "docs": [
        {"title": "Rome", "text": "Ada lived here. It is old."},
        {"title": "Nile", "text": "A river."},
    ],
    "meta": {
        "dataset": "hotpotqa",
        "supporting": ["Rome", "Nile"],
        "type": "bridge",
        "level": "hard",
    },
}
MUSIQUE = {
    "id": "3hop1__12_34_56",
    "question": "Where?",
    "answer": "NY",
    "answer_aliases": ["New York", "NY"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "a text", "is_supporting": True},
        {"idx": 1, "title": "B", "paragraph_text": "b text", "is_supporting": False},
    ],
}
MUSIQUE_ROW = {
    "id": "3hop1__12_34_56",
    "question": "Where?",
    "answer": ["NY", "New York"],
    "kind": "qa",
    "docs": [{"title": "A", "text": "a text"}, {"title": "B", "text": "b text"}],
    "meta": {"dataset": "musique", "supporting": ["A"], "hops": 3},
}


def test_hotpotqa_official_layout_becomes_an_rl_row_with_docs(tmp_path):
    path = tmp_path / "hotpot_dev.json"
    path.write_text(json.dumps([HOTPOT]))
    rows = run(hotpot, tmp_path, path)
    assert rows == [HOTPOT_ROW] and check_rl_row(rows[0]) is None


def test_hotpotqa_layout_of_the_hub_gives_the_same_row(tmp_path):
    titles, sentences = zip(*HOTPOT["context"])
    facts = {"title": [t for t, _ in HOTPOT["supporting_facts"]], "sent_id": [0, 1, 1]}
    hub = {**HOTPOT, "id": HOTPOT["_id"], "context": {"title": titles, "sentences": sentences}}
    hub["supporting_facts"] = facts
    del hub["_id"]
    assert run(hotpot, tmp_path, jsonl(tmp_path / "hub.jsonl", [hub])) == [HOTPOT_ROW]


def test_musique_official_layout_takes_aliases_and_leaves_out_what_cannot_be_answered(
    tmp_path, capsys
):
    rows = [MUSIQUE, {**MUSIQUE, "id": "2hop__1_2", "answerable": False}]
    assert run(hotpot, tmp_path, jsonl(tmp_path / "musique.jsonl", rows)) == [MUSIQUE_ROW]
    assert "1 skipped, not answerable from its paragraphs" in capsys.readouterr().out


def test_a_zip_is_read_by_the_name_of_its_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/musique_ans_v1.0_dev.jsonl", json.dumps(MUSIQUE))
        archive.writestr("data/musique_ans_v1.0_test.jsonl", "{broken")
    records = list(hotpot.read_records(tmp_path / "data.zip", "musique_ans_v1.0_dev.jsonl"))
    assert [record for _, record in records] == [MUSIQUE]


def test_parquet_is_read_and_a_broken_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([MUSIQUE]), path)
    assert run(hotpot, tmp_path, path) == [MUSIQUE_ROW]
    path.write_bytes(b"")
    with pytest.raises(SystemExit, match="rows.parquet: not a parquet file"):
        run(hotpot, tmp_path, path)


@pytest.mark.parametrize(
    "record", [{**MUSIQUE, "paragraphs": 3}, {**MUSIQUE, "paragraphs": [None]}]
)
def test_a_record_that_is_broken_inside_is_told_by_its_place_and_leaves_no_output(tmp_path, record):
    path = jsonl(tmp_path / "rows.jsonl", [MUSIQUE, record])
    with pytest.raises(SystemExit, match=r"rows.jsonl:2: broken inside"):
        run(hotpot, tmp_path, path)
    assert not list((tmp_path / "out").glob("*"))


def test_a_null_list_of_aliases_is_no_alias(tmp_path):
    row = {**MUSIQUE, "answer_aliases": None}
    assert run(hotpot, tmp_path, jsonl(tmp_path / "rows.jsonl", [row]))[0]["answer"] == [
        MUSIQUE["answer"]
    ]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({**HOTPOT, "answer": None}, "no answer"),
        ({**HOTPOT, "question": "  "}, "empty question"),
        ({"question": "q", "answer": ["a"]}, "no paragraphs"),
        ({**HOTPOT, "context": [["T", [" "]]]}, "all paragraphs empty"),
    ],
)
def test_records_left_out_have_a_reason(record, reason):
    row, given = hotpot.convert(record, "f:1")
    assert row is None and given.startswith(reason)


def test_the_same_id_twice_is_read_once(tmp_path):
    assert len(run(hotpot, tmp_path, jsonl(tmp_path / "a.jsonl", [HOTPOT, HOTPOT]))) == 1


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"_id": "1"}\n', "no question or no id; keys found: _id"),
        ('[{"a": 1}', "not a JSON list"),
        ("\ufeff" + json.dumps(HOTPOT) + "\n{cut", r"rows.jsonl:2: not JSON"),
        ("[1]", "rows.jsonl:1: expected an object"),
        ("", "no row could be converted"),
    ],
)
def test_broken_input_names_file_and_line_and_leaves_no_output(tmp_path, text, told):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=told):
        run(hotpot, tmp_path, path)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_file_is_one_line():
    with pytest.raises(SystemExit, match="no nowhere.json: give an existing file"):
        hotpot.main(["--input=nowhere.json"])


def test_a_download_is_checked_kept_and_not_repeated(tmp_path):
    source = jsonl(tmp_path / "published.jsonl", [MUSIQUE])
    digest = hotpot.hashlib.sha256(source.read_bytes()).hexdigest()
    kept = hotpot.fetch(source.as_uri(), tmp_path / "raw", digest)
    source.unlink()
    assert (
        hotpot.fetch(source.as_uri(), tmp_path / "raw", digest)
        == kept
        == tmp_path / "raw/published.jsonl"
    )
    with pytest.raises(SystemExit, match="expected 0000: delete it"):
        hotpot.fetch(source.as_uri(), tmp_path / "raw", "0000")
    with pytest.raises(SystemExit, match="Fetch it by hand"):
        hotpot.fetch(source.as_uri(), tmp_path / "elsewhere")


@pytest.mark.skipif(not SHARED.exists(), reason="no real rows here")
def test_real_rows_of_hotpotqa_and_musique_are_all_converted_from_the_command_line(tmp_path):
    files = [SHARED / "hotpotqa/train100_distractor.jsonl", SHARED / "musique/train100.jsonl"]
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "data/hotpotqa/prepare.py",
        *(f"--input={file}" for file in files),
        f"--out={out}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = read(out)
    assert len(rows) == 200 and "wrote 200 rows" in done.stdout
    assert all(check_rl_row(row) is None for row in rows)
    given = [record for file in files for record in read(file)]
    assert [len(row["docs"]) for row in rows] == [len(record["paragraphs"]) for record in given]
    assert all(
        set(row["meta"]["supporting"]) <= {doc["title"] for doc in row["docs"]} for row in rows
    )


# ---------------------------------------------------------------- benchmarks
NAMES = """gaia gaia_text math500 aime24 aime25 gsm8k 2wiki 2wiki200 hotpotqa hotpotqa200
hotpotqa1000 musique musique200 bamboogle webwalker webwalker200 hle xbench""".split()
GAIA = {
    "task_id": "t1",
    "Question": "How many?",
    "Level": "2",
    "Final answer": "1,000",
    "file_name": "",
    "Annotator Metadata": {"Steps": "..."},
}
LAYOUTS = [
    (
        "gaia",
        GAIA,
        {"id": "t1", "answer": "1,000", "kind": "gaia", "meta": {"dataset": "gaia", "level": "2"}},
    ),
    ("gaia", {**GAIA, "file_name": "t1.xlsx"}, {"files": ["t1.xlsx"]}),
    (
        "math500",
        {
            "problem": "1+1",
            "solution": r"\boxed{2}",
            "answer": "2",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/a/1.json",
        },
        {
            "id": "test/a/1.json",
            "question": "1+1",
            "answer": "2",
            "kind": "math",
            "meta": {"dataset": "math500", "level": 1, "type": "Algebra", "solution": r"\boxed{2}"},
        },
    ),
    (
        "aime24",
        {"ID": "2024-I-1", "Problem": "p", "Answer": 25},
        {"id": "2024-I-1", "answer": "25", "kind": "math"},
    ),
    ("aime25", {"id": "0", "problem": "p", "answer": "025"}, {"answer": "025"}),
    (
        "gsm8k",
        {"question": "q", "answer": "It is 1,000.\n#### 1,000"},
        {
            "id": "gsm8k-00001",
            "answer": "1000",
            "meta": {"dataset": "gsm8k", "solution": "It is 1,000.\n#### 1,000"},
        },
    ),
    (
        "2wiki200",
        {"question": "q", "answer": ["NY", "New York"]},
        {"answer": ["NY", "New York"], "kind": "qa"},
    ),
    ("hotpotqa", HOTPOT, {"id": "5a", "question": "Who?", "answer": "Ada"}),
    (
        "bamboogle",
        {"question": "q", "answer": {"value": "NY", "aliases": ["New York"]}},
        {"answer": ["NY", "New York"]},
    ),
    ("musique", MUSIQUE, {"answer": ["NY", "New York"]}),
    (
        "webwalker",
        {
            "question": "q",
            "answer": "a",
            "root_url": "https://x.org",
            "info": {"lang": "en", "difficulty_level": "easy", "golden_path": ["root"]},
        },
        {
            "meta": {
                "dataset": "webwalker",
                "lang": "en",
                "difficulty_level": "easy",
                "root_url": "https://x.org",
            }
        },
    ),
    (
        "webwalker",
        {"Question": "q", "Answer": "a", "difficulty_level": "hard"},
        {"question": "q", "answer": "a"},
    ),
    (
        "hle",
        {"id": "h", "question": "q", "answer": "B", "answer_type": "multipleChoice", "image": ""},
        {"kind": "choice"},
    ),
    (
        "hle",
        {"id": "h", "question": "q", "answer": "x", "answer_type": "exactMatch"},
        {"kind": "qa"},
    ),
]


def test_every_benchmark_of_the_paper_has_a_source_with_licence_and_size():
    assert list(benchmarks.BENCHMARKS) == NAMES
    for bench in benchmarks.BENCHMARKS.values():
        assert bench.kind in ("math", "qa", "gaia", "choice") and bench.rows > 0 and bench.licence
        assert bench.url.startswith(("https://", "http://", "hf://"))


@pytest.mark.parametrize("name, record, expected", LAYOUTS)
def test_a_published_layout_becomes_a_row(tmp_path, name, record, expected):
    (row,) = run(
        benchmarks, tmp_path, jsonl(tmp_path / "rows.jsonl", [record]), f"--dataset={name}"
    )
    assert {key: row[key] for key in expected} == expected
    assert (
        set(row) <= {"id", "question", "answer", "kind", "meta", "files"}
        and check_rl_row(row) is None
    )


def test_the_same_question_twice_is_two_rows(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}] * 2)
    rows = run(benchmarks, tmp_path, path, "--dataset=bamboogle")
    assert [row["id"] for row in rows] == ["bamboogle-00001", "bamboogle-00002"]


@pytest.mark.parametrize(
    "name, record, reason",
    [
        ("gaia_text", {**GAIA, "file_name": "a.png"}, "attachment"),
        ("hle", {"id": 1, "question": "q", "answer": "a", "image": "x"}, "image"),
        ("gaia", {**GAIA, "file_name": "../../etc/passwd"}, "plain file name"),
        ("gaia", {**GAIA, "Final answer": "?"}, "no answer"),
        ("xbench", {"id": 1, "prompt": "cXE=", "answer": "cXE="}, "no canary"),
    ],
)
def test_benchmark_records_left_out_have_a_reason(name, record, reason):
    row, given = benchmarks.convert(record, "f:1", name, 1)
    assert row is None and reason in given


def test_a_sample_is_fixed_by_the_ids_and_keeps_their_order():
    rows = [{"id": str(i)} for i in range(50)]
    chosen = benchmarks.fixed_sample(rows, 10)
    again = benchmarks.fixed_sample(rows[::-1], 10)
    assert (
        len(chosen) == 10
        and chosen == again[::-1]
        and chosen == [row for row in rows if row in chosen]
    )


def test_a_subset_takes_its_ids_from_one_source_and_its_rows_from_the_publisher(tmp_path):
    rows = [{**GAIA, "task_id": f"t{i}", "file_name": "a.png" * (i == 2)} for i in range(4)]
    bench = benchmarks.BENCHMARKS["gaia_text"]
    published = {
        bench.url: jsonl(tmp_path / "metadata.jsonl", rows),
        bench.ids_url: jsonl(tmp_path / "dev.json", [{"task_id": t} for t in ("t1", "t2")]),
    }
    assert benchmarks.prepare("gaia_text", [], tmp_path, {}, lambda url, *_: published[url]) == 1
    assert [row["id"] for row in read(tmp_path / "gaia_text.jsonl")] == ["t1"]


def test_attachments_are_copied_into_the_files_folder(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/t1.txt").write_text("attached")
    published = {
        benchmarks.GAIA + "metadata.parquet": jsonl(
            tmp_path / "m.jsonl", [{**GAIA, "file_name": "t1.txt"}]
        ),
        benchmarks.GAIA + "t1.txt": tmp_path / "cache/t1.txt",
    }
    benchmarks.prepare("gaia", [], tmp_path, {}, lambda url, *_: published[url])
    assert (tmp_path / "files/t1.txt").read_text() == "attached"


def test_sets_that_cannot_be_fetched_are_named_at_the_end_and_the_others_are_made(
    tmp_path, monkeypatch
):
    def get(url, *_):
        if "gaia" in url:
            raise SystemExit("gaia-benchmark/GAIA is gated: accept its terms")
        return jsonl(tmp_path / "test.jsonl", [{"question": "q", "answer": "a"}])

    monkeypatch.setattr(benchmarks.prepare, "__defaults__", (get,))
    with pytest.raises(SystemExit, match="gaia: gaia-benchmark/GAIA is gated"):
        benchmarks.main(["--dataset=gaia,bamboogle", f"--out={tmp_path}"])
    assert read(tmp_path / "bamboogle.jsonl")[0]["question"] == "q"


def test_two_publishers_files_of_one_name_are_kept_apart(tmp_path):
    urls = [
        bench.url for bench in benchmarks.BENCHMARKS.values() if bench.url.endswith("/test.jsonl")
    ]
    assert len({benchmarks.raw_folder(tmp_path, url) for url in urls}) == len(urls) > 5


def test_unknown_names_and_input_without_a_set_are_refused():
    with pytest.raises(SystemExit, match="unknown gaya; known: gaia, "):
        benchmarks.main(["--dataset=gaya"])
    with pytest.raises(SystemExit, match="--input needs one --dataset"):
        benchmarks.main(["--input=x.json"])


@pytest.mark.skipif(not SHARED.exists(), reason="no real rows here")
@pytest.mark.parametrize(
    "name, file, count",
    [
        ("gsm8k", "gsm8k/test.jsonl", 1319),
        ("math500", "math500/test.jsonl", 500),
        ("bamboogle", "bamboogle/test.jsonl", 125),
        ("2wiki", "2wiki/dev50_questions.jsonl", 51),
        ("2wiki200", "2wiki/arpo200.jsonl", 200),
        ("hotpotqa200", "hotpotqa/arpo200.jsonl", 200),
        ("musique200", "musique/arpo200.jsonl", 200),
        ("webwalker200", "webwalker/arpo200.jsonl", 200),
        ("hotpotqa", "hotpotqa/train100_distractor.jsonl", 100),
        ("musique", "musique/train100.jsonl", 100),
        ("xbench", "xbench/DeepSearch-2505.csv", 100),
    ],
)
def test_every_real_row_is_converted(tmp_path, name, file, count):
    rows = run(benchmarks, tmp_path, SHARED / file, f"--dataset={name}")
    assert len(rows) == count == len({row["id"] for row in rows})
    assert all(check_rl_row(row) is None and row["meta"]["dataset"] == name for row in rows)


@pytest.mark.skipif(not (SHARED / "xbench").exists(), reason="no real rows here")
def test_xbench_stays_encrypted_on_disk(tmp_path):
    import base64
    from itertools import cycle

    rows = run(benchmarks, tmp_path, SHARED / "xbench/DeepSearch-2505.csv", "--dataset=xbench")
    for row in rows:
        for text in (row["question"], row["answer"]):
            data = base64.b64decode(text, validate=True)
            assert bytes(
                a ^ b for a, b in zip(data, cycle(row["meta"]["canary"].encode()))
            ).decode()
        assert row["question"].isascii() and row["meta"]["encrypted"]


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
    (row,) = run(reagent, tmp_path, path, "--set=sft")
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
    rows = run(
        reagent,
        tmp_path,
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
    rows = run(reagent, tmp_path, first, f"--input={second}", "--set=rl")
    assert [row["question"] for row in rows] == ["p", "q", "r"] and len(
        {row["id"] for row in rows}
    ) == 3


def test_the_table_is_printed_and_nothing_left_where_a_set_fails(tmp_path, capsys):
    good, bad = jsonl(tmp_path / "a.jsonl", [{"messages": PLAIN}]), tmp_path / "b.jsonl"
    bad.write_text("{")
    with pytest.raises(SystemExit, match="b.jsonl:1: not JSON"):
        run(reagent, tmp_path, good, f"--input={bad}", "--set=sft")
    assert "sft: a.jsonl" in capsys.readouterr().out and not list((tmp_path / "out").glob("*"))
    with pytest.raises(SystemExit, match="b.jsonl:1: not JSON"):
        reagent.main(["--set=sft", f"--input={bad}", "--inspect"])


def test_a_lone_surrogate_does_not_end_the_set(tmp_path):
    rows = run(
        reagent,
        tmp_path,
        jsonl(tmp_path / "a.jsonl", [{"question": "hi \ud83d", "ground_truth": "a"}]),
        "--set=rl",
    )
    assert rows[0]["question"] == "hi ?"


def test_a_file_of_mixed_records_is_counted_by_reason(tmp_path, capsys):
    path = tmp_path / "DeepScaleR_18_6k_5k.json"
    path.write_text(json.dumps([{"question": "1+1?", "ground_truth": "2"}, {"question": "x"}]))
    assert len(run(reagent, tmp_path, path, "--set=rl")) == 1
    assert (
        "rl: DeepScaleR_18_6k_5k.json: 1 skipped, no question or no ground truth"
        in capsys.readouterr().out
    )


def test_a_file_without_a_fitting_record_is_an_error_that_names_its_keys(tmp_path):
    path = jsonl(tmp_path / "odd.jsonl", [{"foo": 1, "bar": 2}])
    with pytest.raises(
        SystemExit, match="none of 1 records fits the set 'sft'.*keys found: bar, foo"
    ):
        run(reagent, tmp_path, path, "--set=sft")
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
