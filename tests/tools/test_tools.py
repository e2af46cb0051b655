"""The tools and the toolbox: arguments, limits, local search. Numbers are those of the list of
attacks on the tools.

Elsewhere: 1-43 test_sandbox.py; 44-59 test_files.py, of images test_media.py; 60-75 test_web.py,
here what a call sees of them; 76-78 and malformed calls of 83 in tests/agent, where text becomes
tokens; 79 needs no test of its own, the sandbox has no network and no environment (22, 40-43); 81
and 86-90 in tests/evaluation.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tools
from tests.helpers.search_server import SPOKEN, environ_of, web_server
from tests.helpers.tiny import ROOT
from toolkit.sandbox import ToolError, ToolFault
from toolkit.search import Corpus, Index, passages, postings, words
from toolkit.text import capped, clean
from tools import TOOLS, Context, Toolbox, repaired, schema_of

DATA = ROOT.parent / "shared" / "data"
HITS = [
    ("Lima", "https://a.org/lima", "Lima is the capital."),
    ("Peru", "https://b.org/peru", "A country."),
]
ROWS = [
    {"id": "1", "title": "Lima", "text": "The capital of Peru.", "url": "https://a.org/lima"},
    {"id": "2", "title": "Cusco", "text": "A city in the mountains of Peru."},
    {"id": "3", "title": "Lima", "text": "Founded by Pizarro.", "url": "https://a.org/lima"},
]
needs_bubblewrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")


def corpus_file(folder, rows=ROWS) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def call(toolbox, name, arguments, **options):
    return asyncio.run(toolbox.call(name, arguments, **options))


@pytest.fixture
def added(monkeypatch):
    """Adds tools for a test."""

    def add(*functions):
        for function in functions:
            monkeypatch.setitem(TOOLS, function.__name__, function)

    return add


def setting(monkeypatch, environ):
    for name in (
        "SERPER_API_KEY",
        "BRAVE_API_KEY",
        "TAVILY_API_KEY",
        "SEARXNG_URL",
        "SUMMARY_URL",
        "JINA_API_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


# --------------------------------------------------------------------------------------------------
# schemas and arguments


def sample(
    context: Context, words: list[str], text: str, n: int = 1, x: float = 0.5, flag: bool = False
) -> str:
    """Says what it was given.

    words: some words
    text: a text
    n: how many
    x: how much
    flag: whether
    """
    return repr((words, text, n, x, flag))


def test_a_tool_without_a_hint_or_a_meaning_is_named():
    def word_count(context, text: str) -> str:
        """Counts."""

    with pytest.raises(SystemExit, match="the tool word_count: text needs .* 'text: meaning'"):
        schema_of(word_count)


def test_a_tool_that_takes_no_context_is_named():
    def word_count(text: str) -> str:
        """Counts.

        text: the text"""

    def clock() -> str:
        """Tells the time."""

    for tool in (word_count, clock):
        with pytest.raises(SystemExit, match=f"the tool {tool.__name__}: its first parameter"):
            schema_of(tool)


def test_a_number_that_a_tool_returns_is_an_observation(added):
    def word_count(context, text: str) -> int:
        """Counts.

        text: the text"""
        return len(text.split())

    added(word_count)
    seen = call(Toolbox(["word_count"]), "word_count", {"text": "a b c"})
    assert (seen.status, seen.text) == ("ok", "3")


def test_the_schema_of_a_tool_comes_from_its_hints_and_docstring():
    function = schema_of(sample)["function"]
    assert (function["name"], function["description"]) == ("sample", "Says what it was given.")
    assert function["parameters"]["required"] == ["words", "text"]
    kinds = {
        name: (p["type"], p["description"])
        for name, p in function["parameters"]["properties"].items()
    }
    assert kinds == {
        "words": ("array", "some words"),
        "text": ("string", "a text"),
        "n": ("integer", "how many"),
        "x": ("number", "how much"),
        "flag": ("boolean", "whether"),
    }


def test_every_tool_has_a_schema_with_the_names_of_the_released_protocol():
    wanted = {"search": ["queries", "top_k"], "browse": ["url", "query"], "python": ["code"]}
    wanted |= {
        "file_reader": ["file_path"],
        "image2text": ["image_path", "query"],
        "audio2text": ["audio_path"],
    }
    found = {
        name: list(schema_of(tool)["function"]["parameters"]["properties"])
        for name, tool in TOOLS.items()
    }
    assert found == wanted


GIVEN = {"words": ["a"], "text": "b"}


@pytest.mark.parametrize(
    "arguments, meant",
    [
        ('{"words": ["a"], "text": "b"}', {}),
        ({"words": "a"}, {}),
        ({"words": '["a", "c"]'}, {"words": ["a", "c"]}),
        ({"words": "[1]"}, {"words": ["[1]"]}),
        ({"text": ["b"]}, {}),
        ({"text": 7}, {"text": "7"}),
        ({"n": "5"}, {"n": 5}),
        ({"n": " -5 "}, {"n": -5}),
        ({"n": 5.0}, {"n": 5}),
        ({"n": "5.0"}, {"n": 5}),
        ({"n": [5]}, {"n": 5}),
        ({"n": 10**20}, {"n": 10**20}),
        ({"n": None}, {}),
        ({"x": 2}, {"x": 2.0}),
        ({"x": "0.25"}, {"x": 0.25}),
        ({"flag": "True"}, {"flag": True}),
        ({"flag": "false"}, {"flag": False}),
        ({"flag": False}, {"flag": False}),
    ],
)
def test_083_harmless_slips_in_arguments_are_mended(arguments, meant):
    arguments = arguments if isinstance(arguments, str) else GIVEN | arguments
    assert repaired(sample, arguments) == GIVEN | meant


@pytest.mark.parametrize(
    "arguments, told",
    [
        (None, "JSON object, not NoneType"),
        (7, "JSON object, not int"),
        ([GIVEN], "JSON object, not list"),
        ("not json", "JSON object"),
        ("[" * 100_000, "JSON object"),
        ("7", "JSON object, not int"),
        ({"text": "b"}, "needs words"),
        (GIVEN | {"words": None}, "needs words"),
        (GIVEN | {"words": []}, "a list of texts"),
        (GIVEN | {"words": ["a", 1]}, "a list of texts"),
        (GIVEN | {"words": [["a"]]}, "a list of texts"),
        (GIVEN | {"text": {"a": 1}}, "text must be a text"),
        (GIVEN | {"text": ["a", "b"]}, "text must be a text"),
        (GIVEN | {"n": "five"}, "a whole number"),
        (GIVEN | {"n": 1.5}, "a whole number"),
        (GIVEN | {"n": True}, "a whole number"),
        (GIVEN | {"n": float("nan")}, "a whole number"),
        (GIVEN | {"n": float("inf")}, "a whole number"),
        (GIVEN | {"n": "9" * 5000}, "a whole number"),
        (GIVEN | {"x": "nan"}, "x must be a number"),
        (GIVEN | {"flag": 1}, "true or false"),
        (GIVEN | {"colour": "red"}, "does not take colour; it takes words, text, n"),
        (GIVEN | {"k" * 100_000: 1}, "does not take kkk"),
        ({1: 2}, "does not take 1"),
    ],
)
def test_083_other_arguments_are_an_error_that_says_what_was_expected(arguments, told):
    with pytest.raises(ToolError, match=told) as error:
        repaired(sample, arguments)
    assert len(str(error.value)) < 500


def test_083_whatever_the_arguments_are_a_call_gives_an_observation():
    toolbox = Toolbox(["search", "browse"])
    for arguments in (
        None,
        7,
        "x",
        [],
        {},
        {"queries": 1},
        {"queries": "x" * 1_000_000},
        {"url": "\ud800"},
        {"queries": ["\0"]},
    ):
        for name in ("search", "browse", "fly", "", None, "\x1b[1m" * 1000):
            seen = call(toolbox, name, arguments, docs=[{"title": "a", "text": "b"}])
            assert seen.status in ("ok", "error") and len(seen.text) < 10_100
            seen.text.encode()


# --------------------------------------------------------------------------------------------------
# the toolbox


class Wordless(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize(
    "raised, status, told",
    [
        (ToolError("try another"), "error", "try another"),
        (ToolFault("it is down"), "fault", "it is down"),
        (ValueError("boom"), "error", "breaks failed: ValueError: boom"),
        (StopIteration(), "error", "breaks failed"),
        (SystemExit(3), "error", "breaks failed: SystemExit"),
        (TimeoutError("too slow"), "timeout", "too slow"),
        (ValueError("x" * 10**6), "error", "xxx"),
        (asyncio.CancelledError(), "error", "breaks failed: RuntimeError: CancelledError"),
        (GeneratorExit(), "error", "GeneratorExit"),
        (BaseExceptionGroup("several", [SystemExit(1)]), "error", "BaseExceptionGroup"),
        (Wordless(), "error", "Wordless"),
    ],
)
def test_084_a_tool_that_raises_is_an_observation(added, raised, status, told):
    def breaks(context) -> str:
        """Breaks."""
        raise raised

    added(breaks)
    seen = call(Toolbox(["breaks"]), "breaks", {})
    assert seen.status == status and told in seen.text and len(seen.text) < 1000


def test_085_a_tool_that_hangs_ends_at_its_deadline_and_takes_no_place(added):
    never = threading.Event()

    def hangs(context) -> str:
        """Hangs."""
        never.wait()
        return "late"

    def works(context) -> str:
        """Works."""
        return "done"

    added(hangs, works)
    toolbox = Toolbox(["hangs", "works"], seconds_per_call=0.1, calls_in_flight=2)

    async def run():
        began = time.monotonic()
        hung = await asyncio.gather(*[toolbox.call("hangs", {}) for _ in range(4)])
        assert [seen.status for seen in hung] == ["timeout"] * 4 and time.monotonic() - began < 2.5
        assert [(await toolbox.call("works", {})).text for _ in range(3)] == ["done"] * 3
        hung = await asyncio.gather(*[toolbox.call("hangs", {}) for _ in range(5)])
        assert hung[-1].status == "fault" and "never come back" in hung[-1].text
        assert (await toolbox.call("works", {})).text == "done"  # each tool has places of its own
        never.set()
        await asyncio.sleep(0.2)
        return await toolbox.call("hangs", {})

    assert asyncio.run(run()).text == "late"
    toolbox.close()


def test_085_a_thread_that_hangs_does_not_hold_up_the_end_of_the_process():
    code = (
        "import asyncio, tools, time\n"
        "def hangs(context) -> str:\n    'Hangs.'\n    time.sleep(60)\n"
        "tools.TOOLS['hangs'] = hangs\n"
        "print(asyncio.run(tools.Toolbox(['hangs'], seconds_per_call=0.1).call('hangs', "
        "{})).status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == "timeout\n"


def test_calls_in_flight_are_bounded_for_each_tool_and_threads_are_used_again(added):
    live, most, threads = {"one": 0, "two": 0}, {"one": 0, "two": 0}, set()
    lock = threading.Lock()

    def counting(name):
        def tool(context) -> str:
            """Counts."""
            with lock:
                live[name] += 1
                most[name] = max(most[name], live[name])
                threads.add(threading.get_ident())
            time.sleep(0.01)
            with lock:
                live[name] -= 1
            return name

        tool.__name__ = name
        return tool

    added(counting("one"), counting("two"))
    toolbox = Toolbox(["one", "two"], calls_in_flight=3)

    async def run():
        return await asyncio.gather(*[toolbox.call(name, {}) for name in ["one", "two"] * 20])

    assert [seen.text for seen in asyncio.run(run())] == ["one", "two"] * 20
    assert most == {"one": 3, "two": 3} and len(threads) <= 8


@pytest.mark.parametrize("cores, most", [(1, 2), (3, 3), (64, 16)])
def test_no_more_calls_of_python_wait_than_have_a_core(cores, most, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(tools, "Sandbox", lambda **_: None)
    toolbox = Toolbox(["python", "search"])

    async def rooms():
        return [toolbox._gate(name)._value for name in ("python", "search")]

    assert asyncio.run(rooms()) == [most, 16]


def test_a_toolbox_serves_one_event_loop_after_another(added):
    added(sample)
    toolbox = Toolbox(["sample"], calls_in_flight=1)
    assert {call(toolbox, "sample", GIVEN).text for _ in range(3)} == {
        "(['a'], 'b', 1, 0.5, False)"
    }


@pytest.mark.parametrize(
    "options, told",
    [
        ({"corpus": "no"}, "no corpus"),
        ({"files_dir": "no"}, "no folder"),
        ({"block": "no/such"}, "no block list"),
        ({"replay": True}, "cache"),
        ({"allow": "a.org"}, "host:port"),
    ],
)
def test_options_that_cannot_work_are_an_error_at_the_start(options, told):
    with pytest.raises(SystemExit, match=told):
        Toolbox(["search"], **options)
    with pytest.raises(SystemExit, match="no tool named fly: there are search"):
        Toolbox(["fly"])


@pytest.mark.parametrize("names, there", [([], "There are none."), (["search"], "are search.")])
def test_a_tool_that_is_not_there_is_told_with_those_that_are(names, there):
    seen = call(Toolbox(names), "fly", {})
    assert seen.status == "error" and seen.text.startswith("There is no tool 'fly'. ")
    assert seen.text.endswith(there)


@pytest.mark.parametrize("length", [10, 100, 101, 5000])
def test_082_a_long_text_says_how_much_was_cut(length):
    text = "".join(chr(0x1F600 + i % 50) for i in range(length))  # four bytes each
    shown = capped(text, 100)
    assert shown.encode().decode() == shown
    if length <= 100:
        assert shown == text
    else:
        assert shown == f"{text[:50]}\n[… {length - 100:,} characters left out …]\n{text[-50:]}"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07x\x1b(By", "red xBy"),
        ("50%\r100%\r\nok\r", "50%\n100%\nok\n"),
        ("a\b\0\x7f\x9bb\tc", "ab\tc"),
        ("\ud800 and \udfff", "? and ?"),
        ("user\u202egnp.exe\u2066", "usergnp.exe"),
        ("hidden\U000e0041\U000e007f tag", "hidden tag"),
        ("z" + "\u0301" * 100_000 + "!", "z" + "\u0301" * 8 + "!"),
        ("naïve é e\u0301 东京 😀 שלום <b>", "naïve é e\u0301 东京 😀 שלום <b>"),
    ],
)
def test_080_text_is_fit_to_be_shown_and_kept(text, shown):
    assert clean(text) == shown and json.loads(json.dumps(shown)) == shown


def test_080_what_a_call_returns_is_clean(added):
    def dirty(context) -> str:
        """Dirty."""
        return "\x1b[31mred\0\ud800\r\n"

    added(dirty)
    assert call(Toolbox(["dirty"]), "dirty", {}).text == "red?\n"


# --------------------------------------------------------------------------------------------------
# local search


def by_the_formula(pages, query: str, top_k: int) -> list:
    """BM25 with k1 = 1.2 and b = 0.75, words of a title twice, page by page."""
    counts = [Counter(words(title) * 2 + words(text)) for title, text, _ in pages]
    mean, scores = sum(count.total() for count in counts) / len(pages), []
    for count in counts:
        norm, score = 1.2 * (0.25 + 0.75 * count.total() / mean), 0.0
        for word in sorted(set(words(query))):
            n = sum(word in other for other in counts)
            idf = math.log(1 + (len(pages) - n + 0.5) / (n + 0.5))
            score += idf * count[word] * 2.2 / (count[word] + norm)
        scores.append(score)
    best = sorted(range(len(pages)), key=lambda page: (-scores[page], page))
    return [pages[page] for page in best if scores[page] > 0][:top_k]


def test_the_corpus_and_the_index_in_memory_rank_by_the_formula(tmp_path):
    rng = random.Random(0)

    def word():
        return rng.choice("ship harbour tide moon wind rope sail anchor deck gull".split()) + str(
            rng.randrange(8)
        )

    rows = [
        {"id": str(i), "title": word(), "text": " ".join(word() for _ in range(rng.randrange(60)))}
        for i in range(400)
    ]
    corpus = Corpus(corpus_file(tmp_path, rows))
    index = Index([(row["title"], row["text"], f"doc:{row['id']}") for row in rows])
    for _ in range(100):
        query, top_k = " ".join(word() for _ in range(rng.randrange(1, 6))), rng.randrange(1, 12)
        right = by_the_formula(index.pages, query, top_k)
        assert corpus.search(query, top_k) == right == index.search(query, top_k)


def test_bm25_of_a_worked_example():
    """Two pages of 3 and 1 words: "tide" once in the first, whose weight is 2.2 / (1 + 1.2 (0.25 +
    0.75 * 3 / 2)).
    """
    arrays = postings([("", "tide moon wind"), ("", "moon")])
    tide, moon = (math.log(1 + (2 - n + 0.5) / (n + 0.5)) for n in (1, 2))
    long, short = (2.2 / (1 + 1.2 * (0.25 + 0.75 * length / 2)) for length in (3, 1))
    weights = {}
    for weight, page in zip(arrays["hit_weight"], arrays["hit_page"]):
        weights.setdefault(int(page), []).append(weight)
    assert sorted(weights[0]) == pytest.approx(sorted([tide * long, tide * long, moon * long]))
    assert weights[1] == pytest.approx([moon * short])


@pytest.mark.parametrize(
    "query, title",
    [
        ("capitals of PERU?", "Lima"),
        ("the city", "Cusco"),
        ("北京", "北京大学"),
        ("大学", "北京大学"),
        ("who", "The Who"),
        ("naïve", "Naïve"),
        ("zzz", None),
        ("", None),
        ("?!", None),
        ("\ud800", None),
    ],
)
def test_words_are_found_in_other_forms_and_scripts(tmp_path, query, title):
    pages = [
        ("Lima", "The capital of Peru."),
        ("Cusco", "Cities."),
        ("北京大学", "在北京"),
        ("The Who", ""),
        ("Naïve", ""),
    ]
    found = Index([(t, text, t) for t, text in pages]).search(query, 1)
    kept = Corpus(
        corpus_file(tmp_path, [{"id": t, "title": t, "text": text} for t, text in pages])
    ).search(query, 1)
    assert [page[0] for page in found] == [page[0] for page in kept] == ([title] if title else [])


def test_a_corpus_page_is_all_that_stands_under_its_address(tmp_path):
    corpus = Corpus(corpus_file(tmp_path))
    assert corpus.page("https://a.org/lima") == (
        "Lima",
        "The capital of Peru.\n\nFounded by Pizarro.",
    )
    assert (
        corpus.page("doc:2") == ("Cusco", "A city in the mountains of Peru.")
        and corpus.page("doc:9") is None
    )


def test_the_index_is_kept_and_built_again_when_the_corpus_changes(tmp_path, monkeypatch):
    path = corpus_file(tmp_path)
    Corpus(path)
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "_built", None)  # nothing to build
        assert Corpus(path).search("mountains", 1)[0][0] == "Cusco"
    time.sleep(0.01)
    corpus_file(tmp_path, [{"id": "1", "title": "Oslo", "text": "Fjords and mountains."}])
    assert [hit[0] for hit in Corpus(path).search("mountains", 5)] == ["Oslo"]
    time.sleep(0.01)
    Path(path).write_text(Path(path).read_text().replace("mountains", "fountains"))  # of one size
    hits = [Corpus(path).search(word, 5) for word in ("mountains", "fountains")]
    assert [[hit[0] for hit in each] for each in hits] == [[], ["Oslo"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "corpus.jsonl.bm25.npz"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[: len(b) // 2],
        lambda b: b"x" * 500,
        lambda b: b[:300] + b"\0" * 9 + b[309:],
    ],
)
def test_a_damaged_index_is_built_again(tmp_path, damage):
    path = corpus_file(tmp_path)
    Corpus(path)
    kept = Path(path + ".bm25.npz")
    kept.write_bytes(damage(kept.read_bytes()))
    assert Corpus(path).search("mountains", 1)[0][0] == "Cusco"


def test_without_a_place_for_the_index_it_stays_in_memory(tmp_path):
    path = corpus_file(tmp_path)
    Path(path + ".bm25.npz").mkdir()  # cannot be replaced by a file
    assert Corpus(path).search("mountains", 1)[0][0] == "Cusco"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "corpus.jsonl.bm25.npz"]


def test_several_processes_may_build_the_index_at_once(tmp_path):
    path = corpus_file(
        tmp_path, [{"id": str(i), "title": f"t{i}", "text": f"word{i} common"} for i in range(3000)]
    )
    code = (
        f"from toolkit import search; c = search.Corpus({path!r}); print(c.search('word7', "
        "1)[0][0], len(c.search('common', 20)))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [run.communicate(timeout=60)[0] for run in runs] == ["t7 20\n"] * 4
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"id": "1", "title": "a"}',
        '{"title": "a", "text": ""}',
        '{"id": 1, "title": 1, "text": ""}',
    ],
)
def test_a_bad_corpus_row_is_an_error_that_names_file_and_line(tmp_path, line):
    path = corpus_file(tmp_path)
    with open(path, "a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(SystemExit, match="corpus.jsonl:5: not a corpus row"):
        Corpus(path)


def test_an_empty_corpus_finds_nothing(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n")
    for _ in range(2):
        assert Corpus(str(path)).search("x", 5) == [] and Corpus(str(path)).page("x") is None


def test_a_corpus_changed_under_a_run_is_a_fault(tmp_path):
    toolbox = Toolbox(["search"], corpus=corpus_file(tmp_path))
    corpus_file(tmp_path, [{"id": "1", "title": "x" * 500, "text": ""}])
    seen = call(toolbox, "search", {"queries": "mountains"})
    assert seen.status == "fault" and "was changed" in seen.text


@pytest.fixture(scope="module")
def real_corpus(tmp_path_factory):
    if not (DATA / "corpus" / "corpus.jsonl").is_file():
        pytest.skip("needs the corpus of real paragraphs")
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    shutil.copy(DATA / "corpus" / "corpus.jsonl", path)
    began = time.process_time()
    corpus = Corpus(str(path))
    corpus.seconds = time.process_time() - began
    return corpus


def test_ten_thousand_passages_are_indexed_in_five_seconds(real_corpus):
    assert len(real_corpus.row_start) > 10_000 and real_corpus.seconds < 5


def test_both_gold_paragraphs_of_real_questions_are_among_the_first_ten(real_corpus):
    rows = [json.loads(line) for line in open(DATA / "hotpotqa" / "train100_distractor.jsonl")]
    began, found = time.perf_counter(), 0
    for row in rows:
        hits = {(title, text) for title, text, _ in real_corpus.search(row["question"], 10)}
        gold = {title for title, _ in row["supporting_facts"]}
        found += all(
            (p["title"], p["text"]) in hits for p in row["paragraphs"] if p["title"] in gold
        )
    seconds = time.perf_counter() - began
    print(f"recall@10 of both: {found / len(rows):.2f}; {len(rows) / seconds:.0f} queries a second")
    assert found / len(rows) >= 0.68 and len(rows) / seconds >= 100


# --------------------------------------------------------------------------------------------------
# search and browse, where they look and what they show


def test_a_row_with_docs_is_searched_there_alone(tmp_path):
    (tmp_path / "block").write_text("doc:\n")
    toolbox = Toolbox(
        ["search", "browse"], corpus=corpus_file(tmp_path), block=str(tmp_path / "block")
    )
    docs = [{"title": "Ada", "text": "lives in Rome."}, {"title": "Ada", "text": "Born in Nice."}]
    assert call(toolbox, "search", {"queries": ["Peru", "rome"]}, docs=docs).text == (
        'No results for "Peru".\n\nResults for "rome":\n1. Ada (doc:Ada)\nlives in Rome.'
    )
    none = call(toolbox, "search", {"queries": ["mountains"]}, docs=[])
    assert none.text == 'No results for "mountains".'  # nor where it has none
    assert (
        call(toolbox, "browse", {"url": "doc:Ada"}, docs=docs).text
        == "Ada\n\nlives in Rome.\n\nBorn in Nice."
    )
    assert (
        call(toolbox, "browse", {"url": "https://a.org/lima"}, docs=docs).status == "error"
        and toolbox.web.blocklist.count == 0
    )


def test_a_corpus_is_searched_before_the_web(tmp_path, monkeypatch):
    with web_server(SPOKEN["serper"](HITS)) as server:
        setting(monkeypatch, environ_of("serper", server))
        toolbox = Toolbox(["search", "browse"], corpus=corpus_file(tmp_path), allow=server.host)
        assert call(toolbox, "search", {"queries": "mountains"}).text.startswith(
            'Results for "mountains":\n1. Cusco (doc:2)'
        )
        assert (
            call(toolbox, "browse", {"url": " doc:2 "}).text
            == "Cusco\n\nA city in the mountains of Peru."
        )
        assert "no page" in call(toolbox, "browse", {"url": server.url}).text and server.seen == []


def test_074_blocked_addresses_of_a_corpus_are_hidden_and_counted(tmp_path):
    (tmp_path / "block").write_text("a.org\n")
    toolbox = Toolbox(
        ["search", "browse"], corpus=corpus_file(tmp_path), block=str(tmp_path / "block")
    )
    assert "1. Cusco" in call(toolbox, "search", {"queries": "peru"}).text
    assert (
        call(toolbox, "browse", {"url": "https://a.org/lima"}).status == "error"
        and toolbox.web.blocklist.count == 2
    )


@pytest.mark.parametrize("top_k, shown", [(-1, 1), (0, 1), (10**9, 20), ("7", 7), (3.0, 3)])
def test_075_the_number_of_results_is_clamped(tmp_path, top_k, shown):
    rows = [{"id": str(i), "title": f"t{i}", "text": "word"} for i in range(30)]
    seen = call(
        Toolbox(["search"], corpus=corpus_file(tmp_path, rows)),
        "search",
        {"queries": "word", "top_k": top_k},
    )
    assert seen.text.count("(doc:") == shown


def test_075_a_number_beyond_all_measure_is_an_observation(tmp_path):
    seen = call(
        Toolbox(["search"], corpus=corpus_file(tmp_path)),
        "search",
        {"queries": "peru", "top_k": 10**400},
    )
    assert (seen.status, seen.text) == ("error", "search: top_k must be a whole number.")


def test_075_many_and_empty_queries(tmp_path):
    toolbox = Toolbox(["search"], corpus=corpus_file(tmp_path))
    text = call(toolbox, "search", {"queries": ["", " ", "x" * 10_000] + ["peru"] * 997}).text
    assert text.startswith('No results for "".\n\nNo results for " ".') and len(text) < 10_100
    assert text.endswith("[990 queries left out: a call takes 10]")
    assert text.count("esults for ") == 10


def test_075_without_anything_to_search_a_call_is_a_fault(monkeypatch):
    setting(monkeypatch, {})
    seen = call(Toolbox(["search"]), "search", {"queries": ["x"]})
    assert seen.status == "fault" and "--corpus" in seen.text


def test_075_a_search_of_the_web_side_by_side_in_the_order_of_the_queries(monkeypatch):
    met = threading.Barrier(5, timeout=5)

    def page(request):
        met.wait()
        return SPOKEN["serper"]([(json.loads(request.body)["q"], "https://a.org/", "x")])[
            "/search"
        ](request)

    with web_server({"/search": page}) as server:
        setting(monkeypatch, environ_of("serper", server))
        seen = call(Toolbox(["search"]), "search", {"queries": list("abcde"), "top_k": 1})
    assert seen.text == "\n\n".join(
        f'Results for "{q}":\n1. {q} (https://a.org/)\nx' for q in "abcde"
    )


def test_075_a_provider_that_is_down_marks_the_call_a_fault_within_its_time(monkeypatch):
    with web_server({"*": (500, {}, "")}) as server:
        setting(monkeypatch, environ_of("serper", server))
        seen = call(Toolbox(["search"], seconds_per_call=1), "search", {"queries": ["a", "b"]})
    assert seen.status == "fault" and seen.seconds < 2


PAGE = "".join(
    f"<p>Harbour {i} has {i * 3} ships and a {'lighthouse' if i == 70 else 'crane'} of its own, as "
    "the books say.</p>"
    for i in range(300)
)
PAGE = f"<html><title>Ports</title><article>{PAGE}</article></html>"


def test_a_long_page_shows_its_start_or_the_passages_that_match():
    with web_server({"/": PAGE}) as server:
        toolbox = Toolbox(["browse"], allow=server.host, output_chars=4000)
        start = call(toolbox, "browse", {"url": server.url}).text
        match = call(
            toolbox, "browse", {"url": server.url, "query": "Which harbour has a lighthouse?"}
        ).text
        none = call(toolbox, "browse", {"url": server.url, "query": "zebra"}).text
    assert (
        start.startswith("Ports\n\nHarbour 0 has")
        and "characters left out: a query" in start
        and "lighthouse" not in start
    )
    assert "Harbour 70 has 210 ships and a lighthouse" in match and match.startswith(
        "Ports\n[the passages"
    )
    assert none == start and max(len(start), len(match)) <= 4000


def test_the_passages_of_a_query_are_shorter_than_the_page_that_may_be_shown():
    with web_server({"/": "<article>" + "<p>The tide is high here.</p>" * 4000}) as server:
        toolbox = Toolbox(["browse"], allow=server.host)
        lengths = [
            len(call(toolbox, "browse", {"url": server.url, "query": query}).text)
            for query in ("tide", "zebra")
        ]
    assert 3000 < lengths[0] <= tools.PASSAGE_CHARS + 200 and 9000 < lengths[1] <= 10_000


def test_passages_keep_the_order_of_the_text_and_their_bound():
    text = "\n".join(
        f"paragraph {i} about {'tides' if i in (3, 30) else 'sand'} " + "and more " * 80
        for i in range(40)
    )
    found = passages(text, "tide", 2000)
    assert (
        found.index("paragraph 3 ") < found.index("paragraph 30 ")
        and "[…]" in found
        and len(found) <= 2000
    )
    assert passages(text, "zebra", 2000) == "" == passages("", "tide", 2000)
    assert len(passages("tide " * 10_000, "tide", 2000)) <= 2000


def test_a_summariser_answers_from_the_whole_page(monkeypatch):
    def page(request):
        asked = json.loads(request.body)["messages"][-1]["content"]
        return json.dumps(
            {"choices": [{"message": {"content": f"lighthouse: {'a lighthouse of' in asked}"}}]}
        )

    with web_server({"/": PAGE, "/v1/chat/completions": page}) as server:
        setting(monkeypatch, {"SUMMARY_URL": server.url + "/v1", "SUMMARY_MODEL": "small"})
        toolbox = Toolbox(["browse"], allow=server.host)
        assert (
            call(toolbox, "browse", {"url": server.url, "query": "lighthouse"}).text
            == "Ports\n\nlighthouse: True"
        )
        assert call(toolbox, "browse", {"url": server.url}).text.startswith(
            "Ports\n\nHarbour 0 has"
        )


class Pages:
    """A web of one page with a summariser that says what it was given."""

    settings = {"summary": "small"}

    def __init__(self, text):
        self.text = text

    def page(self, url, seconds):
        return "Title", self.text

    def answer(self, url, text, query, seconds):
        return f"{url}|{query}|{text}"


@pytest.mark.parametrize("size", [999, 1000, 1001, 9000])
@pytest.mark.parametrize("query", ["tides", "zebra"])
def test_a_summariser_gets_the_whole_page_else_what_matches_else_its_beginning(
    size, query, monkeypatch
):
    monkeypatch.setattr(tools, "SUMMARY_CHARS", 1000)
    text = "".join(f"sand {i}\n" for i in range(size))[: size - 12] + "\nof tides now"[:12]
    said = tools.browse(Context(web=Pages(text)), " http://a.org ", query)
    head, _, given = said.rpartition("|")
    assert head == f"Title\n\nhttp://a.org|{query}"
    if size <= 1000:
        assert given == text
    elif query == "tides":
        assert "tides" in given and given.removeprefix("[…]\n") in text and len(given) <= 1000
    else:
        assert given == text[:1000]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/",
        "http://localhost/",
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
    ],
)
def test_060_a_closed_address_is_the_models_error_at_once(url):
    seen = call(Toolbox(["browse"]), "browse", {"url": url})
    assert seen.status == "error" and seen.seconds < 1 and "root:" not in seen.text


def test_067_a_page_that_drips_ends_within_the_time_of_the_call():
    def drip(request):
        for _ in range(100):
            request.wfile.write(b"a")
            time.sleep(0.1)

    with web_server({"/": drip}) as server:
        seen = call(
            Toolbox(["browse"], allow=server.host, seconds_per_call=0.5),
            "browse",
            {"url": server.url},
        )
    assert seen.status == "error" and "too long" in seen.text and seen.seconds < 1.5


def test_a_replay_gives_the_same_observations_without_the_network(tmp_path, monkeypatch):
    cache = str(tmp_path / "calls.sqlite")
    calls = [
        ("search", {"queries": ["a", "b"]}),
        ("browse", {"query": "lighthouse"}),
        ("browse", {}),
    ]
    with web_server(SPOKEN["serper"](HITS) | {"/": PAGE}) as server:
        calls = [(name, a if name == "search" else a | {"url": server.url}) for name, a in calls]
        calls.append(("browse", {"url": server.url + "/missing"}))
        setting(monkeypatch, environ_of("serper", server))
        first = Toolbox(["search", "browse"], cache=cache, allow=server.host)
        seen = [call(first, *each) for each in calls]
    setting(monkeypatch, {})
    again = Toolbox(["search", "browse"], cache=cache, replay=True)
    assert [s.status for s in seen] == ["ok", "ok", "ok", "error"]
    assert [(s.text, s.status) for s in (call(again, *each) for each in calls)] == [
        (s.text, s.status) for s in seen
    ]
    missed = call(again, "search", {"queries": ["c"]})
    assert (
        missed.status == "fault" and "no answer for search" in missed.text and '"c"' in missed.text
    )


# --------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize(
    "path, found",
    [
        ("a/one.txt", "a/one.txt"),
        ("one.txt", "a/one.txt"),
        ("/data/one.txt", "a/one.txt"),
        (" b.zip::x/y.csv", "b.zip::x/y.csv"),
        ("two.txt", None),
        ("../secret.txt", None),
        ("", None),
        ("same.txt", None),  # two of that name
        ("c/same.txt", "c/same.txt"),
    ],
)
def test_044_a_row_that_names_its_files_opens_no_other(path, found):
    context = Context(files_dir="/f", files=("a/one.txt", "b.zip", "c/same.txt", "d/same.txt"))
    if found is None:
        with pytest.raises(ToolError, match="its files: a/one.txt, b.zip"):
            tools._file(context, path)
    else:
        assert tools._file(context, path) == ("/f", found)


def test_without_a_folder_for_files_reading_one_is_a_fault():
    seen = call(Toolbox(["file_reader"]), "file_reader", {"file_path": "a.txt"})
    assert seen.status == "fault" and "--files_dir" in seen.text


def test_a_file_is_read_through_the_toolbox(tmp_path):
    pytest.importorskip("toolkit.files")
    (tmp_path / "a.txt").write_text("the tide is at noon")
    (tmp_path / "b.txt").write_text("another row's")
    toolbox = Toolbox(["file_reader"], files_dir=str(tmp_path))
    assert (
        "the tide is at noon"
        in call(toolbox, "file_reader", {"file_path": "a.txt"}, files=["a.txt"]).text
    )
    assert call(toolbox, "file_reader", {"file_path": "b.txt"}, files=["a.txt"]).status == "error"
    assert call(toolbox, "file_reader", {"file_path": "../a.txt"}).status == "error"


def test_what_a_toolbox_is_told_reaches_its_parts_and_every_call(added, monkeypatch, tmp_path):
    """Each option has a value of its own, so that none can stand in for another."""
    parts, seen = {}, []

    def part(name):
        def make(*args, **options):
            parts[name] = args, options
            return name

        return make

    def looks(context) -> str:
        """Looks."""
        seen.append((context, context.left()))
        return "x" * 999

    for name in ("Corpus", "Web", "Sandbox"):
        monkeypatch.setattr(tools, name, part(name))
    added(looks)
    own = dict(corpus="c", seconds_per_call=7.0, output_chars=300, unsafe_python=True, block="b")
    own |= dict(files_dir=str(tmp_path), cache="d", replay=True, allow="a")
    toolbox = Toolbox(["python", "looks"], **own)
    assert parts["Corpus"] == (("c",), {})
    assert parts["Web"] == ((), dict(allow="a", block="b", cache="d", replay=True))
    assert parts["Sandbox"] == ((), dict(seconds=7.0, output_chars=300, unsafe=True))
    docs = [{"title": "t", "text": "x"}]
    for given, held in (
        ({}, (None, None)),
        (dict(docs=docs, files=["f"]), ((("t", "x"),), ("f",))),
    ):
        told = call(toolbox, "looks", {}, **given)
        context, left = seen.pop()
        assert (context.docs, context.files) == held
        assert (context.corpus, context.web, context.sandbox) == ("Corpus", "Web", "Sandbox")
        assert (context.files_dir, context.output_chars) == (str(tmp_path), 300)
        assert 1 < left <= 7 and told.text == capped("x" * 999, 300)


# --------------------------------------------------------------------------------------------------
# python through the toolbox, and the command line


@needs_bubblewrap
@pytest.mark.parametrize(
    ("tools", "row", "told"),
    [
        ("search", {}, "nothing to search"),
        ("search", {"docs": None}, "nothing to search"),  # nulls are absent
        ("search", {"docs": []}, None),
        ("search", {"docs": [], "files": None}, None),
        ("python", {}, None),
        ("search,file_reader", {"docs": [], "files": ["a.txt"]}, None),
        ("search", {"docs": [], "files": ["a.txt"]}, "row q has files"),
    ],
)
def test_rows_that_the_tools_cannot_serve_are_refused_before_work_starts(
    tmp_path, monkeypatch, tools, row, told
):
    for key in [key for key in os.environ if key.endswith(("_API_KEY", "_URL"))]:
        monkeypatch.delenv(key)
    toolbox = Toolbox(tools.split(","), files_dir=str(tmp_path))
    with (
        pytest.raises(SystemExit, match=f"rows.jsonl: {told}") if told else contextlib.nullcontext()
    ):
        toolbox.check_rows([{"id": "q", **row}], "rows.jsonl")
    toolbox.close()


def test_what_python_code_does_wrong_is_told_apart():
    toolbox = Toolbox(["python"], seconds_per_call=2)
    codes = {"print(1 + 1)": "ok", "1 / 0": "error", "while True: pass": "timeout"}
    assert {code: call(toolbox, "python", {"code": code}).status for code in codes} == codes
    toolbox.close()


@needs_bubblewrap
@pytest.mark.slow
def test_python_through_the_toolbox_keeps_the_pace_of_the_sandbox():
    toolbox = Toolbox(["python"])

    async def run(count):
        return await asyncio.gather(
            *[toolbox.call("python", {"code": f"print({i})"}) for i in range(count)]
        )

    asyncio.run(run(32))  # warm
    began = time.perf_counter()
    seen = asyncio.run(run(480))
    rate = 480 / (time.perf_counter() - began)
    with ThreadPoolExecutor(16) as pool:
        began = time.perf_counter()
        list(pool.map(toolbox.sandbox.run, ["print(1)"] * 480))
        alone = 480 / (time.perf_counter() - began)
    toolbox.close()
    print(f"{rate:.0f} calls a second at 16 in flight, {alone:.0f} without the toolbox")
    assert [s.text.strip() for s in seen] == [str(i) for i in range(480)]
    assert rate > 0.5 * alone


def shell(*arguments):
    environ = {
        name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_URL"))
    }
    return subprocess.run(
        [sys.executable, "tools.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environ,
        timeout=60,
    )


def test_a_tool_runs_from_the_shell(tmp_path):
    done = shell(
        "search",
        '{"queries": "mountains", "top_k": 1}',
        f"--corpus={corpus_file(tmp_path)}",
        "--output_chars=500",
    )
    assert done.returncode == 0 and "[ok," in done.stderr
    assert (
        done.stdout
        == 'Results for "mountains":\n1. Cusco (doc:2)\nA city in the mountains of Peru.\n'
    )


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["search"], "usage: python tools.py"),
        (["fly", "{}"], "no tool named fly"),
        (["search", "{}", "--colour=red"], "unknown key 'colour'"),
        (["search", "{}", "--seconds_per_call=many"], "seconds_per_call"),
        (["browse", '{"url": "http://127.0.0.1/"}'], "[error,"),
        (["browse", '{"url": "http://127.0.0.1/"}', "--replay"], "replay"),
    ],
)
def test_from_the_shell_what_is_wrong_is_said_and_the_status_is_not_zero(arguments, told):
    done = shell(*arguments)
    assert done.returncode and told in done.stderr and "Traceback" not in done.stderr
