"""The 2G pool and the loss, against worked examples and an independent computation."""

import json
import math

import numpy as np
import pytest
import torch

from grpo_unified import (
    DUAL_CLIP,
    check_failures,
    grpo_loss,
    kept_pools,
    kl_loss,
    pooled_advantages,
    reward_tensor,
    set_rewards,
    training_sequences,
)
from reagent.policy import normalised, take_step
from reagent.reward_model import RewardModelConfig
from rollout import Attempt, Episode, write_episodes

NAN = math.nan


def pool(first, second):
    return torch.tensor([[first, second]], dtype=torch.float64)


def test_joint_pool_is_the_z_score_over_both_stages():
    a = pooled_advantages(pool([0.0, 1.0], [1.0, 2.0]), eps=0.0)
    std = math.sqrt(2 / 3)  # mean 1, squares 1 + 0 + 0 + 1, unbiased over 4
    assert torch.allclose(a, pool([-1 / std, 0.0], [0.0, 1 / std]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 1e-7])
def test_rewards_that_differ_by_a_rounding_error_have_the_advantage_0_exactly(apart, dtype):
    """One that is only nearly 0 would count its pool as one with a gradient."""
    torch.manual_seed(0)
    for size in (2, 3, 6, 7, 16):
        pools = (1 + torch.rand(50, 1, dtype=dtype)).repeat(1, size)
        pools[:, 0] += apart
        pools[:25, 1] = NAN
        assert not normalised(pools).any() and not pooled_advantages(pools[:, None]).any()


def test_a_missing_second_stage_is_left_out_and_zero():
    a = pooled_advantages(pool([0.0, 2.0], [NAN, 1.0]), eps=0.0)
    assert torch.allclose(a, pool([-1.0, 1.0], [0.0, 0.0]))


def test_one_attempt_left_has_no_advantage():
    assert pooled_advantages(pool([NAN, 1.0], [NAN, NAN])).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


def test_per_stage_normalises_each_stage_alone():
    a = pooled_advantages(pool([0.0, 1.0], [5.0, 7.0]), eps=0.0, pool="per_stage")
    half = 1 / math.sqrt(2)
    assert torch.allclose(a, pool([-half, half], [-half, half]))


def test_a_small_spread_is_damped_by_eps_and_a_large_one_is_not():
    for spread, eps, size in ((2e-6, 1e-6, 0.414214), (2e-6, 0.0, 0.707107), (1.0, 1e-6, 0.707106)):
        found = normalised(torch.tensor([[0.0, spread]], dtype=torch.float64), eps)
        assert found[0].tolist() == pytest.approx([-size, size], abs=1e-6)


@pytest.mark.parametrize("loss, gradient", [(math.inf, 1.0), (NAN, 1.0), (1.0, math.inf)])
def test_neither_a_loss_nor_a_gradient_that_is_not_finite_is_stepped_on(loss, gradient):
    policy = torch.nn.Linear(1, 1)
    before = policy.weight.item()
    for weight in policy.parameters():
        weight.grad = torch.full_like(weight, gradient)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    assert "loss" in take_step(policy, optimizer, loss, max_norm=1.0)[1]
    assert policy.weight.item() == before and policy.weight.grad is None


def test_unequal_pools_do_not_mix():
    rewards = torch.cat([pool([0.0, 1.0], [1.0, 2.0]), pool([9.0, 9.0], [9.0, 8.0])])
    both = pooled_advantages(rewards)
    assert torch.equal(both[:1], pooled_advantages(rewards[:1]))
    assert torch.equal(both[1:], pooled_advantages(rewards[1:]))


@pytest.mark.parametrize(
    "drop, kept", [("equal", [1, 1, 0, 1]), ("rule_equal", [1, 0, 0, 1]), ("release", [1, 1, 0, 0])]
)
def test_dropped_pools(drop, kept):
    """Rules differ; scores alone do; nothing does; all are right, which the release leaves out."""
    rules = [pool([0.0, 1.0], [1.0, NAN]), pool([0.0, 0.0], [0.0, 0.0])]
    rules = torch.cat([*rules, pool([0.0, 0.0], [0.0, 0.0]), pool([1.0, 1.5], [1.0, 1.0])])
    scores = [pool([0, 1], [1, 1]), pool([0, 0.5], [0, 0]), pool([0, 0], [0, 0])]
    rewards = rules + 0.3 * torch.cat([*scores, pool([0, 0], [0, 1])])
    assert kept_pools(rewards, rules, drop).int().tolist() == kept


@pytest.mark.parametrize("drop", ["equal", "rule_equal", "release"])
def test_a_spread_of_a_rounding_error_is_none(drop):
    same = pool([0.1 + 0.2, 0.3], [0.3, 0.3])
    assert same.max() > same.min() and not kept_pools(same, same, drop).any()


def test_rewards_are_rule_and_score_and_what_was_dropped_or_not_judged_has_none():
    def episode(dropped, *attempts):
        made = [
            Attempt((0, 1), (0, 0), "x", "answered", 0, rule_reward=r, score=s) for r, s in attempts
        ]
        return Episode("q", "q", ["x"], [0], [1], [0.0], [], 0, made, dropped)

    episodes = [episode("", (1.0, 0.5), (0.0, 0.9)), episode("", (1.0, None))]
    episodes += [episode("fault", (1.0, 0.5)), episode("", (None, 0.5))]
    set_rewards(episodes, 0.3, scored=True)
    told = [[a.reward for a in e.attempts] for e in episodes]
    assert told == [[1.15, pytest.approx(0.27)], [None], [None], [None]]
    table = reward_tensor(episodes, 2, lambda attempt: attempt.reward)
    assert table.shape == (2, 2, 2) and table[0].tolist() == [
        [1.15, pytest.approx(NAN, nan_ok=True)],
        [pytest.approx(0.27), pytest.approx(NAN, nan_ok=True)],
    ]
    set_rewards(episodes, 0.3, scored=False)
    assert [a.reward for e in episodes for a in e.attempts] == [1.0, 0.0, 1.0, None, None]


def test_loss_and_gradient_equal_a_loop_over_attempts():
    torch.manual_seed(0)
    lengths, advantages = [3, 5, 2], [0.7, -1.2, 0.4]
    logps = torch.randn(10, dtype=torch.float64, requires_grad=True)
    old = logps.detach() + 0.4 * torch.randn(10, dtype=torch.float64)
    a = torch.cat([torch.full((n,), x, dtype=torch.float64) for n, x in zip(lengths, advantages)])
    w = torch.cat([torch.full((n,), 1 / (3 * n), dtype=torch.float64) for n in lengths])
    loss, *_ = grpo_loss(logps, old, a, w, 0.2, 0.34)
    (gradient,) = torch.autograd.grad(loss, logps)

    other = logps.detach().clone().requires_grad_()
    total, start = 0.0, 0
    for n, x in zip(lengths, advantages):
        tokens = []
        for t in range(start, start + n):
            r = torch.exp(other[t] - old[t])
            bound = 1.34 if x > 0 else 0.8
            beyond = (r > bound) if x > 0 else (r < bound)
            tokens.append(bound * x + 0 * r if beyond else r * x)
        total, start = total - torch.stack(tokens).mean() / 3, start + n
    (expected,) = torch.autograd.grad(total, other)
    assert torch.allclose(loss, total) and torch.allclose(gradient, expected)


def chain(first, second=None, tokens=(3, 4)):
    """prompt of 2, o1, critique of 2, o2; the mask is 1 at sampled tokens."""
    ids = list(range(2 + tokens[0] + 2 + tokens[1]))
    mask = [0, 0] + [1] * tokens[0] + [0, 0] + [1] * tokens[1]
    a, b = 2 + tokens[0], 4 + tokens[0]
    attempts = [Attempt((2, a), (0, 0), "x", "answered", 0, reward=first)]
    attempts += [Attempt((b, len(ids)), (0, 0), "x", "answered", 0, reward=second)]
    return Episode(
        "q", "q", ["x"], ids, mask, [-0.1 * i for i in range(sum(mask))], [], 0, attempts
    )


def test_each_span_has_its_own_advantage_and_weight():
    (row,) = training_sequences([chain(1.0, 0.0)], torch.tensor([[[0.5], [-0.5]]]), 1, "seq_mean")
    assert row.columns["advantage"] == [0.5] * 3 + [-0.5] * 4
    assert row.columns["weight"] == [1 / 6] * 3 + [1 / 8] * 4
    assert row.columns["sampler_logps"] == [-0.1 * i for i in range(7)]


def test_an_attempt_without_reward_leaves_loss_and_denominator():
    (row,) = training_sequences([chain(1.0, None)], torch.tensor([[[0.5], [0.0]]]), 1, "seq_mean")
    assert sum(row.mask) == 3 and row.columns["weight"] == [1 / 3] * 3 and len(row.ids) == 5


def test_an_attempt_with_advantage_0_is_in_the_denominator():
    (row,) = training_sequences([chain(1.0, 0.0)], torch.tensor([[[0.5], [0.0]]]), 1, "seq_mean")
    assert sum(row.mask) == 3 and row.columns["weight"] == [1 / (2 * 3)] * 3


def test_token_mean_counts_all_tokens_of_the_minibatch():
    rows = training_sequences(
        [chain(1.0, 0.0), chain(0.0, 0.0)],
        torch.tensor([[[0.5, 0.0], [-0.5, 0.1]]]),
        2,
        "token_mean",
    )
    assert {w for row in rows for w in row.columns["weight"]} == {1 / 14}


@pytest.mark.parametrize("nats", [3.0, 12.0, 100.0])
def test_a_token_far_above_the_sampler_is_bounded_where_it_was_wrong(nats):
    logps = torch.tensor([nats, 0.1], requires_grad=True)
    old, advantages, weights = torch.zeros(2), torch.tensor([-2.0, -2.0]), torch.full((2,), 0.5)
    loss, _, bounded = grpo_loss(logps, old, advantages, weights, clip_low=0.2, clip_high=0.34)
    loss.backward()
    assert bounded == 1
    assert loss.item() == pytest.approx(0.5 * 2 * (DUAL_CLIP + math.exp(0.1)))
    assert logps.grad.tolist() == pytest.approx([0.0, 0.5 * 2 * math.exp(0.1)])


def test_the_dual_clip_leaves_right_answers_and_small_ratios_alone():
    logps = torch.tensor([5.0, 1.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0])
    *_, bounded = grpo_loss(logps, torch.zeros(2), advantages, torch.ones(2), 0.2, 0.34)
    assert bounded == 0


def test_the_gradient_of_the_kl_loss_is_that_of_the_exact_kl():
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    exact = (logps.exp() * (logps - reference)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    # every token once, weighed by its probability: the mean over the policy's own samples
    (got,) = torch.autograd.grad(kl_loss(logps, reference, logps.detach().exp()), logits)
    assert torch.allclose(got, expected)


def test_token_arrays_of_a_step_are_kept_whole(tmp_path):
    episodes = []
    for i, n in enumerate((5, 3, 0)):
        mask = [j % 2 for j in range(n)]
        logps = [-0.25 * j for j in range(sum(mask))]
        ids = list(range(10 * i, 10 * i + n))
        episodes.append(Episode(str(i), "q", ["g"], ids, mask, logps, [], 0))
    write_episodes(tmp_path / "episodes", 7, episodes)
    arrays = np.load(tmp_path / "episodes" / "step-000007.npz")
    spoken = np.cumsum([0, *(len(e.logps) for e in episodes)])
    for i, episode in enumerate(episodes):
        a, b = arrays["starts"][i : i + 2]
        assert arrays["ids"][a:b].tolist() == episode.ids
        assert arrays["mask"][a:b].tolist() == episode.mask
        assert arrays["logps"][spoken[i] : spoken[i + 1]].tolist() == episode.logps
    lines = (tmp_path / "episodes" / "step-000007.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [5, 3, 0]


@pytest.mark.parametrize("failed, stops", [(0, False), (2, False), (3, True), (10, True)])
def test_a_step_with_too_many_failed_judgments_stops_the_run(failed, stops):
    rrm = RewardModelConfig("http://there/v1", max_failures=0.2)
    if not stops:
        return check_failures(4, 10, failed, rrm, ["", "late"])
    with pytest.raises(SystemExit, match=f"step 5: {failed} of 10 .* http://there/v1 .* late"):
        check_failures(4, 10, failed, rrm, ["", "late"])
