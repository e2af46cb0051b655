"""The toy: a world of trails, a word-level tokenizer, a random Qwen3 of 0.3 M parameters and rows for every stage.

    python data/toy/prepare.py [--out=data/toy] [--seed=0] [--hops=4]

A question names a place and a number of hops; each lookup gives the next place, the last one a code:
"Follow the trail of 3 from Ada. Which code is at its end?"  Ada -> Rome -> Nile -> code 42.
The documents are drawn afresh for every question, so nothing can be memorised and only looking things up pays. The
demonstrations for SFT are lazy on purpose: on long trails they stop early and guess. One symbol is one token: tiny
models fail to learn to copy names of two tokens on some seeds.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import rollout  # noqa: E402

NAMES = """Ada Bern Cleo Dune Elba Finn Gaza Hugo Iris Juno Kiel Lena Mars Nile Oslo Paul Quin Rome Siena Troy Uma
Vera Wien Xena York Zoe Aral Bath Cork Dale""".split()
CODES = ["17", "23", "38", "42", "56", "61", "79", "84"]
DOCS = 10  # documents a question has: its trail, and another trail that leads elsewhere
HOPS = (1, 1, 2, 3, 4)  # drawn for demonstrations; RL and the test set have --hops
FOLLOWS = {1: 0.9, 2: 0.3, 3: 0.02, 4: 0.0}  # share of demonstrations that follow the whole trail, by its length
REFINED = 0.65  # share of demonstrations that go on with a refined attempt
OBEYS = 0.7  # share of critiques that name the right place; the others are obeyed too, so critiques must be read
TOOLS = [{"type": "function", "function": {"name": "search"}}]  # the toy's template shows the name only
QUESTION = "Follow the trail of {hops} from {start}. Which code is at its end?"
CALL = '<tool_call>\n{{"name": "search", "arguments": {{"queries": ["{name}"], "top_k": 1}}}}\n</tool_call>'
STOPPED, WRONG, DONE = (
    "The trail was not followed to its end. Go on from ",
    "The answer is not what was found. Look again at ",
    "The trail was followed to its end. Look again at ",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'system' and tools %}{{ '\\ntools:' }}{% for t in tools %} {{ t.function.name }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------------------
# the world


def make_world(rng: random.Random, hops: int) -> dict:
    """A question with its documents: {"trail": names, "code", "docs": {name: text}}; a second trail uses up the rest."""
    names, codes = rng.sample(NAMES, DOCS), rng.sample(CODES, 2)
    docs = {}
    for trail, code in ((names[:hops], codes[0]), (names[hops:], codes[1])):
        docs |= {a: f"leads to {b}." for a, b in zip(trail, trail[1:])} | {trail[-1]: f"has code {code}."}
    return {"trail": names[:hops], "code": codes[0], "docs": docs, "hops": hops}


def question_of(world: dict) -> str:
    return QUESTION.format(hops=world["hops"], start=world["trail"][0])


def found(world: dict, name: str) -> str:
    """The observation of a lookup, as tools.search words it."""
    if name not in world["docs"]:
        return f'No results for "{name}".'
    return f'Results for "{name}":\n1. {name} (doc:{name})\n{world["docs"][name]}'


def lookups(world: dict, name: str, most: int) -> tuple[list[dict], str | None, str | None]:
    """Follows a trail for at most `most` lookups -> (messages, the code if it was found, the name to go on from)."""
    messages = []
    for _ in range(most):
        messages.append({"role": "assistant", "content": CALL.format(name=name)})
        messages.append({"role": "tool", "content": found(world, name)})
        text = world["docs"].get(name)
        if text is None:
            return messages, None, None
        if text.startswith("has code "):
            return messages, text.split()[-1].rstrip("."), name
        name = text.split()[-1].rstrip(".")
    return messages, None, name


def final(answer: str) -> dict:
    return {"role": "assistant", "content": f"\\boxed{{{answer}}}"}


def first_attempt(rng: random.Random, world: dict, follows: bool) -> list[dict]:
    depth = world["hops"] if follows else rng.randrange(world["hops"])
    messages, code, _ = lookups(world, world["trail"][0], depth)
    return [*messages, final(code or rng.choice(CODES))]


# ---------------------------------------------------------------------------------------------------------------------
# the rule annotator: the toy's judge


def read_attempt(question: str, messages: list[dict]) -> dict:
    """What a judge can see in one attempt without knowing the world: needed places, which were looked up, codes seen."""
    match = re.search(r"trail of (\d+) from (\w+)", question)
    hops, place = int(match[1]), match[2]
    results = {}
    for message in messages:
        hit = re.match(r'Results for "(\w+)":\n1\. \w+ \(doc:\w+\)\n(leads to|has code) (\w+)\.', message["content"])
        if message["role"] == "tool" and hit:
            results[hit[1]] = (hit[2], hit[3])
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
    found_code = code or (seen[-1] if seen else None)
    return dict(hops=hops, needed=needed, found=found_code, answer=answer, grounded=bool(answer) and answer == found_code)


def annotate(question: str, messages: list[dict]) -> str:
    """The three blocks for one attempt; the score is `score_of` what can be seen in it.

    Judged alone, a refined attempt that goes on from the middle of the trail has done none of the needed lookups that
    the judge can trace from the question; its answer counts as grounded all the same if its own tool results gave it.
    """
    seen = read_attempt(question, messages)
    done = sum(was for _, was in seen["needed"])
    steps = " ".join(f"{place}: {'yes' if was else 'no'}." for place, was in seen["needed"])
    verdict = "right" if seen["grounded"] else "wrong" if seen["answer"] else "missing"
    # the answer is looked for as the places are: told only what was found and what was answered, tiny models learn late,
    # on some seeds not in 420 steps, to compare the two
    seen_it = "yes" if seen["grounded"] else "no"
    think = f"{steps} Found {seen['found'] or 'none'}. Answer {seen['answer'] or 'none'}: {seen_it}. Verdict {verdict}."
    place, was = seen["needed"][-1]
    opening = STOPPED if not was else DONE if seen["grounded"] else WRONG
    return judgment_text(think, f"{opening}{place}.", score_of(done, seen["hops"], seen["grounded"]))


def score_of(done: int, hops: int, grounded: bool) -> float:
    """1 for a grounded answer; without one, the share of the needed lookups, below 0.5.

    With (done + grounded) / (hops + 1) a complete trail with a wrong answer scores 0.8: GRPO of the reward model, which
    is also paid for agreeing with correctness, then unlearns the annotated scores. With 0.45 * done / hops + 0.55 *
    grounded a refined attempt that goes on from the middle of the trail, as its critique said, scores 0.55: once the
    first attempts are right the pool pushes such attempts down, and refined ones end below first ones (.945, .973).
    """
    return 1.0 if grounded else 0.45 * done / hops


def judgment_text(think: str, critique: str, score: float) -> str:
    return f"<think>{think}</think><critique>{critique}</critique><score>{score:.2f}</score>"


def blocks(text: str) -> dict:
    judgment = rollout.parse_judgment(text)
    return {"think": judgment.think, "critique": judgment.critique, "score": judgment.score}


# ---------------------------------------------------------------------------------------------------------------------
# rows


def docs_of(world: dict) -> list[dict]:
    return [{"title": name, "text": text} for name, text in sorted(world["docs"].items())]


def sft_row(rng: random.Random) -> dict:
    """A demonstration; most of them go on with a critique and a refined attempt that obeys it."""
    world = make_world(rng, rng.choice(HOPS))
    attempt = first_attempt(rng, world, rng.random() < FOLLOWS[world["hops"]])
    messages = [{"role": "system", "content": rollout.SYSTEM_PROMPT}, {"role": "user", "content": question_of(world)}]
    messages += attempt
    if rng.random() < REFINED:
        critique = blocks(annotate(question_of(world), attempt))["critique"]
        if rng.random() > OBEYS:
            critique = f"{critique.rpartition(' ')[0]} {rng.choice(NAMES)}."
        start = critique.rpartition(" ")[2].rstrip(".")
        again, code, _ = lookups(world, start, DOCS)
        messages.append({"role": "user", "content": rollout.REFINE_PROMPT.replace("{critique}", critique)})
        messages += [*again, final(code or "none")]  # no guess: a critique of another question must not pay
    return {"messages": messages, "tools": TOOLS}


def rl_row(rng: random.Random, i: int, split: str, hops: int = 4) -> dict:
    world = make_world(rng, hops)
    row = {"id": f"toy-{split}-{i}", "question": question_of(world), "answer": world["code"], "kind": "qa"}
    return row | {"docs": docs_of(world), "meta": {"hops": hops, "dataset": "toy"}}


def rrm_row(rng: random.Random, i: int) -> dict:
    """A judged trajectory. Half of the complete ones answer wrongly, 15 % give no answer: else the verdict is not learned."""
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
    broken = [{"role": "assistant", "content": rng.choice(("", "\\boxed{}", CALL.format(name=rng.choice(NAMES))))}]
    messages += broken if rng.random() < 0.15 else [final(answer)]
    return judged(world, messages, f"rrm-{i}")


def stumble(rng: random.Random) -> list[dict]:
    """A broken call and what the agent loop answers. Agents in training write such, and a judge that never saw one
    gives no valid judgment: then the attempt leaves the pool instead of being marked down, and the agent gets worse."""
    before, _, after = CALL.replace("{{", "{").replace("}}", "}").partition("{name}")
    pieces = (before, after, "<tool_call>", "}", " from ", '": 1. ', rng.choice(NAMES), rng.choice(CODES))
    text = "".join(["<tool_call>", *rng.choices(pieces, k=rng.randint(1, 4))])
    answers = [problem or 'No results for "".' for _, _, problem in rollout.parse_calls(text)]
    return [{"role": "assistant", "content": text}] + [{"role": "tool", "content": answer} for answer in answers]


def judged(world: dict, messages: list[dict], name: str) -> dict:
    question = question_of(world)
    seen = read_attempt(question, messages)
    row = {"id": name, "question": question, "trajectory": messages, "answer": [world["code"]]}
    row |= blocks(annotate(question, messages))
    return row | {"correct": seen["answer"] == world["code"], "grounded": seen["grounded"]}


def rrm_test_row(rng: random.Random, i: int) -> dict:
    """A held-out trajectory as from a policy that is right in two of three: from the start, most of them complete."""
    world = make_world(rng, max(HOPS))
    hops = world["hops"]
    messages, code, _ = lookups(world, world["trail"][0], hops if rng.random() < 0.8 else rng.randrange(hops))
    answer = code if code and rng.random() > 0.15 else rng.choice(CODES)
    messages.append(final(answer) if rng.random() > 0.05 else {"role": "assistant", "content": "\\boxed{}"})
    return judged(world, messages, f"rrm-test-{i}")


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer and model


def toy_phrases() -> list[str]:
    """Every fixed phrase of the toy; each becomes one token. Control strings inside judged text are broken by U+200B."""
    p = rollout
    before, _, after = CALL.replace("{{", "{").replace("}}", "}").partition("{name}")
    refine = p.REFINE_PROMPT.partition("{critique}")
    request = re.split(r"\{question\}|\{trajectory\}", p.JUDGE_REQUEST)
    open_tag, close_tag = "<tool_call>", "</tool_call>"
    question = re.split(r"\{hops\}|\{start\}", QUESTION)
    phrases = [p.SYSTEM_PROMPT, *re.split("</?think>", p.RRM_PROMPT), p.FINAL_PROMPT, refine[0], refine[2], *request, *question]
    phrases += [before.removeprefix(open_tag), after.removesuffix(close_tag)]
    phrases += ["The tool call has no closing ", "The tool call is not valid JSON: ", rollout.LEFT_OUT]
    phrases += [tag.replace("<", "<\u200b") for tag in (open_tag, close_tag)]
    phrases += ["Expecting value", "Expecting ',' delimiter", "Extra data", ": line ", " column ", " (char "]
    phrases += [before.replace("<", "<\u200b"), after.replace("<", "<\u200b")]
    phrases += ['Results for "', '":\n1. ', " (doc:", ")\nleads to ", ")\nhas code ", 'No results for "', '".', "."]
    phrases += ["\\boxed{", "}", "system\n", "user\n", "assistant\n", "\n", "\ntools:", " search"]
    phrases += ["[assistant]\n", "\n[assistant]\n", "\n[tool]\n", STOPPED, WRONG, DONE, *NAMES, *CODES, *"01234"]
    phrases += ["Answer ", ". ", ": yes.", ": no.", " Found ", " Verdict ", "right", "wrong", "missing", "none", " "]
    phrases += ["<critique>", "</critique>", "<score>", "</score>"]
    phrases += sorted({f"{score_of(a, hops, g):.2f}" for hops in HOPS for a in range(hops + 1) for g in (0, 1)})
    return list(dict.fromkeys(filter(None, phrases)))


def make_tokenizer(phrases: list[str], template: str = TEMPLATE):
    """A tokenizer whose every phrase is one token and that falls back to bytes; no phrases: byte-level."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(phrase)[0][0] for phrase in phrases]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    longest_first = "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))
    split = [pre_tokenizers.Split(Regex(longest_first), "isolated")] if phrases else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in tags])
    options = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def make_model(folder, tokenizer, seed: int = 0, tied: bool = True, hidden=128, layers=2, ff=256, heads=4, kv_heads=4,
               max_positions=4096):
    """A random Qwen3 with its tokenizer as a Hugging Face folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, intermediate_size=ff,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        initializer_range=0.06,  # at 0.02, made for wide models, some seeds never learn to copy what they found
        max_position_embeddings=max_positions, tie_word_embeddings=tied, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
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
    parser.add_argument("--hops", type=int, default=4, help="length of the trails of RL and of its test set")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    def rng(name):
        return random.Random(f"{args.seed}/{name}")

    parameters = make_model(out / "model", make_tokenizer(toy_phrases()), args.seed)
    print(f"model          {parameters:,} parameters")
    source = {
        "sft": lambda r, i: sft_row(r),
        "rl_train": lambda r, i: rl_row(r, i, "train", args.hops),
        "rl_test": lambda r, i: rl_row(r, i, "test", args.hops),
        "rrm_sft": rrm_row,
        "rrm_rl": rrm_row,
        "rrm_test": rrm_test_row,
    }
    sizes = dict(sft=20_000, rl_train=2000, rl_test=256, rrm_sft=20_000, rrm_rl=4000, rrm_test=512)
    for name, make in source.items():
        draw = rng(name)
        print(f"{name:14} {write(out / f'{name}.jsonl', (make(draw, i) for i in range(sizes[name]))):,} rows")


if __name__ == "__main__":
    main()
