"""data/hotpotqa/prepare.py: every layout that is read becomes our records; what does not is told
with its place.
"""

import importlib
import json
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from reagent.rows import check_rl_row
from tests.helpers import published
from tests.helpers.rows import ROOT, SHARED, jsonl, prepared, read

hotpot = importlib.import_module("data.hotpotqa.prepare")


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
    rows = prepared(hotpot, tmp_path / "out.jsonl", path)
    assert rows == [HOTPOT_ROW] and check_rl_row(rows[0]) is None


def test_hotpotqa_layout_of_the_hub_gives_the_same_row(tmp_path):
    titles, sentences = zip(*HOTPOT["context"])
    facts = {"title": [t for t, _ in HOTPOT["supporting_facts"]], "sent_id": [0, 1, 1]}
    hub = {**HOTPOT, "id": HOTPOT["_id"], "context": {"title": titles, "sentences": sentences}}
    hub["supporting_facts"] = facts
    del hub["_id"]
    assert prepared(hotpot, tmp_path / "out.jsonl", jsonl(tmp_path / "hub.jsonl", [hub])) == [
        HOTPOT_ROW
    ]


def test_musique_official_layout_takes_aliases_and_leaves_out_what_cannot_be_answered(
    tmp_path, capsys
):
    rows = [MUSIQUE, {**MUSIQUE, "id": "2hop__1_2", "answerable": False}]
    assert prepared(hotpot, tmp_path / "out.jsonl", jsonl(tmp_path / "musique.jsonl", rows)) == [
        MUSIQUE_ROW
    ]
    assert "1 skipped, not answerable from its paragraphs" in capsys.readouterr().out


def test_of_an_archive_one_file_is_read_by_its_name(tmp_path):
    archive = published.musique_archive(tmp_path / "musique_v1.0.zip")
    with pytest.raises(SystemExit, match=r"holds 7 files \(dev_test.*\): choose one by --member"):
        prepared(hotpot, tmp_path / "out.jsonl", archive)
    member = "--member=musique_ans_v1.0_dev.jsonl"
    (row,) = prepared(hotpot, tmp_path / "out.jsonl", archive, member)
    assert row["id"] == "2hop__12_34"
    with pytest.raises(SystemExit, match="holds no file named dev.jsonl"):
        prepared(hotpot, tmp_path / "out.jsonl", archive, "--member=dev.jsonl")


def test_the_only_file_of_an_archive_needs_no_name(tmp_path):
    members = {"rows.jsonl": json.dumps(MUSIQUE), "__MACOSX/._rows.jsonl": b"\x00\x05\x16\x07"}
    path = published.archive(tmp_path / "rows.zip", members)
    assert prepared(hotpot, tmp_path / "out.jsonl", path) == [MUSIQUE_ROW]


@pytest.mark.parametrize("packed", [list, json.dumps])
def test_2wiki_takes_the_other_names_of_its_answer_and_nested_values_as_text(tmp_path, packed):
    record = {
        **published.TWO_WIKI,
        "context": packed(published.TWO_WIKI["context"]),
        "supporting_facts": packed(published.TWO_WIKI["supporting_facts"]),
    }
    jsonl(tmp_path / "id_aliases.json", published.ALIASES)
    (row,) = prepared(hotpot, tmp_path / "out.jsonl", jsonl(tmp_path / "dev.jsonl", [record]))
    assert row["answer"] == ["Lampland", "Republic of Lampland", "Lamplander"]
    assert row["docs"][1] == {"title": "Ada", "text": "She is from Lampland."}
    assert row["meta"]["supporting"] == ["Lamp", "Ada"] and row["meta"]["dataset"] == "2wiki"


def test_what_the_rows_are_from_is_written_beside_them(tmp_path):
    path = jsonl(tmp_path / "hub.jsonl", [HOTPOT])
    prepared(hotpot, tmp_path / "out.jsonl", path)
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert meta["revision"] == f"hub.jsonl @ sha256 {hotpot.digest_of(path)[:12]}"
    assert meta["rows"] == 1 and meta["sha256"] == hotpot.digest_of(tmp_path / "out.jsonl")


def test_the_commit_of_a_moving_branch_is_the_one_in_the_hubs_cache(tmp_path):
    path = jsonl(tmp_path / "snapshots" / ("ab" * 20) / "a.jsonl", [HOTPOT])
    found = hotpot.origin("hf://owner/name@main/a.jsonl", path)
    assert (found["source"], found["revision"]) == ("owner/name", "ab" * 20)


def test_parquet_is_read_and_a_broken_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([MUSIQUE]), path)
    assert prepared(hotpot, tmp_path / "out.jsonl", path) == [MUSIQUE_ROW]
    path.write_bytes(b"")
    with pytest.raises(SystemExit, match="rows.parquet: not a parquet file"):
        prepared(hotpot, tmp_path / "out.jsonl", path)


@pytest.mark.parametrize(
    "record", [{**MUSIQUE, "paragraphs": 3}, {**MUSIQUE, "paragraphs": [None]}]
)
def test_a_record_that_is_broken_inside_is_told_by_its_place_and_leaves_no_output(tmp_path, record):
    path = jsonl(tmp_path / "rows.jsonl", [MUSIQUE, record])
    with pytest.raises(SystemExit, match=r"rows.jsonl:2: broken inside"):
        prepared(hotpot, tmp_path / "out.jsonl", path)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_null_list_of_aliases_is_no_alias(tmp_path):
    row = {**MUSIQUE, "answer_aliases": None}
    assert prepared(hotpot, tmp_path / "out.jsonl", jsonl(tmp_path / "rows.jsonl", [row]))[0][
        "answer"
    ] == [MUSIQUE["answer"]]


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
    assert (
        len(prepared(hotpot, tmp_path / "out.jsonl", jsonl(tmp_path / "a.jsonl", [HOTPOT, HOTPOT])))
        == 1
    )


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
        prepared(hotpot, tmp_path / "out.jsonl", path)
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
