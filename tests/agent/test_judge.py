"""The served judge against real HTTP servers: balance, faults, separate reasoning, health."""

import asyncio

import pytest

from reagent import reward_model
from tests.helpers.judge_server import hashed_judgment, judge_server

MESSAGES = [{"role": "assistant", "content": "\\boxed{1}"}]


def ask(judge, n=8):
    async def go():
        return await asyncio.gather(*(judge(f"Question {i}?", MESSAGES, (i,)) for i in range(n)))

    return asyncio.run(go())


def test_two_servers_share_the_requests():
    with judge_server() as (a, seen_a), judge_server() as (b, seen_b):
        answers = ask(reward_model.served_judge([a, b]))
    assert all(answers) and len(seen_a) == len(seen_b) == 4


def test_a_failing_server_is_left_alone_and_nothing_is_lost():
    with judge_server(lambda _: 500) as (bad, seen_bad), judge_server() as (good, seen_good):
        judge = reward_model.served_judge([bad, good], rest_s=60)
        answers = ask(judge)
    assert all(answers) and judge.failed == 0 and len(seen_good) == 8 and len(seen_bad) <= 4


def test_a_server_that_comes_back_is_asked_again():
    down = [True, True, True]
    with judge_server(lambda text: 503 if down and down.pop() else hashed_judgment(text)) as (
        url,
        _,
    ):
        assert all(ask(reward_model.served_judge([url], rest_s=0.05), 2))


def test_without_any_answer_the_attempt_has_no_judgment_and_is_counted():
    judge = reward_model.served_judge(["http://127.0.0.1:9/v1"], patience_s=0.5, rest_s=0.1)
    assert ask(judge, 2) == [None, None] and (judge.asked, judge.failed) == (2, 2)


def test_an_analysis_in_a_field_of_its_own_is_joined_back():
    reply = {"reasoning_content": "analysis", "content": "<critique>c</critique><score>0.5</score>"}
    with judge_server(lambda _: reply) as (url, _):
        assert ask(reward_model.served_judge([url]), 1)[0] == reward_model.Judgment(
            "analysis", "c", 0.5
        )


def test_prose_is_asked_again_and_then_given_up():
    with judge_server(lambda _: "a fine attempt") as (url, seen):
        judge = reward_model.served_judge([url])
        assert ask(judge, 1) == [None] and len(seen) == 3 and judge.invalid_replies == 3


def test_the_health_check_says_how_to_start_a_judge():
    with pytest.raises(SystemExit, match="vllm serve"):
        reward_model.check_served(["http://127.0.0.1:9/v1"])
