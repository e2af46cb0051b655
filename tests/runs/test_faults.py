"""One run of ten steps in which everything outside fails: what was left out is counted, and none of
it counts as a 0.
"""

import functools
import itertools
import json
import time

import pytest

import tools
from reagent import engines
from tests.helpers.judge_server import hashed_judgment, judge_server
from tests.helpers.tiny import toy_world
from tests.runs.test_jobs import run
from tests.runs.test_survival import in_this_process


def calling_agent(folder, **shape):
    """A world whose agent has learnt to call search."""
    toy_world(folder, demonstrations=2000, questions=64, model="model0", hidden=64, **shape)
    run(
        "sft.py",
        f"--model={folder}/model0",
        f"--data={folder}/sft.jsonl",
        "--rows_per_step=24",
        "--steps=100",
        "--lr=4e-3",
        "--warmup_steps=10",
        "--policy.checkpoint_activations=false",
        "--log_interval=50",
        f"--out_dir={folder}/sft",
    )
    (folder / "sft" / "step-000100").rename(folder / "model")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return calling_agent(tmp_path_factory.mktemp("world"))


def failing_search(plain):
    """Every fourth call is a fault of the infrastructure, every fourth an error, every fourth
    returns 100 MB.
    """
    count = itertools.count()

    @functools.wraps(plain)
    def search(context, queries: list[str], top_k: int = 5) -> str:
        n = next(count) % 4
        if n == 0:
            raise tools.ToolFault("the search engine is out of quota")
        if n == 1:
            raise tools.ToolError("no such query")
        return plain(context, queries, top_k) + ("x" * 100_000_000 if n == 2 else "")

    return search


@pytest.mark.slow
def test_ten_steps_with_every_fault_end_and_no_such_attempt_enters_the_pool_as_a_zero(
    world, tmp_path, monkeypatch
):
    monkeypatch.setitem(tools.TOOLS, "search", failing_search(tools.search))
    monkeypatch.setattr(
        tools.Toolbox.__init__,
        "__kwdefaults__",
        {**tools.Toolbox.__init__.__kwdefaults__, "output_chars": 600},
    )
    requests, generate = itertools.count(1), engines.HFEngine.generate

    async def aborting(self, ids, **options):
        sample = await generate(self, ids, **options)
        return engines.Sample([], [], "abort") if next(requests) % 60 == 0 else sample

    monkeypatch.setattr(engines.HFEngine, "generate", aborting)
    began = time.monotonic()

    def reply(text):  # the judge is down for three seconds, and now and then it writes prose
        down = 4 < time.monotonic() - began < 7
        return 500 if down else "Fine." if len(text) % 11 == 0 else hashed_judgment(text)

    settings = (
        "--steps=10",
        "--save_interval=100",
        "--prompts_per_step=4",
        "--prompts_per_minibatch=2",
        "--group_size=4",
        "--max_turns=4",
        "--max_context=700",
        "--rrm.max_failures=0.9",
        "--max_dlogp=1",
    )
    with judge_server(reply) as (url, _):
        log = in_this_process(world, tmp_path, url, *settings)
    assert [line["step"] for line in log] == list(range(1, 11))
    seen = set()
    for line, path in zip(log, sorted((tmp_path / "episodes").glob("*.jsonl")), strict=True):
        episodes = [json.loads(text) for text in open(path)]
        attempts = [a for e in episodes for a in e["attempts"]]
        pooled = [a for a in attempts if a["reward"] is not None]
        assert line["left_out/chains"] == sum(bool(e["dropped"]) for e in episodes)
        assert line["left_out/attempts"] == len(attempts) - len(pooled) and line["attempts"] == len(
            pooled
        )
        assert all(
            a["reward"] == pytest.approx(a["rule_reward"] + 0.3 * a["score"]) for a in pooled
        )
        assert all(a["reward"] is None for e in episodes if e["dropped"] for a in e["attempts"])
        assert all(len(m["content"]) < 2000 for e in episodes for m in e["messages"])
        seen |= (
            {e["dropped"] for e in episodes}
            | {a["termination"] for a in attempts}
            | {c["status"] for a in attempts for c in a["calls"]}
        )
        seen |= (
            {"unjudged"}
            if any(not e["dropped"] and a["score"] is None for e in episodes for a in e["attempts"])
            else set()
        )
    assert {"fault", "aborted", "error", "ok", "unjudged"} <= seen and seen & {
        "context_limit",
        "token_limit",
    }, seen
