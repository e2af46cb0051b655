"""The ablation's numbers by hand, and that what is finished is not run again."""

import json

import pytest

from tests.helpers.tiny import load

ablation = load("data/toy/ablation.py")


def test_steps_to_a_level_are_a_mean_of_three_and_none_where_it_is_not_reached():
    log = [{"accuracy/first": x} for x in (0.5, 1.0, 0.8, 0.9, 1.0, 0.1)]
    assert ablation.steps_to(log, 0.9) == 4 and ablation.steps_to(log, 0.95) is None


def test_a_cell_has_mean_and_deviation_and_tells_how_many_seeds_have_a_value():
    assert ablation.cell([0.5, 0.7, None]) == "0.600 ± 0.141 (2 of 3)"
    assert ablation.cell([12, 14]) == "13 ± 1" and ablation.cell([None]) == "-"


def finished(folder, first, steps):
    folder.mkdir(parents=True)
    trial = {"first": first, "first, T .3": first, "grounded": first, "refined": 1.0, "calls": 4.0}
    (folder / "result.json").write_text(
        json.dumps({"cpu_seconds": 100.0, "trials": [trial, trial | {"first": 1.0}]})
    )
    lines = [
        {"step": i + 1, "accuracy/first": i / steps, "accuracy/refined": 1.0, "score/wrong": 0.2}
        for i in range(steps)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_equal_steps_and_equal_attempts_are_two_rows_of_one_run(tmp_path):
    for seed, first in enumerate((0.4, 0.6)):
        finished(tmp_path / "toy" / "R" / str(seed), first, 2 * ablation.STEPS)
    before = {"toy": dict.fromkeys(ablation.TRIED, 0.9)}
    text = ablation.write_results(tmp_path, before, seeds=2).splitlines()
    rows = {
        line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text if line.startswith("| ")
    }
    assert rows["R"][0] == "0.500 ± 0.141" and rows["R"][-1] == "50 ± 0 |"
    assert (
        rows["R, 2x steps"][0] == "1.000 ± 0.000" and rows["SFT (refined: Reagent-C)"][2] == "0.9"
    )
    assert "R, toy" in (tmp_path / "curves.svg").read_text() and "U" not in rows


def test_a_finished_run_is_not_run_again(tmp_path):
    finished(tmp_path / "run", 0.5, 3)
    before = (tmp_path / "run" / "result.json").read_bytes()
    ablation.run(ablation.World(tmp_path, "no model here", "search"), "U", 0, tmp_path / "run")
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_u_is_compared_with_r_seed_by_seed():
    # differences .1, .2, .3: mean .2, deviation .1, t(2 degrees) 4.303
    assert ablation.paired([0.5, 0.7, 0.9], [0.4, 0.5, 0.6]) == "+0.200 [-0.048, +0.448]"


def test_a_noisy_score_is_the_annotators_with_probability_p():
    noisy, prepare = load("data/toy/noisy.py").noisy, load("data/toy/prepare.py")
    attempts = [[{"role": "assistant", "content": f"I guess. \\boxed{{{n}}}"}] for n in range(400)]
    question = "Follow the trail of 2 from Kiel. Which code is at its end?"

    def score(annotate, messages):
        return prepare.blocks(annotate(question, messages))["score"]

    told = [score(noisy(0.75), messages) for messages in attempts]
    honest = [score(prepare.annotate, messages) for messages in attempts]
    kept = sum(a == b for a, b in zip(told, honest))
    assert 270 <= kept <= 330 and all(b in (a, 1 - a) for a, b in zip(told, honest))
    assert told == [score(noisy(0.75), messages) for messages in attempts]


def test_honesty_is_drawn_by_p_for_r_and_u(tmp_path):
    for p, name in ((1.0, "hard"), (0.75, "hard p 0.75")):
        for arm in ("R", "U"):
            finished(tmp_path / name / arm / "0", p * 0.8, ablation.STEPS)
    finished(tmp_path / "hard" / "R" / "1", 0.1, ablation.STEPS)  # a seed with fewer p is left out
    lines = ablation.honesty_panel(tmp_path, seeds=2).lines
    drawn = [(0.75, pytest.approx(0.6)), (1.0, 0.8)]
    assert {arm: line.points for arm, line in lines.items()} == {
        "R": drawn,
        "R, 2x steps": [(0.75, 1.0), (1.0, 1.0)],
        "U": drawn,
    }
