"""Every figure of a step of the agent's training, by hand."""

import math

import pytest
import torch

import grpo_unified as grpo
from rollout import Attempt, Episode

NAN = math.nan


def attempt(rule=None, score=None, reward=None, **more):
    """`tokens` long, with `calls` calls of which `mended` were repaired."""
    calls, mended = more.pop("calls", 0), more.pop("mended", 0)
    span = (10, 10 + more.pop("tokens", 5))
    made = Attempt(span, (0, 0), None, more.pop("ended", "answered"), 0, **more)
    made.rule_reward, made.score, made.reward = rule, score, reward
    made.calls = [dict(repaired=i < mended) for i in range(calls)]
    return made


def episode(*attempts, dropped=""):
    asked = [{"role": "user", "content": "q"}]
    return Episode("1", "q", [], [], [], [], asked, 0, list(attempts), dropped)


EPISODES = [  # two questions, two chains each
    episode(
        attempt(1.0, 0.8, 1.24, correct=True, calls=3, mended=1, tokens=7),
        attempt(0.0, 0.2, 0.06, correct=False, calls=1, ended="turn_limit", unread=2),
    ),
    episode(attempt(0.5, 0.4, 0.62, correct=False, unread=1), attempt(0.0, None, correct=False)),
    episode(attempt(0.0, 0.9, 0.27, correct=False, tokens=3)),
    episode(attempt(None, 0.7, ended="fault", calls=9, mended=9, tokens=99), dropped="fault"),
]


def metrics(episodes=EPISODES):
    rewards = grpo.reward_tensor(episodes, 2, lambda a: a.reward)
    rules = grpo.reward_tensor(episodes, 2, lambda a: a.rule_reward)
    kept = grpo.kept_pools(rewards, rules, "equal")
    advantages = grpo.pooled_advantages(rewards) * kept[:, None, None]
    return grpo.step_metrics(episodes, rewards, rules, advantages, kept)


def test_figures_of_a_step():
    assert metrics() == pytest.approx(
        {
            "reward/first": round((1.24 + 0.62 + 0.27) / 3, 6),
            "rule_reward/first": 0.5,
            "score/first": 0.7,
            "accuracy/first": round(1 / 3, 6),
            "tool_calls/first": 1.0,
            "repaired/first": round(1 / 3, 6),
            "tokens/first": 5.0,
            "reward/refined": 0.06,  # the other one has none
            "rule_reward/refined": 0.0,
            "score/refined": 0.2,
            "accuracy/refined": 0.0,
            "tool_calls/refined": 0.5,
            "repaired/refined": 0.0,
            "tokens/refined": 5.0,
            "ended/answered": 4,
            "ended/turn_limit": 1,
            "ended/fault": 1,
            "score/auc": 0.5,
            "leak/first": 0.0,
            "leak/refined": 0.0,
            "score/right": 0.8,
            "score/wrong": 0.5,
            "judge/invalid/right": 0.0,
            "judge/invalid/wrong": 0.75,
            "judge/invalid": 3,
            "attempts": 4,
            "left_out/chains": 1,
            "left_out/attempts": 2,
            "pools/dropped": 0.5,
            "pools/all_wrong": 0.5,
            "advantage/all_wrong": 0.0,
            "advantage/score_alone": 0.0,
        }
    )


def test_the_advantage_that_scores_alone_give_is_told_and_that_of_pools_without_a_right_answer():
    flat = [episode(attempt(1.0, s, 1 + s, correct=True)) for s in (0.1, 0.3)]
    wrong = [episode(attempt(0.0, s, s, correct=False)) for s in (0.1, 0.3)]
    mixed = [episode(attempt(r, 0.0, r, correct=r > 0.9)) for r in (0.5, 1.0)]
    told = metrics([*flat, *wrong, *mixed])  # three pools of two: each |A| is the same
    assert told["advantage/all_wrong"] == pytest.approx(1 / 3, abs=1e-4)
    assert told["advantage/score_alone"] == pytest.approx(2 / 3, abs=1e-4)
    assert told["pools/all_wrong"] == pytest.approx(1 / 3, abs=1e-4)
    assert told["pools/dropped"] == 0.0


def test_figures_of_the_updates_of_a_step():
    done = dict(loss=3.0, clipped=8, bounded=2, kl=12.0, tokens=40, entropy=60.0)
    done |= dict(gap=0.9, compared=9, norms=[1.0, 2.0], worst=0.1, skipped="")
    wanted = dict(loss=1.5, grad_norm=1.5, updates=2, skipped="", trained_tokens=40)
    wanted |= dict(clip_share=0.2, bounded_share=0.05, kl=0.3, entropy=1.5)
    wanted |= {"dlogp/mean": pytest.approx(0.1), "dlogp/max": 0.7}
    assert grpo.update_metrics(done, 0.7) == wanted
    nothing = dict.fromkeys(grpo.SUMS, 0) | dict(norms=[], worst=0.0, skipped="why")
    told = {k: v for k, v in grpo.update_metrics(nothing, 0.0).items() if v is not None}
    assert told == dict(updates=0, skipped="why", trained_tokens=0)  # no means over nothing


def test_attempts_that_are_missing_do_not_move_the_mean_of_their_pool():
    rewards = torch.tensor([[[1.0, 3.0], [NAN, NAN]]], dtype=torch.float64)
    half = 0.5**0.5
    got = grpo.pooled_advantages(rewards, eps=0.0)
    assert got.flatten().tolist() == pytest.approx([-half, half, 0.0, 0.0])
