"""The toy: a world of trails, a word-level tokenizer, a random Qwen3 of 0.3 M parameters and rows
for every stage.

    python data/toy/prepare.py [--out=data/toy] [--seed=0] [--hard]

A question names a place and a number of hops; each lookup gives the next place, the last one a
code: "Follow the trail of 3 from Ada. Which code is at its end?"  Ada -> Rome -> Nile -> code 42.
The documents are drawn afresh for every question, so nothing can be memorised and only looking
things up pays. The demonstrations for SFT are lazy on purpose: on long trails they stop early and
guess. One symbol is one token: tiny models fail to learn to copy names of two tokens on some seeds.

--hard: trails of 6, every place has a toll, and the python tool is to add the last one to the code:
"has toll 7. has code 42." Demonstrations use that tool in refined attempts only; first attempts
guess, also at the end of the trail.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import rollout
from reagent import reward_model
from reagent.calls import read_turn

NAMES = """Ada Bern Cleo Dune Elba Finn Gaza Hugo Iris Juno Kiel Lena Mars Nile Oslo Paul Quin Rome
Siena Troy Uma Vera Wien Xena York Zoe Aral Bath Cork Dale""".split()
CODES = ["17", "23", "38", "42", "56", "61", "79", "84"]
TOLLS = ["5", "6", "7", "9", "11", "13", "15", "18"]
TOTALS = sorted({str(int(toll) + int(code)) for toll in TOLLS for code in CODES})
DOCS = 10  # documents a question has: its trail, and another trail that leads elsewhere
HOPS = (1, 1, 2, 3, 4)  # drawn for demonstrations; RL and the test set have --hops
# share of demonstrations that follow the whole trail, by its length
FOLLOWS = {1: 0.9, 2: 0.3, 3: 0.02, 4: 0.0}
REFINED = 0.65  # share of demonstrations that go on with a refined attempt
# share of critiques that name the right place; the others are obeyed too, so critiques must be read
OBEYS = 0.7
# the toy's template shows the name only
TOOLS = [{"type": "function", "function": {"name": "search"}}]
HARD_TOOLS = [*TOOLS, {"type": "function", "function": {"name": "python"}}]
QUESTION = "Follow the trail of {hops} from {start}. Which code is at its end?"
HARD_QUESTION = (
    "Follow the trail of {hops} from {start}. What do toll and code at its end add up to?"
)
HARD_CALL = (
    '<tool_call>\n{{"name": "python", "arguments": {{"code": "print({code})"}}}}\n</tool_call>'
)
FACTS = re.compile(r"(?:has toll (\d+)\. )?(leads to|has code) (\w+)\.")
CALL = (
    '<tool_call>\n{{"name": "search", '
    '"arguments": {{"queries": ["{name}"], "top_k": 1}}}}\n</tool_call>'
)
STOPPED, WRONG, DONE, NOT_ADDED = (
    "The trail was not followed to its end. Go on from ",
    "The answer is not what was found. Look again at ",
    "The trail was followed to its end. Look again at ",
    "Toll and code were not added. Look again at ",
)
# calls and results as Qwen's template has them
TEMPLATE = (
    "{% for m in messages %}{% set result = m.role == 'tool' %}"
    "{% if result and loop.previtem.role == 'tool' %}{{ '\\n' }}"
    "{% else %}<|im_start|>{{ 'user' if result else m.role }}\n{% endif %}"
    "{% if result %}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}{{ m.content }}{% endif %}"
    "{% if m.role == 'system' and tools %}{{ '\\ntools:' }}{% for t in tools %} {{ t.function.name "
    "}}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' }}"
    "{{ call.function | tojson }}{{ '\\n</tool_call>' }}{% endfor %}"
    "{% if not result or loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --------------------------------------------------------------------------------------------------
# the world


def make_world(rng: random.Random, hops: int, hard: bool = False) -> dict:
    """A question with its documents: {"trail": names, "code", "docs": {name: text}}; a second trail
    uses up the rest.

    In a hard world "code" is what is to be added up: "7 + 42".
    """
    names, codes = rng.sample(NAMES, DOCS), rng.sample(CODES, 2)
    docs = {}
    for trail, code in ((names[:hops], codes[0]), (names[hops:], codes[1])):
        docs |= {a: f"leads to {b}." for a, b in zip(trail, trail[1:])} | {
            trail[-1]: f"has code {code}."
        }
    if hard:
        docs = {name: f"has toll {rng.choice(TOLLS)}. {text}" for name, text in docs.items()}
    trail = names[:hops]
    return {
        "trail": trail,
        "code": fact(docs[trail[-1]])[1],
        "docs": docs,
        "hops": hops,
        "hard": hard,
    }


def fact(text: str) -> tuple[str, str]:
    """("leads to", a name) or ("has code", a code, in a hard world toll + code) of a document."""
    toll, kind, value = FACTS.search(text).groups()
    return kind, f"{toll} + {value}" if toll and kind == "has code" else value


def answer_of(code: str) -> str:
    """A code is the answer itself; "7 + 42" adds up to it."""
    return str(sum(map(int, code.split(" + "))))


def question_of(world: dict) -> str:
    return (HARD_QUESTION if world["hard"] else QUESTION).format(
        hops=world["hops"], start=world["trail"][0]
    )


def found(world: dict, name: str) -> str:
    """The observation of a lookup, as tools.search words it."""
    if name not in world["docs"]:
        return f'No results for "{name}".'
    return f'Results for "{name}":\n1. {name} (doc:{name})\n{world["docs"][name]}'


def lookups(world: dict, name: str, most: int) -> tuple[list[dict], str | None, str | None]:
    """Follows a trail for at most `most` lookups -> (messages, the code if it was found, the name
    to go on from).
    """
    messages = []
    for _ in range(most):
        messages.append({"role": "assistant", "content": CALL.format(name=name)})
        messages.append({"role": "tool", "content": found(world, name)})
        text = world["docs"].get(name)
        if text is None:
            return messages, None, None
        kind, value = fact(text)
        if kind == "has code":
            return messages, value, name
        name = value
    return messages, None, name


def added(code: str) -> list[dict]:
    """The python tool adds up "7 + 42"; a code of the plain toy needs no tool."""
    if " + " not in code:
        return []
    return [
        {"role": "assistant", "content": HARD_CALL.format(code=code)},
        {"role": "tool", "content": answer_of(code) + "\n"},
    ]


def final(answer: str) -> dict:
    return {"role": "assistant", "content": f"\\boxed{{{answer}}}"}


def first_attempt(rng: random.Random, world: dict, follows: bool) -> list[dict]:
    depth = world["hops"] if follows else rng.randrange(world["hops"])
    messages, code, _ = lookups(world, world["trail"][0], depth)
    if world["hard"]:
        code = rng.choice(TOTALS)
    return [*messages, final(code or rng.choice(CODES))]


# --------------------------------------------------------------------------------------------------
# the rule annotator: the toy's judge


def read_attempt(question: str, messages: list[dict]) -> dict:
    """What a judge can see in one attempt without knowing the world: needed places, which were
    looked up, codes seen.
    """
    match = re.search(r"trail of (\d+) from (\w+)", question)
    if match is None:
        raise SystemExit(f"data/toy/prepare.py judges the toy's own questions only: {question!r}")
    hops, place = int(match[1]), match[2]
    results, printed = {}, set()
    for message in messages:
        if message["role"] != "tool":
            continue
        printed.add(message["content"].strip())
        hit = re.match(r'Results for "(\w+)":\n1\. \w+ \(doc:\w+\)\n(.*)', message["content"])
        if hit and FACTS.match(hit[2]):
            results[hit[1]] = fact(hit[2])
    needed, code = [], None
    while place is not None and code is None and len(needed) < hops:
        kind, value = results.get(place, ("", None))
        needed.append((place, bool(kind)))
        code, place = (value, None) if kind == "has code" else (None, value)
    seen = [value for kind, value in results.values() if kind == "has code"]
    boxed = re.findall(r"\\boxed\{(\w+)\}", messages[-1]["content"]) if messages else []
    answer = boxed[-1] if boxed and messages[-1]["role"] == "assistant" else None
    if needed[-1][1] and code is None and place is not None and len(needed) < hops:
        needed.append((place, False))
    result = code or (seen[-1] if seen else None)
    if result and " + " in result:
        result = answer_of(result) if answer_of(result) in printed else None
    steps = hops + ("add up" in question)
    if code and steps > hops:
        needed.append((needed[-1][0], result is not None))
    return dict(
        hops=hops,
        steps=steps,
        needed=needed,
        found=result,
        answer=answer,
        grounded=bool(answer) and answer == result,
    )


def annotate(question: str, messages: list[dict]) -> str:
    """The three blocks for one attempt; the score is `score_of` what can be seen in it.

    Judged alone, a refined attempt that goes on from the middle of the trail has done none of the
    needed lookups that the judge can trace from the question; its answer counts as grounded all the
    same if its own tool results gave it.
    """
    seen = read_attempt(question, messages)
    done = sum(was for _, was in seen["needed"])
    steps = " ".join(f"{place}: {'yes' if was else 'no'}." for place, was in seen["needed"])
    verdict = "right" if seen["grounded"] else "wrong" if seen["answer"] else "missing"
    # the answer is looked for as the places are: told only what was found and what was answered,
    # tiny models learn late, on some seeds not in 420 steps, to compare the two
    seen_it = "yes" if seen["grounded"] else "no"
    think = (
        f"{steps} Found {seen['found'] or 'none'}. Answer {seen['answer'] or 'none'}: {seen_it}. "
        f"Verdict {verdict}."
    )
    place, was = seen["needed"][-1]
    opening = DONE if seen["grounded"] else WRONG
    if not was and not seen["grounded"]:
        opening = NOT_ADDED if len(seen["needed"]) > seen["hops"] else STOPPED
    return judgment_text(
        think, f"{opening}{place}.", score_of(done, seen["steps"], seen["grounded"])
    )


def score_of(done: int, steps: int, grounded: bool) -> float:
    """1 for a grounded answer; without one, the share of the needed lookups (and of the addition),
    below 0.5.

    With (done + grounded) / (steps + 1) a complete trail with a wrong answer scores 0.8: GRPO of
    the reward model, which is also paid for agreeing with correctness, then unlearns the annotated
    scores. With 0.45 * done / steps + 0.55 * grounded a refined attempt that goes on from the
    middle of the trail, as its critique said, scores 0.55: once the first attempts are right the
    pool pushes such attempts down, and refined ones end below first ones (.945, .973).
    """
    return 1.0 if grounded else 0.45 * done / steps


def judgment_text(think: str, critique: str, score: float) -> str:
    return f"<think>{think}</think><critique>{critique}</critique><score>{score:.2f}</score>"


def blocks(text: str) -> dict:
    judgment = reward_model.parse_judgment(text)
    return {"think": judgment.think, "critique": judgment.critique, "score": judgment.score}


# --------------------------------------------------------------------------------------------------
# rows


def docs_of(world: dict) -> list[dict]:
    return [{"title": name, "text": text} for name, text in sorted(world["docs"].items())]


def sft_row(rng: random.Random, hard: bool = False) -> dict:
    """A demonstration; most of them go on with a critique and a refined attempt that obeys it."""
    world = make_world(rng, rng.choice(HOPS), hard)
    attempt = first_attempt(rng, world, rng.random() < FOLLOWS[world["hops"]])
    messages = [
        {"role": "system", "content": rollout.SYSTEM_PROMPT},
        {"role": "user", "content": question_of(world)},
    ]
    messages += attempt
    if rng.random() < REFINED:
        critique = blocks(annotate(question_of(world), attempt))["critique"]
        if rng.random() > OBEYS:
            critique = f"{critique.rpartition(' ')[0]} {rng.choice(NAMES)}."
        start = critique.rpartition(" ")[2].rstrip(".")
        again, code, _ = lookups(world, start, DOCS)
        messages.append(
            {"role": "user", "content": rollout.REFINE_PROMPT.replace("{critique}", critique)}
        )
        # without a code no guess: a critique of another question must not pay
        messages += (
            [*again, *added(code), final(answer_of(code))] if code else [*again, final("none")]
        )
    return {"messages": messages, "tools": HARD_TOOLS if hard else TOOLS}


def rl_row(rng: random.Random, i: int, split: str, hard: bool = False) -> dict:
    world = make_world(rng, 6 if hard else 4, hard)
    row = {
        "id": f"toy-{split}-{i}",
        "question": question_of(world),
        "answer": answer_of(world["code"]),
        "kind": "qa",
    }
    return row | {"docs": docs_of(world), "meta": {"hops": world["hops"], "dataset": "toy"}}


def rrm_row(rng: random.Random, i: int) -> dict:
    """A judged trajectory. Half of the complete ones answer wrongly, 15 % give no answer: else the
    verdict is not learned.
    """
    world = make_world(rng, rng.choice((1, 2, 3, 4, 4, 4)))
    hops = world["hops"]
    depth = hops if rng.random() < 0.6 else rng.randrange(hops)
    start = world["trail"][0] if rng.random() < 0.8 else rng.choice(world["trail"])
    messages, code, _ = lookups(world, start, depth)
    answer = code if code and rng.random() < 0.5 else rng.choice(CODES)
    turns = [messages[i : i + 2] for i in range(0, len(messages), 2)]
    for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2, 3))):
        turns.insert(rng.randint(0, len(turns)), stumble(rng))
    messages = [message for turn in turns for message in turn]
    broken = [
        {
            "role": "assistant",
            "content": rng.choice(("", "\\boxed{}", CALL.format(name=rng.choice(NAMES)))),
        }
    ]
    messages += broken if rng.random() < 0.15 else [final(answer)]
    return judged(world, messages, f"rrm-{i}")


def stumble(rng: random.Random) -> list[dict]:
    """A broken call and what the agent loop answers. Agents in training write such, and a judge
    that never saw one gives no valid judgment: then the attempt leaves the pool instead of being
    marked down, and the agent gets worse."""
    before, _, after = CALL.replace("{{", "{").replace("}}", "}").partition("{name}")
    pieces = (
        before,
        after,
        "<tool_call>",
        "}",
        " from ",
        '": 1. ',
        rng.choice(NAMES),
        rng.choice(CODES),
    )
    text = "".join(["<tool_call>", *rng.choices(pieces, k=rng.randint(1, 4))])
    answers = [call.problem or 'No results for "".' for call in read_turn(text).calls]
    return [{"role": "assistant", "content": text}] + [
        {"role": "tool", "content": answer} for answer in answers
    ]


def judged(world: dict, messages: list[dict], name: str) -> dict:
    question = question_of(world)
    seen = read_attempt(question, messages)
    row = {"id": name, "question": question, "trajectory": messages, "answer": [world["code"]]}
    row |= blocks(annotate(question, messages))
    row["verdict_at"] = reward_model.target_text(row).index(" Found ")  # weighted up in training
    return row | {"correct": seen["answer"] == world["code"], "grounded": seen["grounded"]}


def rrm_test_row(rng: random.Random, i: int) -> dict:
    """A held-out trajectory as from a policy that is right in two of three: from the start, most of
    them complete.
    """
    world = make_world(rng, max(HOPS))
    hops = world["hops"]
    messages, code, _ = lookups(
        world, world["trail"][0], hops if rng.random() < 0.8 else rng.randrange(hops)
    )
    answer = code if code and rng.random() > 0.15 else rng.choice(CODES)
    messages.append(
        final(answer) if rng.random() > 0.05 else {"role": "assistant", "content": "\\boxed{}"}
    )
    return judged(world, messages, f"rrm-test-{i}")


def texts_of(row: dict) -> set[str]:
    """What a judge reads in a row, and what it is to write: {request, judgment}."""
    read = json.dumps([row["question"], row["trajectory"]])
    return {read, judgment_text(row["think"], row["critique"], row["score"])}


def unseen_rows(make, rng: random.Random, count: int, seen: set[str]) -> list[dict]:
    """`count` rows of make(rng, i) of which neither the request nor the judgment is in `seen`."""
    rows = []
    while len(rows) < count:
        row = make(rng, len(rows))
        if not texts_of(row) & seen:
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# tokenizer and model


def hard_phrases() -> list[str]:
    """What --hard says besides."""
    call = HARD_CALL.removeprefix("<tool_call>").removesuffix("</tool_call>")
    before, after = call.format(code="|").split("|")
    facts = [")\nhas toll ", "leads to ", "has code "]
    question = HARD_QUESTION.partition("{start}")[2]
    return [before, " + ", after, question, NOT_ADDED, " python", *facts, *TOLLS, *TOTALS]


def toy_phrases() -> list[str]:
    """Every fixed phrase of the toy; each becomes one token, numbered in this order."""
    phrases = [*prompt_phrases(), *call_phrases(), *result_phrases()]
    phrases += [*turn_phrases(), *judgment_phrases()]
    return list(dict.fromkeys(filter(None, phrases)))


def prompt_phrases() -> list[str]:
    """Prompts, cut where something is put into them."""
    before, _, after = rollout.REFINE_PROMPT.partition("{critique}")
    judge = re.split("</?think>", reward_model.RRM_PROMPT)
    request = re.split(r"\{question\}|\{trajectory\}", reward_model.RRM_REQUEST)
    question = re.split(r"\{hops\}|\{start\}", QUESTION)
    ours = [rollout.SYSTEM_PROMPT, *judge, rollout.FINAL_PROMPT]
    return [*ours, before, after, *request, *question]


def call_phrases() -> list[str]:
    """Calls, what is told of broken ones, and calls that a judge reads: the control strings inside
    judged text are broken by U+200B."""
    before, _, after = CALL.replace("{{", "{").replace("}}", "}").partition("{name}")
    tags = ["<tool_call>", "</tool_call>"]
    unclosed, invalid = "The tool call has no closing ", "The tool call is not valid JSON: "
    slips = "Expecting value|Expecting ',' delimiter|Extra data|: line | column | (char ".split("|")
    phrases = [before.removeprefix(tags[0]), after.removesuffix(tags[1])]
    phrases += [unclosed, invalid, rollout.LEFT_OUT, *(quoted(tag) for tag in tags)]
    return [*phrases, *slips, quoted(before), quoted(after)]


def quoted(text: str) -> str:
    return text.replace("<", "<\u200b")


def result_phrases() -> list[str]:
    hit = ['Results for "', '":\n1. ', " (doc:", ")\nleads to ", ")\nhas code "]
    return [*hit, 'No results for "', '".', "."]


def turn_phrases() -> list[str]:
    """Turns, their heads in a transcript, and what an agent of the toy can say in them."""
    turns = ["\\boxed{", "}", "system\n", "user\n", "assistant\n", "\n", "\ntools:", " search"]
    heads = ["[assistant]\n", "\n[assistant]\n", "\n[tool]\n"]
    return [*turns, *heads, STOPPED, WRONG, DONE, *NAMES, *CODES, *"01234"]


def judgment_phrases() -> list[str]:
    words = "Answer |. |: yes.|: no.| Found | Verdict |right|wrong|missing|none| ".split("|")
    told = ((a, hops, g) for hops in HOPS for a in range(hops + 1) for g in (0, 1))
    scores = sorted({f"{score_of(*each):.2f}" for each in told})
    return [*words, "<critique>", "</critique>", "<score>", "</score>", *scores]


def make_tokenizer(phrases: list[str], template: str = TEMPLATE):
    """A tokenizer whose every phrase is one token and that falls back to bytes; no phrases:
    byte-level.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(phrase)[0][0] for phrase in phrases]
    vocab = {
        word: i
        for i, word in enumerate(
            dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
        )
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    longest_first = "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))
    split = [pre_tokenizers.Split(Regex(longest_first), "isolated")] if phrases else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tags = (
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in control]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in tags])
    options = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def make_model(
    folder,
    tokenizer,
    seed: int = 0,
    tied: bool = True,
    hidden=128,
    layers=2,
    ff=256,
    heads=4,
    kv_heads=4,
    max_positions=4096,
):
    """A random Qwen3 with its tokenizer as a Hugging Face folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ff,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        # at 0.02, made for wide models, some seeds never learn to copy what they found
        initializer_range=0.06,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def write(path: Path, rows) -> int:
    text = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(text) + "\n")
    return len(text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=str(Path(__file__).parent))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hard", action="store_true", help="longer trails, and a sum to compute at their end"
    )
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    def rng(name):
        return random.Random(f"{args.seed}/{name}")

    phrases = toy_phrases() + (hard_phrases() if args.hard else [])
    parameters = make_model(out / "model", make_tokenizer(phrases), args.seed)
    print(f"model          {parameters:,} parameters")
    source = {
        "sft": lambda r, i: sft_row(r, args.hard),
        "rl_train": lambda r, i: rl_row(r, i, "train", args.hard),
        "rl_test": lambda r, i: rl_row(r, i, "test", args.hard),
    }
    if not args.hard:  # there the rule annotator is the judge
        source |= {"rrm_sft": rrm_row, "rrm_rl": rrm_row, "rrm_test": rrm_test_row}
    sizes = dict(sft=20_000, rl_train=2000, rl_test=256, rrm_sft=20_000, rrm_rl=4000, rrm_test=512)
    trained: set[str] = set()  # no judgment of the test set stands there
    for name, make in source.items():
        draw = rng(name)
        if name == "rrm_test":
            rows = unseen_rows(make, draw, sizes[name], trained)
        else:
            rows = [make(draw, i) for i in range(sizes[name])]
        if name in ("rrm_sft", "rrm_rl"):
            trained = trained.union(*map(texts_of, rows))
        print(f"{name:14} {write(out / f'{name}.jsonl', rows):,} rows")


if __name__ == "__main__":
    main()
