"""What a longer run has to watch: the review in the agent's words, a reward model that fails."""

from types import SimpleNamespace

import pytest

import grpo_unified
import rollout
from reagent.critiques import leak_shares, speaks_of_review
from results.judging import has_fallen
from rollout import Attempt, Episode

REQUEST = rollout.REFINE_PROMPT.replace("{critique}", "You never opened the page of Lake Como.")
KNOWN = rollout.SYSTEM_PROMPT + "\nHow deep is Lake Como?"


@pytest.mark.parametrize(
    ("said", "known", "speaks"),
    [
        ("Lake Como is 425 m deep.", "", False),
        ("As the review says, I open the page.", "", True),
        ("The Reviewer is right.", "", True),
        ("Following your critique, I look again.", "", True),
        ("I previewed the page.", "", False),
        ("The review gives it four stars.", "\nSum up this review of a hotel.", False),
        ("I opened the page of Lake Como.", "", True),
        ("I see the page of Lake Como.", "\n[tool] the page of Lake Como", False),
        ("I give the final answer inside \\boxed{425}.", "", False),  # of the system prompt
        ("Take the\nREVIEW into account", "", True),
        ("I take everything into account and solve it", "", True),
        ("", "", False),
    ],
)
def test_words_of_the_review_that_nothing_else_brought(said, known, speaks):
    assert speaks_of_review(said, REQUEST, KNOWN + known) is speaks


def episode(first, refined=None, score=0.5, correct=True, dropped=""):
    turns = [("system", rollout.SYSTEM_PROMPT), ("user", "How deep is Lake Como?")]
    turns += [("assistant", first), ("tool", "the page of Lake Como: 425 m")]
    attempts = [Attempt((1, 2), (2, 4), None, "answered", 0, score=score, correct=correct)]
    attempts[0].rule_reward = attempts[0].reward = float(correct)
    if refined:
        turns += [("user", REQUEST), ("assistant", refined)]
        attempts.append(Attempt((3, 4), (5, 6), None, "answered", 0, score=0.1, correct=True))
    messages = [dict(role=role, content=content) for role, content in turns]
    return Episode("1", "", [], [], [], [], messages, 0, attempts, dropped)


def test_a_first_attempt_is_held_against_the_wording_and_a_refined_one_against_its_critique():
    episodes = [
        episode("I never opened the page.", "I never opened the page."),
        episode("As the review says.", "425"),
        episode("425", "I see the page of Lake Como."),  # the tool had brought these words
        episode("Take the review into account.", dropped="fault"),
    ]
    found = leak_shares(episodes, rollout.REFINE_PROMPT.replace("{critique}", ""))
    assert found == {"leak/first": 1 / 3, "leak/refined": 0.0}  # o1 had used the words itself
    found = leak_shares([episode("425", "You never opened it.")], "")
    assert found == {"leak/first": 0.0, "leak/refined": 1.0}


@pytest.mark.parametrize(
    ("result", "share"), [("It is deep.", 1.0), ("into account and solve", 0.0)]
)
def test_words_that_a_tool_of_the_attempt_brought_are_known_to_it(result, share):
    own = episode("I take this into account and solve it.")
    own.messages[3]["content"] = result
    assert leak_shares([own], REQUEST) == {"leak/first": share}


def metrics(episodes):
    rewards = grpo_unified.reward_tensor(episodes, 1, lambda attempt: attempt.reward)
    kept = grpo_unified.kept_pools(rewards, rewards, "equal")
    return grpo_unified.step_metrics(episodes, rewards, rewards, rewards * 0, kept)


def test_the_reward_model_is_held_against_the_rule_on_first_attempts():
    pairs = [(0.9, True), (0.2, False), (0.6, False), (0.5, True), (None, True)]
    episodes = [episode("425", "426", score=s, correct=c) for s, c in pairs]
    assert metrics(episodes)["score/auc"] == 0.75  # of four pairs three are in order
    assert "score/auc" not in metrics(episodes[:1]) and "leak/first" in metrics(episodes[:1])


def test_an_alarm_comes_when_ten_values_are_clearly_below_the_best_ten():
    assert not has_fallen([]) and not has_fallen([0.9] * 9 + [0.0] * 0)
    assert not has_fallen([0.9] * 10 + [0.5] * 2)  # .82: a dip
    assert has_fallen([0.9] * 10 + [0.5] * 3)  # .78
    assert not has_fallen([0.9] * 10 + [0.5] * 3 + [1.0] * 10)  # it came back
    assert not has_fallen([0.5, 0.9] * 20)
    for first in (0.2, 0.5, 0.9):  # the best ten may stand anywhere
        rise = [first] * 10 + [0.9] * 10
        assert has_fallen(rise + [0.7] * 10) and not has_fallen(rise + [0.81] * 10)


def test_the_alarm_is_in_the_log_line(capsys, tmp_path):
    run = SimpleNamespace(log=[], rank=0, out=tmp_path, tracker=None)
    line = {"step": 3, "alarm": "score/auc fell", "seconds/step": 1.0}
    grpo_unified.Run.write(run, line)
    assert "ALARM: score/auc fell" in capsys.readouterr().out
