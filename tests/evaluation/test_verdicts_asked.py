"""What a judge of answers is asked, and which of its verdicts counts."""

import asyncio

import evaluate
from reagent import scorers
from results import benchmarks
from results.journal import SEALED, Journal, sealed
from tests.evaluation.test_evaluate import line_of, row_of, task_of


class Judge:
    """Notes what it is asked; an answer that holds "good" is right, one with "odd" unscored."""

    model, problem = "judge", "no verdict"

    def __init__(self, name="j/1"):
        self.name, self.asked = name, []

    async def __call__(self, question, golds, answer, secret=False):
        self.asked.append((question, golds, answer, secret))
        return None if "odd" in answer else "good" in answer


def judged(task, journal, judge):
    return asyncio.run(evaluate.judge_answers([task], journal, judge))


def test_every_attempt_is_judged_by_its_own_answer_once(tmp_path, capsys):
    task = task_of(tmp_path, [row_of("0", "q?", ["a", "b"]), row_of("1", "r?")], scorer="judge")
    journal, judge = Journal(tmp_path / "out"), Judge()
    answers = {"0": ["bad", "good"], "1": ["good", "odd"]}
    keys = dict(task.keys())
    for key, row in keys.items():
        journal.append(line_of(task, row, 0, answers[key[1]], [None, None]))
    assert judged(task, journal, judge) == 1
    assert "1 of 4 answers stay unscored (no verdict): run" in capsys.readouterr().err
    assert sorted(judge.asked) == [
        ("q?", ["a", "b"], "bad", False),
        ("q?", ["a", "b"], "good", False),
        ("r?", ["a"], "good", False),
        ("r?", ["a"], "odd", False),
    ]
    said = {key[1]: [journal.said(key, i, judge.name)[1] for i in (0, 1)] for key in keys}
    assert said == {"0": [False, True], "1": [True, None]}
    judge.asked.clear()
    assert judged(task, journal, judge) == 1 and [each[2] for each in judge.asked] == ["odd"]
    journal.close()


def test_neither_another_judge_nor_another_answer_lends_its_verdict(tmp_path):
    task = task_of(tmp_path, [row_of("0", "q?")], scorer="judge")
    ((key, row),) = task.keys()
    journal, judge = Journal(tmp_path / "out"), Judge()
    journal.append(line_of(task, row, 0, ["good"], [None]))
    judged(task, journal, judge)
    assert journal.said(key, 0, "j/1")[1] is True and journal.said(key, 0, "k/1")[1] is None
    journal.append(line_of(task, row, 0, ["bad"], [None]))  # the chain was run again
    assert journal.said(key, 0, "j/1")[1] is None
    journal.close()


def test_a_judge_is_told_that_a_question_is_secret(tmp_path):
    texts = {"question": sealed("who?", "k9"), "answer": sealed("Ada", "k9")}
    row = dict(id="0", kind="qa", meta={"encrypted": True, "canary": "k9"}, **texts)
    task = task_of(tmp_path, [row], scorer="judge")
    ((_, row),) = task.keys()
    journal, judge = Journal(tmp_path / "out"), Judge()
    line = line_of(task, row, 0, ["good"], [None])
    journal.append(line)
    judged(task, journal, judge)
    assert judge.asked == [("who?", ["Ada"], "good", True)]
    journal.close()


def test_an_encrypted_record_has_no_text_in_the_open():
    assert set(SEALED) == {"question", "gold", "messages", "attempts"}


def test_the_rules_of_the_sets():
    """Scorers and rollouts of the table; bamboogle and 2wiki go by HotpotQA's rule for yes and
    no, MuSiQue does not; AIME's 30 questions are asked eight times.
    """
    rules = {name: spec.scorer for name, spec in benchmarks.DATASETS.items()}
    assert rules["bamboogle"] == "bamboogle" and rules["musique200"] == "musique"
    assert {rules[name] for name in ("webwalker", "hle", "xbench")} == {"judge"}
    many = {name: spec.rollouts for name, spec in benchmarks.DATASETS.items() if spec.rollouts > 1}
    assert many == {"gaia": 3, "gaia_text": 3, "aime24": 8, "aime25": 8}
    for scorer, f1 in (("hotpotqa", 0.0), ("2wiki", 0.0), ("bamboogle", 0.0), ("musique", 2 / 3)):
        assert scorers.score(scorer, "yes indeed", "yes")["f1"] == f1


def test_the_f1_is_that_of_the_best_alias():
    found = scorers.score("hotpotqa", "Ada Byron", ["Charles Babbage", "Ada Byron King", "Ada"])
    assert found == {"correct": False, "em": 0.0, "f1": 0.8}
    assert scorers.score("musique", "Ada", ["Charles Babbage", "Ada"])["correct"] is True
