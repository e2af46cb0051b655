"""bench.py: the floors against counted operations, the layouts it compares, its clocks and its
errors.
"""

import importlib.util
import math
import random
import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from reagent import policy
from tests.bench import bench, card
from tests.helpers.tiny import ROOT, apart, tree_of

VOCAB = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bench.make_model(
        tmp_path_factory.mktemp("bench"), VOCAB, hidden=32, layers=2, ff=48, heads=2
    )


def test_forward_flops_are_those_that_pytorch_counts_less_the_upper_half_of_attention(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    n, width = 24, 2 * 32  # layers times hidden
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.arange(n)[None])
    square, triangle = 4 * width * n * n, 2 * width * n * (n + 1)
    assert (
        counted.get_total_flops() - square == bench.forward_flops(model.config, [n], n) - triangle
    )


def test_matrix_weights_are_the_matrices_of_the_blocks(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert bench.matrix_weights(model.config) == sum(
        p.numel() for p in model.model.layers.parameters() if p.dim() == 2
    )


def test_the_table_puts_the_floors_beside_the_seconds():
    machine = bench.Machine(flops=1e9, bandwidth=2e9)
    line = bench.Line("work", [4.0, 1.0, 2.0], tokens=10, flops=1e9, moved=1e9, peak=5e6)
    cells = [cell.strip() for cell in bench.table([line], machine).splitlines()[2].split("|")][1:8]
    assert cells == ["work", "10", "2.000", "5", "50%", "1.000", "0.500"]


def test_works_are_timed_in_turn_after_a_warm_up():
    seen = []
    clock = iter(range(100))

    def timed(work):
        work()
        return next(clock)

    seconds = bench.alternate(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, timed
    )
    assert seen == ["a", "b"] * 3 and seconds == {"a": [0, 2], "b": [1, 3]}


def test_the_peak_holds_what_was_freed_before_the_end():
    size = 200_000_000
    peak, total = bench.peak_of(lambda: torch.ones(size // 4).sum().item())
    assert total == size // 4 and 0.99 * size <= peak < 1.1 * size


def test_two_rows_a_chain_have_the_gradient_of_one(folder):
    one, two = bench.chain_layouts(3, VOCAB)
    assert len(two) == 2 * len(one)
    a, b = (bench.gradient(folder, rows, 300) for rows in (one, two))
    assert max(x.abs().max() for x in a.values()) > 1e-4
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_the_token_ratio_of_the_layouts_is_the_arithmetic_one():
    one, two = bench.chain_layouts(5, VOCAB)
    prompt, critique = 32, 16
    first = [len(row.ids) - prompt for row in two[::2]]
    refined = [len(chain.ids) - prompt - critique - length for chain, length in zip(one, first)]
    p, both, c = prompt * 5, sum(first + refined), critique * 5
    assert sum(len(row.ids) for row in one) == p + both + c
    assert (
        sum(len(row.ids) for row in two) == 2 * p + both + sum(first) + c
    )  # 2P + 3L + c where both attempts are as long


def test_the_flops_of_a_tree_count_its_prefix_once(folder):
    """The tokens of rows of their own less the prefixes, whose attention is left out too."""
    trainers = [bench.Trainer(folder, rows, 300) for rows in tree_layouts()]
    tree, rows = (trainer.line("", []).flops / 3 for trainer in trainers)
    prefix = bench.forward_flops(trainers[0].config, [20], 0)
    assert tree == pytest.approx(rows - 2 * prefix)
    assert [t.tokens for t in trainers] == [33, 73]


def tree_layouts():
    tree = tree_of(20, [4, 1, 8], random.Random(0), VOCAB)
    return [tree], apart(tree)


def test_the_gradient_is_not_clipped_and_that_of_the_plain_loss(folder):
    rows = bench.random_rows([20, 9], VOCAB, prompt=4)
    got = bench.gradient(folder, rows, 64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = 0.0
    for row in rows:
        logps = torch.log_softmax(model(torch.tensor([row.ids])).logits[0, :-1], -1)
        logps = logps.gather(1, torch.tensor(row.ids[1:])[:, None])[3:, 0]
        ratio = logps.exp()  # the sampler's log-probs are 0 here
        advantage, weight = (torch.tensor(row.columns[name]) for name in ("advantage", "weight"))
        loss = (
            loss
            - (weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.34) * advantage)).sum()
        )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(got[name], -parameter.grad, atol=1e-6), name


def test_the_ratios_begin_at_one(folder):
    rows, policy = bench.random_rows([12, 7], VOCAB, prompt=3), bench.load(folder)
    bench.set_mu(policy, rows)
    logps, _ = policy(bench.collate(rows, ("sampler_logps",), bench.CPU))
    assert torch.allclose(
        logps, torch.tensor([x for row in rows for x in row.columns["sampler_logps"]]), atol=1e-6
    )


def test_points_that_follow_the_flops_lie_on_the_line_of_the_plot():
    lines = [bench.Line("", [f / 10], flops=f) for f in (10.0, 30.0, 100.0)]
    measured, by_flops = bench.growth_panel(lines, (1, 2, 4), "x").lines.values()
    points = [(1, 1.0), (2, 3.0), (4, 10.0)]
    assert measured.points == by_flops.points == [(math.log10(x), math.log10(y)) for x, y in points]


def test_lookups_take_the_time_they_are_told():
    import asyncio

    tools = bench.Tools(lambda: 0.01)
    seen = asyncio.run(tools.call("search", {"queries": ["Quin"]}))
    assert "leads to Rome." in seen.text and seen.seconds == 0.01
    assert asyncio.run(tools.call("search", {})).status == "error"


def test_an_unknown_section_is_an_error_that_lists_the_known(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure_machine", lambda: bench.Machine(1e9, 1e9))
    with pytest.raises(SystemExit, match="what = 'speed': one of trainer"):
        bench.main(bench.Config(what="speed", out_dir=str(tmp_path)))


def test_the_dry_run_of_a_card_makes_the_steps_of_its_table(monkeypatch, capsys):
    kinds = {(c.what, c.compiled, c.attention, c.again, c.lora_rank): c for c in card.CASES}
    wanted = [("sft", True, "auto", False, 0), ("rl", True, "cudnn", False, 0)]
    wanted += [("rl", True, "auto", True, 0), ("rl", True, "auto", False, 32)]
    monkeypatch.setattr(card, "CASES", [kinds[kind] for kind in wanted])
    chunks = dict(policy.HEAD_CHUNK)
    bench.main(bench.Config(device="dry"))
    rows = capsys.readouterr().out.splitlines()[3:]
    assert len(rows) == 4 and all("| 2 steps ran |" in row for row in rows)
    assert "| 38,945 | 36.5 |" in rows[1]  # what was measured before stands beside
    assert policy.HEAD_CHUNK == chunks


def test_the_table_of_a_card_holds_what_was_measured_before():
    """docs/measured.md has the figures of the one run on a GPU."""
    text = (ROOT / "docs" / "measured.md").read_text()
    told = {c.before for c in card.CASES if c.before}
    assert len(told) == 10
    for tokens, peak in re.findall(r"\| ([\d,]+) \| [\d.]+ % \| ([\d.]+) \|", text):
        assert (int(tokens.replace(",", "")), float(peak)) in told


def test_without_a_card_the_table_of_a_card_says_so():
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is no GPU here; --device=dry"):
            bench.main(bench.Config(device="cuda"))


def test_a_row_that_fails_is_told_and_the_next_one_begins(monkeypatch, capsys):
    def stepper(case, config, run):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(card, "CASES", card.CASES[:2])
    monkeypatch.setattr(card, "stepper", stepper)
    card.main(dry=True)
    assert capsys.readouterr().out.count("| RuntimeError: no kernel image |") == 2


def test_a_row_of_a_kernel_that_is_dropped_has_no_figures_of_another(monkeypatch, capsys):
    flash = next(case for case in card.CASES if case.attention == "flash")
    monkeypatch.setattr(card, "CASES", [flash])
    card.main(dry=True)
    assert "flash was dropped for torch's" in capsys.readouterr().out


def test_a_row_that_hangs_or_kills_its_process_is_told_and_the_next_one_begins(capsys):
    """a is measured, b hangs, c kills, d is measured; e fails the card, and f has a new process."""
    script = """
import os, sys, time
for name in "abcdef"[int(sys.argv[1]):]:
    if name == "b":
        time.sleep(60)
    if name == "c":
        os.abort()
    print("|", name, "| 1 |", os.getpid(), flush=True)
    if name == "e":
        break
"""
    card.drive([sys.executable, "-c", script], [*"abcdef"], limit=60.0, quiet=8.0)
    rows = capsys.readouterr().out.splitlines()
    told = [row.split(" | ")[1] for row in rows]
    assert [row[2] for row in rows] == [*"abcdef"]
    assert told[:3] == ["1", "not done in 8 s |", "ended without a row |"]
    pids = [rows[i].split()[-1] for i in (3, 4, 5)]
    assert pids[0] == pids[1] != pids[2]


def test_when_the_time_of_the_table_is_over_its_other_rows_are_told(capsys):
    card.drive(["no such command"], ["a", "b"], limit=-1.0, quiet=1.0)
    assert capsys.readouterr().out.count("not begun: ") == 2


def test_after_its_time_no_row_is_begun(monkeypatch, capsys):
    monkeypatch.setattr(card, "LIMIT", -1.0)
    card.main(dry=True)
    assert capsys.readouterr().out.count("not begun: ") == len(card.CASES)


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_without_trl_the_comparison_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure_machine", lambda: bench.Machine(1e9, 1e9))
    with pytest.raises(SystemExit, match="pip install trl"):
        bench.main(bench.Config(vs="trl", out_dir=str(tmp_path)))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_makes_the_same_update(folder):
    from tests.bench import bench_trl

    rows = bench.random_rows([20, 33, 9, 16, 12, 40, 8, 15], VOCAB, prompt=4)
    bench.set_mu(bench.load(folder), rows)
    a, b = bench.gradient(folder, rows, 64), bench_trl.gradient(folder, rows)
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.slow
def test_the_agent_knows_its_tasks_by_heart(tmp_path):
    agent = bench.Agent(bench.Config(out_dir=str(tmp_path), rows=4), temperature=0.1)
    episodes = agent.chains(agent.rrm)
    assert [[len(a.calls) for a in e.attempts] for e in episodes] == [[2, 2]] * 4
    ended = {(a.termination, a.score) for e in episodes for a in e.attempts}
    assert ended == {("answered", 0.55)}  # what the judgments that it learned say
    assert agent.sampled > sum(sum(e.mask) for e in episodes)  # judgments too
    answers = [
        re.sub(
            r"\D",
            "",
            bench.FACTS[{"Quin": "Rome", "Siena": "Troy", "Uma": "Vera", "Wien": "Xena"}[s]],
        )
        for s in bench.STARTS
    ]
    assert [e.attempts[1].answer for e in episodes] == answers
    assert not math.isnan(agent.line("", [1.0], 1, [len(e.ids) for e in episodes], 9).flops)


@pytest.mark.parametrize("low, high", [(0.1, 4.5), (1, 1), (0.03, 0.04), (3, 812), (0.5, 10)])
def test_logarithmic_marks_cover_the_values_with_no_mark_to_spare(low, high):
    low, high = math.log10(low), math.log10(high)
    found = list(bench.log_marks(low, high))
    assert found[0] <= low and high <= found[-1]
    assert len(found) <= 2 or (found[1] > low and found[-2] < high)
