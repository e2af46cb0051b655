"""What a trial prints at its end."""

import pytest

from data import trial
from rollout import Attempt, Episode


def chain(name: str, *right: bool) -> Episode:
    messages = [{"role": "assistant", "content": f"{name} says {n}"} for n in range(len(right))]
    attempts = [
        Attempt((n, n), (n, n + 1), "a", "answered", 0, correct=good, score=0.5, critique=f"c{n}")
        for n, good in enumerate(right)
    ]
    return Episode(name, f"Q {name}", ["a"], [], [], [], messages, 0, attempts=attempts)


CHAINS = [chain("ok", True, True), chain("fix", False, True), chain("bad", False, False)]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_it_ends_with_a_chain_that_refinement_fixed_and_names_the_page(
    tmp_path, monkeypatch, capsys, count
):
    others = [chain(f"n{i}", True, True) for i in range(20)]
    figures = {"first": [0.5, 0.4, 0.6]}
    monkeypatch.setattr(
        trial, "trial", lambda *_: (figures, CHAINS + others + [chain("one", True)])
    )
    (tmp_path / "report.html").touch()
    agent, cfg = f"{tmp_path}/step-000040", trial.Config(agents=f"{tmp_path}/step-000040")
    trial.main(trial.replace(cfg, rrm=trial.RewardModelConfig("r.py"), transcripts=count))
    told = capsys.readouterr().out
    assert told.count("FIRST ATTEMPT") == min(count, 23)
    last = told.rpartition("--- ")[2]
    assert last.startswith(f"{agent}, fixed by refinement\nQuestion: Q fix")
    assert last.index("fix says 0") < last.index("CRITIQUE  c0") < last.index("fix says 1")
    assert "refinement fixed 1 of 2 wrong answers" in last
    assert told.endswith(f"{tmp_path}/report.html\n") and "0.500 ±0.100" in told


def test_where_nothing_was_fixed_it_says_so(capsys):
    trial.show_chains([chain("ok", True, True)], "out/a", 3)
    told = capsys.readouterr().out
    assert "left right by refinement" in told and "fixed 0 of 0 wrong answers" in told
