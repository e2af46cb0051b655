"""What an update leaves out, in each of the three trainers: steps that are not finite, steps of a
sampler that is another policy, the rows of other ranks.
"""

import math

import pytest
import torch

import grpo_unified
import sft
import train_rrm
from reagent.policy import PolicyConfig, balance
from tests.helpers.tiny import Alone, random_rows, tiny_model
from tests.loss.test_model import policy_of

TRAINERS = ("sft", "rrm_sft", "rrm_grpo", "agent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


class One(Alone):
    """One rank of two, which sees its own sums alone."""

    def __init__(self, rank):
        self.rank, self.world = rank, 2


class Twin(Alone):
    """A rank beside another that computes the same."""

    def sum(self, numbers):
        return [2 * x for x in numbers]


RANKS = Alone(), One(0), One(1)


def update(trainer, policy, rows, **options) -> tuple[float, str]:
    """One SGD step of a trainer on rows of `random_rows`; -> (loss, why it was skipped)."""
    line = figures(trainer, policy, rows, **options)
    return line["loss"], line["skipped"]


def figures(trainer, policy, rows, run=RANKS[0], tokens=40, most=1e9) -> dict:
    """What such a step returns; an agent's norm is that of its one update."""
    line = step(trainer, policy, rows, run, tokens, most)
    return line | {"norms": sum(line.get("norms", []))}


def step(trainer, policy, rows, run, tokens, most) -> dict:
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    if trainer == "sft":
        cfg = sft.Config(policy=PolicyConfig(tokens_per_microbatch=tokens))
        return sft.update(policy, optimizer, rows, cfg, run)
    packed = PolicyConfig(tokens_per_microbatch=tokens)
    sampled = dict(temperature=1.0, max_dlogp=most, policy=packed)
    if trainer == "agent":
        minibatch = balance(rows, run.world, tokens)[run.rank]
        cfg = grpo_unified.Config(**sampled)
        return grpo_unified.update(policy, optimizer, [minibatch], cfg, run)
    total = sum(sum(row.columns["weight"]) for row in rows)
    cfg = train_rrm.Config(stage=trainer[4:], **sampled)
    return train_rrm.update(policy, optimizer, rows, total, cfg, run)


def changed(policy, trainer, rows, **changes) -> tuple[bool, str]:
    """Whether an update moved the embedding, and why it was skipped."""
    table = policy.hf.model.embed_tokens.weight
    before = table.full_tensor().detach().clone()
    _, skipped = update(trainer, policy, rows, **changes)
    return not torch.equal(table.full_tensor().detach(), before), skipped


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_step_that_is_not_finite_changes_nothing(folder, trainer):
    policy = policy_of(folder)
    policy.hf.model.norm.weight.data.fill_(math.nan)
    moved, skipped = changed(policy, trainer, random_rows([9, 12]))
    assert not moved and "loss nan" in skipped


@pytest.mark.parametrize("trainer", ["rrm_grpo", "agent"])
def test_a_step_whose_sampler_is_another_policy_changes_nothing(folder, trainer):
    rows = random_rows([9, 12])  # log-probs of -1 to 1; the model's are near -5.5
    moved, skipped = changed(policy_of(folder), trainer, rows, most=2.0)
    assert not moved and "max_dlogp = 2.0" in skipped
    assert changed(policy_of(folder), trainer, rows, most=10.0) == (True, "")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_rank_computes_its_own_share_of_the_loss(folder, trainer):
    rows = random_rows([9, 30, 12, 7, 25])
    alone, *shares = [update(trainer, policy_of(folder), rows, run=r)[0] for r in RANKS]
    assert alone == pytest.approx(sum(shares)) and min(map(abs, shares)) > 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_figure_depends_on_the_split_into_microbatches(folder, trainer):
    rows = random_rows([9, 30, 12, 7, 25])
    small, middle, whole = (
        figures(trainer, policy_of(folder), rows, tokens=n) for n in (10, 40, 1000)
    )
    for name, value in whole.items():
        if name != "skipped":
            assert [small[name], middle[name]] == pytest.approx([value] * 2, rel=1e-4), name


def test_minibatches_without_rows_change_no_figure_and_no_step(folder):
    rows, told, weights = random_rows([9, 12]), [], []
    for minibatches in ([[rows]], [[], [rows]], [[], [rows], []]):
        policy = policy_of(folder)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        cfg = grpo_unified.Config(temperature=1.0, max_dlogp=1e9)
        told.append(grpo_unified.update(policy, optimizer, minibatches, cfg, RANKS[0]))
        weights.append(policy.hf.model.embed_tokens.weight.full_tensor().detach())
    assert told[0] == told[1] == told[2] and told[0]["compared"] > 0 and told[0]["worst"] > 0
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_figures_are_those_of_all_ranks(folder, trainer):
    rows = random_rows([9, 12])
    alone, both = (figures(trainer, policy_of(folder), rows, run=r) for r in (RANKS[0], Twin()))
    sums = {"loss", "clipped", "bounded", "tokens", "entropy", "gap", "compared"} & set(alone)
    for name in alone:  # a mean over ranks that are alike is that of one
        assert both[name] == (pytest.approx(2 * alone[name]) if name in sums else alone[name]), name


@pytest.mark.parametrize("trainer", ["rrm_grpo", "agent"])
def test_the_distance_to_the_sampler_is_the_mean_of_distances(folder, trainer):
    rows = random_rows([9, 30])
    told = [figures(trainer, policy_of(folder), rows)]
    for row in rows:  # half of the log-probs lie so far above as the model's lie below
        old = row.columns["sampler_logps"]
        row.columns["sampler_logps"] = [x - (12.0 if t % 2 else 0.0) for t, x in enumerate(old)]
    told.append(figures(trainer, policy_of(folder), rows))
    mean = [x.get("dlogp/mean") or x["gap"] / x["compared"] for x in told]
    assert mean[0] > 4 and mean[1] > 4


def test_behind_a_skipped_minibatch_nothing_is_trained(folder):
    bad, good = random_rows([9, 12]), random_rows([9, 12], seed=1)
    for row in bad:
        row.columns["sampler_logps"] = [-50.0] * len(row.columns["sampler_logps"])
    policy = policy_of(folder)
    table = policy.hf.model.embed_tokens.weight
    before = table.full_tensor().detach().clone()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    cfg = grpo_unified.Config(temperature=1.0, max_dlogp=20.0)
    line = grpo_unified.update(policy, optimizer, [[bad], [good]], cfg, RANKS[0])
    assert torch.equal(table.full_tensor().detach(), before)
    assert line["norms"] == [] and "max_dlogp" in line["skipped"]
