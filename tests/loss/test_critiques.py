"""What a critique is worth by its length and its repetitions."""

import pytest

from reagent.critiques import DISTINCT, FEWEST_WORDS, MOST_WORDS, prose

WORDS = [f"word{'abcdefghij'[i // 100]}{'abcdefghij'[i // 10 % 10]}{i % 10}x" for i in range(900)]


@pytest.mark.parametrize(
    "words, worth",
    [
        ([], 0.0),
        (WORDS[:1], 1 / 5),
        (WORDS[:4], 4 / 5),
        (WORDS[:5], 1.0),
        (WORDS[:400], 1.0),
        (WORDS[:800], 0.5),
        (WORDS[:3] * 10, 3 / 28 / 0.7),  # 28 triples of words, three of them different
        (WORDS[:30] * 2, 30 / 58 / 0.7),
        (WORDS[:30] + WORDS[:5], 1.0),
    ],
)
def test_a_text_is_worth_its_words_up_to_a_length_and_without_repetition(words, worth):
    assert (FEWEST_WORDS, MOST_WORDS, DISTINCT) == (5, 400, 0.7)
    assert prose(" ".join(words), MOST_WORDS) == pytest.approx(worth)
