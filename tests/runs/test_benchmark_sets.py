"""data/benchmarks/prepare.py: the 18 sets from files laid out as their publishers do; what would
be fetched is said without a network; what was, is recorded.
"""

import json
import socket
import subprocess
import sys

import pytest

from data.hotpotqa.prepare import digest_of
from reagent.rows import check_rl_row
from results.benchmarks import DATASETS, read_rows
from tests.helpers import published
from tests.helpers.published import benchmarks, publish
from tests.helpers.rows import ROOT, SHARED, jsonl, prepared, read

NAMES = """gaia gaia_text math500 aime24 aime25 gsm8k 2wiki 2wiki200 hotpotqa hotpotqa200
hotpotqa1000 musique musique200 bamboogle webwalker webwalker200 hle xbench""".split()


def row(identity, question, answer, kind, **meta):
    return {"id": identity, "question": question, "answer": answer, "kind": kind, "meta": meta}


HOTPOT_ROW = row(
    "5a8b57f2", "Which street has the lamp?", "Lumen", "qa", type="bridge", level="hard"
)
WALKED = dict(
    difficulty_level="easy",
    type="single_source",
    lang="en",
    domain="conference",
    root_url="https://fair.example/",
)
WALKER = "When does the lamp fair close?", "The fair closes on March 21.", "qa"
ROWS = {
    "gaia": [
        row("t-1", "How many lamps has t-1?", "1,000", "gaia", level="1"),
        row("t-2", "How many lamps has t-2?", "lamp.xlsx", "gaia", level="2")
        | {"files": ["t-2.xlsx"]},
        row("t-3", "How many lamps has t-3?", "7", "gaia", level="3"),
    ],
    "gaia_text": [row("t-3", "How many lamps has t-3?", "7", "gaia", level="3")],
    "math500": [
        row(
            "test/algebra/1.json",
            "What is $1+1$?",
            "2",
            "math",
            level=1,
            type="Algebra",
            solution=r"It is $\boxed{2}$.",
        )
    ],
    "aime24": [row("60", "How many lamps?", "025", "math", solution=r"So $\boxed{025}$.")],
    "aime25": [row("0", "How many wicks?", "70", "math")],
    "gsm8k": [
        row("gsm8k-00001", "How much is it?", "1000", "math", solution=published.GSM8K_ANSWER)
    ],
    "2wiki": [
        row(
            "13f5ad2c",
            "Of which country is the maker of the lamp?",
            ["Lampland", "Republic of Lampland", "Lamplander"],
            "qa",
            type="compositional",
        )
    ],
    "2wiki200": [row("2wiki200-00001", "Where?", ["NY", "New York"], "qa")],
    "hotpotqa": [HOTPOT_ROW],
    "hotpotqa200": [row("hotpotqa200-00001", "Who?", "Ada", "qa")],
    "hotpotqa1000": [HOTPOT_ROW],
    "musique": [row("2hop__12_34", "Where is the lamp?", ["NY", "New York"], "qa", hops=2)],
    "musique200": [row("musique200-00001", "Whose?", ["Ada", "Ada the Elder"], "qa")],
    "bamboogle": [row("bamboogle-00001", "Who was it?", "Ada", "qa")],
    "webwalker": [row("webwalker-00001", *WALKER, **WALKED)],
    "webwalker200": [row("webwalker200-00001", "When?", "In March.", "qa")],
    "hle": [
        row("668", "Which lamp\nis \u00e9teinte?", "B", "choice", type="Other"),
        row("669", "Which lamp is new, as corrected later?", "B", "qa", type="Other"),
    ],
    "xbench": [
        row(
            "1",
            published.XBENCH["prompt"],
            published.XBENCH["answer"],
            "qa",
            encrypted=True,
            canary=published.CANARY,
        )
    ],
}


def with_name(name, rows):
    return [made | {"meta": {"dataset": name} | made["meta"]} for made in rows]


def make(name, folder):
    """Prepares a set from the published files in `folder`."""
    files = publish(name, folder)
    return benchmarks.prepare(name, [], folder / "out", {}, lambda url, *_: files[url])


def test_the_sets_are_those_of_the_release_with_source_licence_and_size():
    assert list(benchmarks.BENCHMARKS) == list(DATASETS) == list(ROWS) == NAMES
    for bench in benchmarks.BENCHMARKS.values():
        assert bench.kind in ("math", "qa", "gaia", "choice") and bench.rows > 0 and bench.licence
        assert bench.url.startswith(("https://", "http://", "hf://"))


@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_made_of_what_its_publisher_hands_out(tmp_path, name):
    assert make(name, tmp_path) == len(ROWS[name])
    rows = read(tmp_path / f"out/{name}.jsonl")
    assert rows == with_name(name, ROWS[name])
    assert all(check_rl_row(row) is None for row in rows)
    read_again = read_rows(str(tmp_path / f"out/{name}.jsonl"))
    assert [row["id"] for row in read_again] == [row["id"] for row in rows]


def test_what_evaluation_reads_of_xbench_is_decrypted_and_the_file_is_not(tmp_path):
    make("xbench", tmp_path)
    path = tmp_path / "out/xbench.jsonl"
    (row,) = read_rows(str(path))
    assert (row["question"], row["answer"]) == ("这盏灯有多少流明？", "384流明")
    assert row["canary"] == published.CANARY and path.read_text(encoding="utf-8").isascii()


# layouts of the same sets in other public copies, read by --input
WEBWALKER_FLAT = {  # WebThinker's
    "Question": WALKER[0],
    "answer": WALKER[1],
    "domain": "conference",
    "source_website": ["https://fair.example/hours"],
    "golden_path": ["root->visit->hours"],
    "type": "single_source",
    "difficulty_level": "easy",
    "lang": "en",
    "root_url": "https://fair.example/",
}
WEBWALKER_CAPITAL = {  # the README of its publisher
    "Question": WALKER[0],
    "Answer": WALKER[1],
    "Root_Url": "https://fair.example/",
    "Info": {
        "Hop": "single-source",
        "Domain": "Conference",
        "Language": "English",
        "Difficulty_Level": "Easy",
        "Source_Website": ["https://fair.example/hours"],
        "Golden_Path": ["root->visit->hours"],
    },
}
ARPO_AIME = {**published.ROWS["aime24"], "question": "How many lamps?", "year": None}
COPIES = [
    ("gaia_text", published.GAIA_LIST[0], {"id": "t-3", "answer": "7", "kind": "gaia"}),
    (
        "hle",
        published.hle_list_row("9", "Which?"),
        {"id": "9", "question": "Which?", "answer": "B"},
    ),
    (
        "hle",
        {"id": 0, "Question": "Which?", "answer": "B", "answer_type": "multipleChoice"},
        {"id": "0", "question": "Which?", "kind": "choice"},
    ),
    (
        "xbench",
        {"question": "几盏灯？", "answer": ["二"]},
        {"question": "几盏灯？", "answer": "二"},
    ),
    ("webwalker", WEBWALKER_FLAT, {"meta": {"dataset": "webwalker"} | WALKED}),
    (
        "webwalker",
        WEBWALKER_CAPITAL,
        {
            "question": WALKER[0],
            "answer": WALKER[1],
            "meta": {
                "dataset": "webwalker",
                "difficulty_level": "Easy",
                "hops": "single-source",
                "lang": "English",
                "domain": "Conference",
                "root_url": "https://fair.example/",
            },
        },
    ),
    ("aime24", ARPO_AIME, {"id": "60", "answer": "025"}),
    (
        "aime24",
        {"id": 60, "problem": "p", "solution": r"\boxed{204}", "url": "u"},
        {"answer": "204"},
    ),
    (
        "aime24",
        {"ID": "2024-I-1", "Problem": "p", "Answer": 25},
        {"id": "2024-I-1", "answer": "25"},
    ),
    ("aime25", {"problem_idx": 1, "answer": 70, "problem": "p"}, {"id": "1", "answer": "70"}),
    ("math500", {"question": "q", "answer": "2"}, {"id": "math500-00001", "kind": "math"}),
    ("gsm8k", {"question": "q", "answer": "#### 18", "idx": 0}, {"answer": "18"}),
    ("bamboogle", {"Question": "Who?", "Answer": "Ada"}, {"question": "Who?", "answer": "Ada"}),
    (
        "2wiki",
        {"id": "dev_0", "question": "q", "golden_answers": ["NY", "New York"], "metadata": {}},
        {"id": "dev_0", "answer": ["NY", "New York"]},
    ),
    (
        "bamboogle",
        {"question": "q", "answer": {"value": "NY", "aliases": ["N"]}},
        {"answer": ["NY", "N"]},
    ),
]


@pytest.mark.parametrize("name, record, expected", COPIES)
def test_other_public_copies_are_read_too(tmp_path, name, record, expected):
    path = jsonl(tmp_path / "rows.jsonl", [record])
    (row,) = prepared(benchmarks, tmp_path / "out", path, f"--dataset={name}")
    assert {key: row[key] for key in expected} == expected
    assert set(row) <= {"id", "question", "answer", "kind", "meta"} and check_rl_row(row) is None


def test_an_archive_by_hand_gives_the_rows_of_its_one_split(tmp_path):
    for name in ("musique", "2wiki"):
        (path,) = publish(name, tmp_path).values()
        rows = prepared(benchmarks, tmp_path / name, path, f"--dataset={name}")
        assert rows == with_name(name, ROWS[name])


def test_aliases_of_2wiki_may_lie_beside_its_file(tmp_path):
    path = published.list_of([published.TWO_WIKI], tmp_path / "dev.json")
    jsonl(tmp_path / "id_aliases.json", published.ALIASES)
    rows = prepared(benchmarks, tmp_path / "out", path, "--dataset=2wiki")
    assert rows == with_name("2wiki", ROWS["2wiki"])


def test_a_subset_by_hand_needs_the_list_that_chooses(tmp_path):
    rows = [published.gaia(f"t-{i}", "1", "7") for i in range(104)]
    path = jsonl(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(SystemExit, match="104 rows, and a list chooses 103 of them: give --subset"):
        prepared(benchmarks, tmp_path / "out", path, "--dataset=gaia_text")
    chosen = published.list_of(published.GAIA_LIST, tmp_path / "dev.json")
    (row,) = prepared(
        benchmarks, tmp_path / "out", path, "--dataset=gaia_text", f"--subset={chosen}"
    )
    assert row["id"] == "t-3"
    with pytest.raises(SystemExit, match="dev.json:1: no question; keys found: task_id"):
        chosen = jsonl(tmp_path / "dev.json", [{"task_id": "t-3"}])
        benchmarks.main(["--dataset=hle", f"--input={path}", f"--subset={chosen}"])
    with pytest.raises(SystemExit, match="--subset is the list for the rows of --input"):
        benchmarks.main(["--subset=x.json"])


@pytest.mark.parametrize(
    "name, record, reason",
    [
        ("gaia_text", published.GAIA[1], "attachment"),
        ("hle", published.HLE[2], "image"),
        ("gaia", {**published.GAIA[0], "file_name": "../../etc/passwd"}, "plain file name"),
        ("gaia", {**published.GAIA[0], "Final answer": "?"}, "no answer"),
        ("xbench", {"id": 1, "prompt": "cXE=", "answer": "cXE="}, "no canary"),
    ],
)
def test_records_left_out_have_a_reason(name, record, reason):
    row, given = benchmarks.convert(record, "f:1", name, 1)
    assert row is None and reason in given


def test_the_same_question_twice_is_two_rows(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}] * 2)
    rows = prepared(benchmarks, tmp_path / "out", path, "--dataset=bamboogle")
    assert [row["id"] for row in rows] == ["bamboogle-00001", "bamboogle-00002"]


def test_a_sample_is_fixed_by_the_ids_and_keeps_their_order():
    rows = [{"id": str(i)} for i in range(50)]
    chosen = benchmarks.fixed_sample(rows, 10)
    assert len(chosen) == 10 and chosen == [row for row in rows if row in chosen]
    assert chosen == benchmarks.fixed_sample(rows[::-1], 10)[::-1]


def test_attachments_are_copied_into_the_files_folder(tmp_path):
    make("gaia", tmp_path)
    assert (tmp_path / "out/files/t-2.xlsx").read_bytes() == b"a table"


# ---------------------------------------------------------------- what is fetched, what was


def test_check_says_without_a_network_what_would_be_fetched(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("--check asks nobody")

    monkeypatch.setattr(socket, "socket", refuse)
    benchmarks.main(["--check", f"--out={tmp_path}"])
    blocks = capsys.readouterr().out.strip().split("\n")
    heads = [i for i, line in enumerate(blocks) if not line.startswith(" ")]
    told = {
        blocks[a].partition(":")[0]: "\n".join(blocks[a:b])
        for a, b in zip(heads, [*heads[1:], None])
    }
    assert list(told) == NAMES and not list(tmp_path.iterdir())
    for name, text in told.items():
        bench = benchmarks.BENCHMARKS[name]
        assert bench.licence in text and "https://" in text or "http://" in text
        assert ("login     yes" in text) == (name in ("gaia", "gaia_text", "hle"))
        assert ("revision " in text) == ("no revisions" not in text)
        assert bench.sha256 in text and (bench.sha256 or "digest recorded at download" in text)
    assert "musique_ans_v1.0_dev.jsonl of the archive" in told["musique"]
    assert benchmarks.WEBTHINKER + "GAIA/dev.json" in told["gaia_text"]


def test_check_runs_without_the_packages_that_download(tmp_path):
    code = "import sys; sys.modules['huggingface_hub'] = sys.modules['pyarrow'] = None\n"
    code += "import runpy; sys.argv = ['prepare.py', '--check']\n"
    code += "runpy.run_path('data/benchmarks/prepare.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("  login ") == 18


def test_revision_and_digests_are_recorded_beside_the_rows(tmp_path):
    commit = "c7ab3329a2a4a35ca569fdca369b61a3d1787e5b"
    cached = tmp_path / "hub/snapshots" / commit / "main.jsonl"
    jsonl(cached, [published.WEBWALKER])
    benchmarks.prepare("webwalker", [], tmp_path / "out", {}, lambda url, *_: cached)
    meta = json.loads((tmp_path / "out/webwalker.meta.json").read_text())
    assert meta["revision"] == f"callanwu/WebWalkerQA @ {commit[:12]}" and meta["rows"] == 1
    assert meta["sha256"] == digest_of(tmp_path / "out/webwalker.jsonl")
    assert meta["sources"] == [
        {"source": "callanwu/WebWalkerQA", "revision": commit, "sha256": digest_of(cached)}
    ]
    assert meta["dataset"] == "webwalker" and meta["licence"] == "Apache-2.0"


def test_the_list_of_a_subset_and_files_given_by_hand_are_recorded_too(tmp_path):
    make("hle", tmp_path)
    meta = json.loads((tmp_path / "out/hle.meta.json").read_text())
    sources = [(source["source"], source["revision"][:7]) for source in meta["sources"]]
    assert sources == [("cais/hle", "5a81a4c"), ("RUC-NLPIR/ARPO", "a95cd08")]
    path = jsonl(tmp_path / "mine.jsonl", [{"question": "q", "answer": "a"}])
    benchmarks.main(["--dataset=bamboogle", f"--input={path}", f"--out={tmp_path / 'out'}"])
    meta = json.loads((tmp_path / "out/bamboogle.meta.json").read_text())
    assert meta["revision"] == f"mine.jsonl @ sha256 {digest_of(path)[:12]}"


def test_a_file_with_another_digest_than_the_published_one_is_refused(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "test.jsonl", [published.ROWS["math500"]])
    monkeypatch.setattr("data.hotpotqa.prepare.fetch_hub", lambda url: path)
    with pytest.raises(SystemExit, match="test.jsonl: sha256 is .*, expected 35dc41080a36"):
        benchmarks.main(["--dataset=math500", f"--out={tmp_path}"])


def test_sets_that_cannot_be_fetched_are_named_at_the_end_and_the_others_are_made(
    tmp_path, monkeypatch
):
    def get(url, *_):
        if "gaia" in url:
            raise SystemExit("gaia-benchmark/GAIA is gated: accept its terms")
        return jsonl(tmp_path / "test.jsonl", [{"question": "q", "answer": "a"}])

    monkeypatch.setattr(benchmarks.prepare, "__defaults__", (get, None))
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


# ---------------------------------------------------------------- real rows, where there are any


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
    rows = prepared(benchmarks, tmp_path / "out", SHARED / file, f"--dataset={name}")
    assert len(rows) == count == len({row["id"] for row in rows})
    assert all(check_rl_row(row) is None and row["meta"]["dataset"] == name for row in rows)


@pytest.mark.skipif(not SHARED.exists(), reason="no real rows here")
def test_the_digests_of_the_published_files_are_those_of_their_real_copies():
    for name, file in [
        ("gsm8k", "gsm8k/test.jsonl"),
        ("math500", "math500/test.jsonl"),
        ("bamboogle", "bamboogle/test.jsonl"),
        ("2wiki200", "2wiki/arpo200.jsonl"),
        ("hotpotqa200", "hotpotqa/arpo200.jsonl"),
        ("musique200", "musique/arpo200.jsonl"),
        ("webwalker200", "webwalker/arpo200.jsonl"),
        ("xbench", "xbench/DeepSearch-2505.csv"),
    ]:
        assert benchmarks.BENCHMARKS[name].sha256 == digest_of(SHARED / file)
