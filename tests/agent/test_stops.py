"""A turn that ended by another stop token than the closer: the token is no part of it."""

from reagent.engines import Sample
from rollout import Episode, append_fragment, append_sample
from tests.agent.test_rollout import CHAT, Limits, Script, Setup

TEXT = CHAT.text("I looked at Ada.")
RESULT = [{"role": "tool", "content": "is here."}]


def appended(*last) -> Episode:
    """An episode of one turn that ended by these tokens, and a result."""
    episode = Episode("1", "Where?", ["here"], [5], [0], [], [], 0)
    ids = [*TEXT, *last]
    sample = Sample(ids, [-0.1 * i for i in range(len(ids))], "stop")
    assert append_sample(episode, CHAT, sample) == ("I looked at Ada.", True)
    assert append_fragment(episode, Setup(Script(), CHAT, None, Limits(), None), RESULT, 1000)
    return episode


def test_another_stop_token_is_neither_kept_nor_trained_and_the_template_closes_the_turn():
    own, other = appended(CHAT.closer_id), appended(CHAT.closer_id + 7)
    assert own.ids == other.ids == [5, *TEXT, *CHAT.fragment(RESULT)]
    assert sum(own.mask) == len(own.logps) == len(TEXT) + 1
    assert sum(other.mask) == len(other.logps) == len(TEXT)
    assert other.logps == [-0.1 * i for i in range(len(TEXT))]


def test_a_result_that_is_cut_off_takes_its_log_probs_with_it():
    episode = Episode("1", "Where?", ["here"], [5], [0], [], [], 0)
    ids = [*TEXT, *CHAT.text("<tool_response>\nis here.")]
    logps = [-0.1 * i for i in range(len(ids))]
    text, whole = append_sample(episode, CHAT, Sample(ids, logps, "length"))
    assert (text, whole) == ("I looked at Ada.", True)
    assert episode.ids == [5, *TEXT] and episode.logps == logps[: len(TEXT)]
