"""The checks that need a card, most important first (`make test-gpu`), and their dry run without
one.
"""

import json
import subprocess
import types

import pytest
import torch

import grpo_unified
from reagent.config import parse_config
from reagent.engines import VLLMEngine
from tests.gpu import checks, older
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


def test_the_toys_run_on_a_card_is_one_that_the_trainer_takes():
    arguments = checks.toy_arguments("out", "out/agent", "vllm", 3)
    grpo_unified.check_config(parse_config(grpo_unified.Config, arguments))


def test_a_check_that_is_not_done_in_its_time_tells_the_figures_it_had(monkeypatch):
    def run(command, timeout, **_):
        printed = b'a line\n{"figures": {"a": 1}}\n{"figures": {"a": 1, "b": 2}}\n'
        raise subprocess.TimeoutExpired(command, timeout, printed)

    monkeypatch.setattr(subprocess, "run", run)
    told = run_check("dense")
    assert told["figures"] == {"a": 1, "b": 2} and told["faults"] == ["not done in 40 s"]


def test_a_check_that_fails_has_the_end_of_its_errors_as_its_fault(monkeypatch):
    done = types.SimpleNamespace(stdout='{"figures": {"a": 1}}\n', stderr="no kernel image")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    told = run_check("dense")
    assert told["figures"] == {"a": 1} and told["faults"] == ["no kernel image"]


def test_an_engine_of_an_older_vllm_closes_too(monkeypatch):
    """Its client has no finalizer: what `close` detaches is put there."""
    client, closed = types.SimpleNamespace(), []
    core = types.SimpleNamespace(engine_core=client)
    engine = object.__new__(VLLMEngine)
    engine.llm = types.SimpleNamespace(llm_engine=core)
    monkeypatch.setattr(older, "plain_close", lambda self: closed.append(client._finalizer))
    engine.close()
    assert closed[0].detach() is not None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a card the checks themselves run")
@pytest.mark.parametrize("name", CHECKS)
def test_the_same_steps_run_on_a_cpu(name):
    if name == "engine":
        pytest.importorskip("vllm")
    told = run_check(name, small=True)
    print(json.dumps(told))
    assert told["figures"] and not told["faults"], told
