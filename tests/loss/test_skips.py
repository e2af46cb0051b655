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


RANKS = Alone(), One(0), One(1)


def update(trainer, policy, rows, run=RANKS[0], tokens=40, most=1e9) -> tuple[float, str]:
    """One SGD step of a trainer on rows of `random_rows`; -> (loss, why it was skipped)."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    if trainer == "sft":
        cfg = sft.Config(policy=PolicyConfig(tokens_per_microbatch=tokens))
        loss, norm = sft.update(policy, optimizer, rows, cfg, run)
        return loss, "" if math.isfinite(loss + norm) else f"loss {loss}"
    sampled = dict(
        temperature=1.0, max_dlogp=most, policy=PolicyConfig(tokens_per_microbatch=tokens)
    )
    if trainer == "agent":
        minibatch = balance(rows, run.world, tokens)[run.rank]
        cfg = grpo_unified.Config(**sampled)
        line = grpo_unified.update(policy, optimizer, [minibatch], cfg, run)
    else:
        total = sum(sum(row.columns["weight"]) for row in rows)
        cfg = train_rrm.Config(stage=trainer[4:], **sampled)
        line = train_rrm.update(policy, optimizer, rows, total, cfg, run)
    return line["loss"], line["skipped"]


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
    alone, *shares = [update(trainer, policy_of(folder), rows, r)[0] for r in RANKS]
    assert alone == pytest.approx(sum(shares)) and min(map(abs, shares)) > 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_loss_does_not_depend_on_the_split_into_microbatches(folder, trainer):
    rows = random_rows([9, 30, 12, 7, 25])
    losses = [update(trainer, policy_of(folder), rows, tokens=n)[0] for n in (10, 40, 1000)]
    assert losses == pytest.approx([losses[0]] * 3)
