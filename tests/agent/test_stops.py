"""How a turn ends: by another stop token than the closer, by a made-up result, or never."""

import pytest

import rollout
from reagent.engines import Sample
from rollout import Episode, append_fragment, append_sample
from tests.agent.test_rollout import CHAT, Limits, Script, Setup, episode_of

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


class Endless:
    """An engine that writes as much as it may; notes (ids before, tokens that it may write)."""

    def __init__(self):
        self.asked = []

    async def generate(self, ids, *, max_new_tokens, **_):
        self.asked.append((len(ids), max_new_tokens))
        return Sample([TEXT[0]] * max_new_tokens, [-1.0] * max_new_tokens, "length")


@pytest.mark.parametrize("per_attempt, context", [(700, 4000), (11_000, 1500)])
def test_a_turn_that_never_ends_leaves_room_for_the_final_answer(per_attempt, context):
    limits = dict(max_tokens_per_attempt=per_attempt, max_context=context, final_tokens=150)
    engine = Endless()
    episode = episode_of(engine=engine, **limits)
    (begin, first), (before, last) = engine.asked
    end = min(begin + per_attempt, context)
    assert begin + first == end - 150 and before + last == end == len(episode.ids)
    assert rollout.FINAL_PROMPT in episode.messages[-2]["content"] and last > 10
