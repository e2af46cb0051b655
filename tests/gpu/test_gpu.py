"""The checks that need a card, most important first (`make test-gpu`), and their dry run without
one.
"""

import json

import pytest
import torch

from tests.gpu.checks import CHECKS, LIMITS, run_check

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_card
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_card(name):
    told = run_check(name)
    print(torch.cuda.get_device_name(), torch.__version__, json.dumps(told))
    assert not told["faults"], told


def test_all_of_them_take_less_than_ten_minutes():
    assert sum(LIMITS.values()) < 600 and LIMITS.keys() == CHECKS.keys()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a card the checks themselves run")
@pytest.mark.parametrize("name", CHECKS)
def test_the_same_steps_run_on_a_cpu(name):
    if name == "engine":
        pytest.importorskip("vllm")
    told = run_check(name, small=True)
    print(json.dumps(told))
    assert told["figures"] and not told["faults"], told
