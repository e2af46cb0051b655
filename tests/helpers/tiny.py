"""Tiny models and rows for the tests, made on the spot."""

import importlib.util
import random
from pathlib import Path

import torch

from reagent.policy import Sequence

ROOT = Path(__file__).parents[2]


def load(path: str):
    """A script that is known by its path only, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).parent.name + "_script", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = load("data/toy/prepare.py")


def tiny_model(folder, tied=True, seed=0, phrases=(), hidden=32, **shape) -> str:
    """A byte-level Qwen3 of two layers; returns the folder."""
    toy.make_model(
        folder, toy.make_tokenizer(list(phrases)), seed, tied, hidden=hidden, ff=64, **shape
    )
    return str(folder)


def toy_world(folder, demonstrations=64, questions=16, model="model", **shape):
    """A tiny model with the toy's tokenizer, sft.jsonl and rl.jsonl in `folder`, which is
    returned.
    """
    tiny_model(folder / model, phrases=toy.toy_phrases(), **shape)
    rng = random.Random(0)
    toy.write(folder / "sft.jsonl", (toy.sft_row(rng) for _ in range(demonstrations)))
    toy.write(folder / "rl.jsonl", (toy.rl_row(rng, i, "train") for i in range(questions)))
    return folder


def random_rows(lengths, seed=0, vocab=250) -> list[Sequence]:
    """Rows with random ids and masks; the columns hold advantage, weight and old log-probs."""
    rng = random.Random(seed)
    rows = []
    for n in lengths:
        mask = [0] + [int(rng.random() < 0.6) for _ in range(n - 1)]
        mask[-1] = 1
        columns = {
            name: [rng.uniform(-1, 1) for _ in range(sum(mask))]
            for name in ("advantage", "sampler_logps")
        }
        columns["weight"] = [1 / (len(lengths) * sum(mask))] * sum(mask)
        rows.append(Sequence([rng.randrange(vocab) for _ in range(n)], mask, columns))
    return rows


def tree_of(prefix: int, lengths: list[int], rng: random.Random, vocab=250) -> Sequence:
    """A prefix of so many tokens and continuations of these lengths, all of them trained."""
    tree = Sequence([rng.randrange(vocab) for _ in range(prefix)], [0] * prefix)
    tree.columns = {name: [] for name in ("advantage", "weight", "sampler_logps")}
    for n in lengths:
        tree.forks.append(len(tree.ids))
        tree.ids += [rng.randrange(vocab) for _ in range(n)]
        tree.mask += [1] * n
        for name in ("advantage", "sampler_logps"):
            tree.columns[name] += [rng.uniform(-1, 1) for _ in range(n)]
        tree.columns["weight"] += [1 / (20 * n)] * n
    return tree


def apart(tree: Sequence) -> list[Sequence]:
    """A row for each continuation, with the prefix before it."""
    if not tree.forks:
        return [tree]
    first, at, rows = tree.forks[0], 0, []
    for a, b in zip(tree.forks, [*tree.forks[1:], len(tree.ids)]):
        n = b - a
        columns = {name: column[at : at + n] for name, column in tree.columns.items()}
        at += n
        rows.append(Sequence(tree.ids[:first] + tree.ids[a:b], [0] * first + [1] * n, columns))
    return rows


class Alone:
    """What an update needs of a run, in a job of one rank."""

    rank, world, device = 0, 1, torch.device("cpu")

    def sum(self, numbers: list) -> list:
        return numbers
