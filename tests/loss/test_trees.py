"""Rows that are trees, a prefix and its continuations, against the same tokens in rows of their
own: log-probs, entropy, gradients and what attention reads.
"""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from reagent.attention import row_ends
from reagent.policy import balance, collate, load_policy
from tests.helpers.tiny import apart, tiny_model, tree_of
from tests.loss.test_model import COLUMNS, CPU, assert_same, gradients, policy_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), heads=4, kv_heads=2)


GROUPS = {  # prefix and lengths of the continuations of each tree in a micro-batch
    "one": [(9, [5])],
    "two": [(9, [5, 3])],
    "eight": [(17, [5, 5, 1, 12, 7, 5, 2, 30])],
    "one-token-prefix": [(1, [4, 1, 6])],
    "one-token-each": [(6, [1, 1, 1])],
    "several": [(9, [5, 3, 5]), (1, [2, 2]), (30, [4] * 8), (3, [40, 1])],
}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_a_tree_has_the_logps_and_gradients_of_rows_of_their_own(folder, groups, again):
    rng, policy = random.Random(len(groups)), policy_of(folder, again)
    trees = [tree_of(*group, rng) for group in groups]
    rows = [row for tree in trees for row in apart(tree)]
    batches = collate(trees, COLUMNS, CPU), collate(rows, COLUMNS, CPU)
    for a, b in zip(*(policy(batch, 0.7) for batch in batches)):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(batches[0].targets, batches[1].targets)
    assert_same(gradients(policy, [trees]), gradients(policy, [rows]))


def test_trees_and_plain_rows_share_a_micro_batch(folder):
    rng, policy = random.Random(0), policy_of(folder)
    mixed = [
        apart(tree_of(5, [7], rng))[0],
        tree_of(9, [5, 3], rng),
        apart(tree_of(2, [1], rng))[0],
    ]
    rows = [row for each in mixed for row in apart(each)]
    assert_same(gradients(policy, [mixed]), gradients(policy, [rows]))


@pytest.mark.parametrize("window", [2, 5, 12])
def test_a_window_reaches_into_the_prefix(tmp_path, window):
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=256)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=window)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MistralConfig(**shape, **heads)).save_pretrained(tmp_path)
    tree = tree_of(9, [5, 1, 14], random.Random(1))
    policy = load_policy(str(tmp_path), False)
    a, b = (policy(collate(rows, (), CPU))[0] for rows in ([tree], apart(tree)))
    assert torch.allclose(a, b, atol=1e-5)


def test_a_micro_batch_holds_the_tokens_that_are_computed():
    rng = random.Random(0)
    trees = [tree_of(100, [10] * 8, rng) for _ in range(4)]  # 180 tokens each, apart 880
    assert [len(each) for each in balance(trees, 1, 360)[0]] == [2, 2]
    batch = collate(trees[:2], COLUMNS, CPU)
    assert batch.input_ids.shape == (1, 360) and sum(batch.lengths) == 360
    assert batch.position_ids[0, [0, 109, 110, 179, 180]].tolist() == [0, 109, 100, 109, 0]


def test_what_attention_is_told_of_a_tree():
    rows = row_ends([5, 2, 3], CPU, [slice(0, 0), slice(0, 3), slice(7, 7)])
    assert rows["read"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert rows["ends"].tolist() == rows["host_ends"].tolist() == [0, 5, 7, 10]
    assert rows["key_ends"].tolist() == rows["host_key_ends"].tolist() == [0, 5, 10, 13]
    assert rows["longest"] == 5 and "read" not in row_ends([5, 2], CPU)
