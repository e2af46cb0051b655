"""The learning rate of every step, by hand."""

import math
from types import SimpleNamespace

import pytest

import grpo_unified
import sft
import train_rrm

COSINE = [0.25, 0.5, 0.75, 1.0]  # warm-up, then from 1 to .1 in ten steps
COSINE += [0.55 + 0.45 * math.cos(math.pi * i / 10) for i in range(10)]


@pytest.mark.parametrize("script", [sft, train_rrm])
def test_a_linear_warm_up_and_a_cosine(script):
    cfg = SimpleNamespace(lr=2e-3, warmup_steps=4, steps=14, lr_end=0.1)
    rates = [script.learning_rate(step, cfg) / cfg.lr for step in range(14)]
    assert rates == pytest.approx(COSINE)
    assert script.learning_rate(20, cfg) == pytest.approx(2e-4)  # a run that goes on beyond it


@pytest.mark.parametrize("script", [sft, train_rrm])
def test_without_warm_up_and_decay_it_is_constant(script):
    cfg = SimpleNamespace(lr=2e-3, warmup_steps=0, steps=3, lr_end=1.0)
    assert [script.learning_rate(step, cfg) for step in range(3)] == pytest.approx([2e-3] * 3)


def test_the_agents_goes_down_in_a_line():
    cfg = SimpleNamespace(lr=2e-3, steps=5, lr_end=0.2)
    rates = [grpo_unified.learning_rate(step, cfg) / cfg.lr for step in range(5)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    cfg = SimpleNamespace(lr=2e-3, steps=1, lr_end=1.0)
    assert grpo_unified.learning_rate(0, cfg) == 2e-3
