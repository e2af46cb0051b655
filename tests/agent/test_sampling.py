"""What a sample of the transformers engine depends on, and how it ends."""

import asyncio

import pytest

from reagent.engines import HFEngine, run_together
from tests.helpers.tiny import tiny_model

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14], [1, 2], [5, 6, 7], [40] * 20]
STOPS = set(range(0, 250, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def sample(engine, requests, new=12):
    """Samples of (prompt, seed), side by side."""
    asked = [
        engine.generate(ids, max_new_tokens=new, temperature=1.0, seed=seed)
        for ids, seed in requests
    ]
    return asyncio.run(run_together(asked))


def test_a_sample_depends_on_its_own_prompt_and_seed_alone(folder):
    engine, requests = HFEngine(folder, STOPS), list(zip(PROMPTS, (3, 4, 5, 6, 7)))
    together = sample(engine, requests)
    alone = [sample(engine, [request])[0] for request in requests]
    assert [each.ids for each in together] == [each.ids for each in alone]
    assert together[0].ids != together[3].ids  # one prompt, two seeds


def test_a_sample_ends_at_its_first_stop_token_or_is_told_to_be_cut(folder):
    engine = HFEngine(folder, STOPS)
    samples = sample(engine, [(ids, seed) for seed in range(4) for ids in PROMPTS])
    for each in samples:
        assert STOPS.isdisjoint(each.ids[:-1]) and len(each.ids) == len(each.logps) <= 12
        assert each.finish_reason == ("stop" if each.ids[-1] in STOPS else "length")
        assert each.finish_reason == "stop" or len(each.ids) == 12
    assert {each.finish_reason for each in samples} == {"stop", "length"}
