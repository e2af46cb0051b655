"""The reward of a judgment, leaks, the report and the rows, against worked examples and scipy-free
oracles.
"""

import asyncio
import math
import random

import pytest
import torch

import train_rrm
from reagent import reward_model
from reagent.chat import Chat
from reagent.engines import EngineConfig
from reagent.reward_model import Judgment, RewardModelConfig
from results import judging
from tests.helpers.judge_server import judge_server
from tests.helpers.tiny import toy

ROW = {
    "question": "Who wrote it?",
    "trajectory": "[assistant]\nperhaps Bob",
    "score": 0.8,
    "correct": True,
    "answer": ["Ada Byron"],
}


def judgment(score, critique="look again"):
    return Judgment("analysis: Ada Byron", critique, score)


@pytest.mark.parametrize(
    "found, row, reward",
    [
        (None, ROW, 0.0),
        (judgment(0.8), ROW, 1.0),
        (judgment(0.6), ROW, 0.7 * 0.8 + 0.3),
        (judgment(0.3), ROW, 0.7 * 0.5),
        (judgment(0.3), {**ROW, "correct": None}, 0.5),
        (judgment(0.3), {**ROW, "score": None}, 0.0),
        (judgment(0.8, "It was Ada  Byron."), ROW, 0.5),
    ],
)
def test_reward_of_a_judgment(found, row, reward):
    assert train_rrm.judgment_reward(found, row) == pytest.approx(reward)


@pytest.mark.parametrize(
    "critique, gold, question, trajectory, leak",
    [
        ("the answer is Paris.", "Paris", "q", "t", True),
        ("the answer is parisian", "Paris", "q", "t", False),  # whole tokens
        ("the answer is Paris", "Paris", "is it Paris?", "t", False),
        ("the answer is Paris", "Paris", "q", "perhaps Paris", False),
        ("no", "no", "q", "t", False),
        ("B is right", "B", "q", "t", False),
        ("use 42", "42", "q", "t", False),
        ("it was 1969", "1969", "q", "t", True),
    ],
)
def test_leaks_are_whole_tokens_in_the_critique_that_nobody_said_before(
    critique, gold, question, trajectory, leak
):
    assert reward_model.leaks(critique, [gold], question, trajectory) is leak


def test_group_advantages_are_z_scores_and_zero_without_spread():
    got = train_rrm.group_advantages(torch.tensor([[0.0, 1.0], [1.01, 1.01]]), eps=0.0)
    half = 1 / math.sqrt(2)
    assert torch.allclose(got, torch.tensor([[-half, half], [0.0, 0.0]], dtype=torch.float64))


def test_auc_is_the_share_of_ordered_pairs():
    rng = random.Random(0)
    scores, labels = (
        [rng.choice((0, 0.5, 1)) for _ in range(60)],
        [rng.random() < 0.4 for _ in range(60)],
    )
    pairs = [(a, b) for a, x in zip(scores, labels) for b, y in zip(scores, labels) if x and not y]
    assert judging.auc(scores, labels) == pytest.approx(
        sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    )


def test_rank_correlation_sees_order_only():
    x = [1, 2, 3, 4, 5]
    assert judging.rank_correlation(x, [v**3 for v in x]) == pytest.approx(1)
    assert judging.rank_correlation(x, [1, 1, 1, 1, 1]) != judging.rank_correlation(x, x)


def test_the_report_counts_invalid_judgments_and_calibrates():
    rows = [{**ROW, "correct": bool(i % 2)} for i in range(4)]
    report = judging.judgment_report(
        [judgment(0.95), judgment(0.95), judgment(0.15), None], rows, [10, 10, 10, 10]
    )
    assert (
        report["valid"] == 0.75
        and report["calibration/0.9"] == [0.5, 2]
        and report["calibration/0.1"] == [0.0, 1]
    )
    assert report["mae"] == pytest.approx((0.15 + 0.15 + 0.65) / 3, abs=1e-4)


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "trajectory": "t", "score": 2}\n')
    with pytest.raises(SystemExit, match=r"rows.jsonl:1: 'score' is 2"):
        train_rrm.JsonlRows(str(path), reward_model.check_rrm_row)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"critique": "c", "score": 0.5},
            "SFT needs 'think'; found the keys ['critique', 'question', 'score', 'trajectory']",
        ),
        ({"think": "a", "critique": "<score>1</score>", "score": 0.5}, "the judgment is not valid"),
        ({"judgment": "a fine attempt"}, "the judgment is not valid"),
        ({"judgment": "<think>a</think><critique>c</critique><score>0.5</score>"}, None),
    ],
)
def test_a_row_without_a_judgment_to_learn_is_told_before_sft(row, told):
    assert reward_model.check_judged_row({"question": "q", "trajectory": "t", **row}) == told


CHAT = Chat(toy.make_tokenizer([]))


def test_a_row_that_is_too_long_is_left_out_and_long_tool_results_are_shortened_first():
    cfg = train_rrm.Config(max_context=3000, max_judgment_tokens=100, max_tokens_per_row=3000)
    row = {"question": "q", "think": "a", "critique": "c", "score": 0.5}
    said = {"role": "assistant", "content": "word " * 2000}
    seen = {"role": "tool", "content": "fact " * 2000}
    assert train_rrm.sft_row(CHAT, row | {"trajectory": [said]}, cfg) is None
    fitted = train_rrm.sft_row(
        CHAT, row | {"trajectory": [seen, {"role": "assistant", "content": "the answer"}]}, cfg
    )
    assert len(fitted.ids) <= 3000 and "the answer" in CHAT.decode(fitted.ids)


@pytest.mark.parametrize("system", ["You are Agent-RRM.", ""])
def test_the_prompts_of_released_rows_are_what_the_judge_trains_on_and_is_asked_with(
    tmp_path, system
):
    """As data/reagent/prepare.py writes them; a question that names a place of the form is only a
    question."""
    prompt, form = tmp_path / "system.txt", tmp_path / "request.txt"
    prompt.write_text(system)
    form.write_text("Question: {question}\n\nAgent Trajectory: {trajectory}")
    files = dict(prompt_file=str(prompt), request_file=str(form))
    row = {
        "question": "is {trajectory} one?",
        "trajectory": [{"role": "assistant", "content": "x"}],
    }
    text = reward_model.trajectory_text(row["trajectory"])
    user = f"Question: is {{trajectory}} one?\n\nAgent Trajectory: {text}"
    messages = [{"role": "system", "content": system}] * bool(system)
    messages.append({"role": "user", "content": user})
    ids = train_rrm.judge_ids(CHAT, row, train_rrm.Config(**files))
    assert ids == CHAT.prompt(messages, None)
    with judge_server(whole=True) as (url, requests):
        config = RewardModelConfig(url, max_context=4000, **files)
        judge = reward_model.make_judge(config, CHAT, engine=EngineConfig("hf"))
        assert asyncio.run(judge(row["question"], row["trajectory"], (0,)))
    assert requests[0]["messages"] == messages


def test_a_form_of_the_request_that_lacks_a_place_is_named(tmp_path):
    form = tmp_path / "request.txt"
    form.write_text("Question: {question}")
    with pytest.raises(
        SystemExit, match="request.txt: {question} and {trajectory} stand in it once"
    ):
        reward_model.read_rrm_prompt("", str(form))
    with pytest.raises(SystemExit, match="no prompt file nowhere.txt: data/reagent/prepare.py"):
        reward_model.read_rrm_prompt("nowhere.txt", "")
