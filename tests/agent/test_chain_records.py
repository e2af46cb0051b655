"""What a chain notes of itself: spans, calls, judgments, seeds of the judge, why it was dropped."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np

import rollout
from reagent.reward_model import RewardModel
from rollout import Limits, Setup, run_chain, run_chains, write_episodes
from tests.agent.test_rollout import CALL, CHAT, JUDGMENT, ROW, Script, episode_of, rrm_of
from tools import Toolbox

SLIP = CALL.replace("}\n</tool", ",}\n</tool")
UNKNOWN = '<tool_call>{"name": "fly", "arguments": {}}</tool_call>'


def test_an_abort_of_the_engine_drops_the_chain_whichever_attempt_it_meets():
    refining = dict(rrm=rrm_of(JUDGMENT), refine=True)
    for episode in (episode_of(None), episode_of("\\boxed{here}", None, **refining)):
        assert episode.dropped == "aborted" == episode.attempts[-1].termination
        assert episode.attempts[-1].rule_reward is None and episode.attempts[-1].score is None


def test_spans_and_messages_of_the_two_attempts_hold_their_own_turns():
    turns = (CALL, "\\boxed{one}", CALL, "\\boxed{two}")
    episode = episode_of(*turns, rrm=rrm_of(JUDGMENT, JUDGMENT), refine=True)
    for attempt, own, other in zip(episode.attempts, ("one", "two"), ("two", "one")):
        text = CHAT.decode(episode.ids[slice(*attempt.span)])
        assert text.startswith("<tool_call>") and "review" not in text
        assert f"boxed{{{own}}}" in text and f"boxed{{{other}}}" not in text
        told = episode.messages[slice(*attempt.messages)]
        assert [turn["role"] for turn in told] == ["assistant", "tool", "assistant"]
        assert told[-1]["content"] == f"\\boxed{{{own}}}"


def test_calls_are_noted_with_their_turn_what_came_of_them_and_whether_they_were_mended():
    episode = episode_of(CALL + SLIP, UNKNOWN, "<tool_call>[]</tool_call>", "\\boxed{here}")
    told = [(c["name"], c["turn"], c["status"], c["repaired"]) for c in episode.attempts[0].calls]
    assert told == [
        ("search", 1, "ok", False),
        ("search", 1, "ok", True),
        ("fly", 2, "error", False),
        ("", 3, "error", False),
    ]
    assert all(0 <= call["seconds"] < 60 for call in episode.attempts[0].calls)


def test_a_turn_with_calls_goes_on_whatever_it_answers():
    episode = episode_of(f"\\boxed{{early}}\n{CALL}", "\\boxed{here}")
    assert episode.attempts[0].answer == "here" and len(episode.attempts[0].calls) == 1


def test_at_the_last_turn_results_stand_whole_before_the_call_for_an_answer():
    episode = episode_of(CALL, "\\boxed{here}", max_turns=1)
    assert [turn["role"] for turn in episode.messages[2:]] == [
        "assistant",
        "tool",
        "user",
        "assistant",
    ]
    assert "is here." in episode.messages[3]["content"]
    assert episode.messages[4]["content"] == rollout.FINAL_PROMPT
    assert episode.attempts[0].answer == "here"


def test_a_judgment_is_noted_part_by_part_with_the_replies_that_were_none():
    rrm = rrm_of("no blocks", JUDGMENT, JUDGMENT.replace("0.5", "0.9"))
    first, second = episode_of("\\boxed{a}", "\\boxed{b}", rrm=rrm, refine=True).attempts
    assert (first.think, first.critique, first.score) == ("analysis", "look again", 0.5)
    assert (first.unread, second.unread, second.score) == (1, 0, 0.9)


def test_every_judgment_is_asked_for_with_a_seed_of_its_own():
    seeds = []

    async def ask(question, trajectory, text, seed, seconds):
        seeds.append(seed)
        return {"message": {"content": JUDGMENT}}

    async def chains(key):
        rrm = RewardModel(ask)
        engine = Script(*["\\boxed{a}"] * 4)
        setup = Setup(engine, CHAT, Toolbox([]), Limits(max_context=4000), rule, rrm, True)
        jobs = [(ROW | {"id": name}, key) for name in "ab"]
        await run_chains(jobs, setup)
        assert len(set(engine.seeds)) == 4
        return engine.seeds

    asked = asyncio.run(chains((0, 1)))
    assert len(set(seeds)) == 4
    assert asyncio.run(chains((0, 1))) == asked and seeds[:4] == seeds[4:]


def rule(row, answer):
    return 0.0, False


def test_a_prompt_that_leaves_no_room_for_an_answer_is_not_sampled():
    prompt = episode_of("\\boxed{here}").attempts[0].span[0]
    for context, dropped in ((prompt + 150, "prompt_too_long"), (prompt + 151, "")):
        engine = Script("\\boxed{here}")
        episode = episode_of(engine=engine, max_context=context)
        assert (episode.dropped, len(engine.seeds)) == (dropped, 0 if dropped else 1)
        assert len(episode.attempts) == len(engine.seeds)


def test_a_refinement_begins_where_an_answer_fits_behind_the_critique():
    refined = dict(rrm=rrm_of(JUDGMENT, JUDGMENT), refine=True)
    whole = episode_of("\\boxed{a}", "\\boxed{b}", **refined)
    begin = whole.attempts[1].span[0]
    for context, attempts in ((begin + 150, 1), (begin + 151, 2)):
        refined = dict(rrm=rrm_of(JUDGMENT, JUDGMENT), refine=True, max_context=context)
        episode = episode_of("\\boxed{a}", "\\boxed{b}", **refined)
        assert len(episode.attempts) == attempts and episode.attempts[0].score == 0.5


def test_no_chain_leaves_its_context_whatever_its_tools_return():
    row = ROW | {"docs": [{"title": "Ada", "text": "is here . " * 60}]}
    whole = episode_of(CALL, "\\boxed{here}", max_turns=1, row=row)
    held, left_out = len(whole.ids), 0
    for context in range(held - 250, held + 2, 9):
        episode = episode_of(CALL, "\\boxed{here}", max_turns=1, row=row, max_context=context)
        assert len(episode.ids) <= context
        left_out += "left out: no room" in episode.messages[3]["content"]
    assert 0 < left_out < 28


def test_every_answer_of_a_row_is_gold():
    for answer, gold in (("here", ["here"]), (["here", "there"], ["here", "there"])):
        assert episode_of("\\boxed{here}", row=ROW | {"answer": answer}).gold == gold


class Tools:
    """A toolbox that notes what it is given."""

    schemas: list = []

    def __init__(self):
        self.given = []

    async def call(self, name, arguments, docs=None, files=None):
        self.given.append((docs, files))
        return SimpleNamespace(text="seen", status="ok", seconds=0.5)


def test_tools_get_the_documents_and_files_of_the_row_and_the_chain_keeps_its_meta():
    toolbox, row = Tools(), ROW | {"files": ["a.csv"], "meta": {"level": 2}}
    setup = Setup(Script(CALL, "\\boxed{x}"), CHAT, toolbox, Limits(max_context=4000), rule)
    setup.policy_version = 7
    episode = asyncio.run(run_chain(row, setup, (0,)))
    assert toolbox.given == [(ROW["docs"], ["a.csv"])] and "File: a.csv" in episode.question
    assert episode.meta == {"level": 2} and episode.policy_version == 7
    assert episode.attempts[0].calls[0]["seconds"] == 0.5


def test_a_line_of_a_step_counts_all_tokens_and_the_sampled_ones(tmp_path):
    episode = episode_of(CALL, "\\boxed{here}")
    write_episodes(tmp_path, 1, [episode])
    line = json.loads((tmp_path / "step-000001.jsonl").read_text())
    assert (line["tokens"], line["sampled"]) == (len(episode.ids), sum(episode.mask))
    assert line["sampled"] < line["tokens"] and "ids" not in line
    kept = np.load(tmp_path / "step-000001.npz")["logps"]
    assert kept.tolist() == np.array(episode.logps, np.float32).tolist()
