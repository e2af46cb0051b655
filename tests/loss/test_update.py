"""A whole step of updates, from rewards to parameters, against plain transformers, one row an
attempt, and PyTorch.
"""

import pickle
import random
import statistics
from array import array
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import grpo_unified as grpo
from reagent.policy import balance, collate
from rollout import Attempt, Episode
from tests.helpers.tiny import Alone, tiny_model
from tests.loss.test_model import policy_of

GROUP, LR, T, KL = 2, 0.5, 0.7, 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def attempt_logps(plain, episode, span) -> torch.Tensor:
    """Log-probs of the sampled tokens of one attempt, alone in its row with all that came before
    it.
    """
    ids = torch.tensor([episode.ids[: span[1]]])
    logps = F.log_softmax(plain(ids).logits[0, :-1] / T, -1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[[t - 1 for t in range(*span) if episode.mask[t]]]


def test_what_goes_between_ranks_is_trained_on_as_it_is():
    episode = Episode("1", "q", ["x"], [5, 151_935, 7, 8], [0, 1, 0, 1], [-0.1, -1 / 3], [], 0)
    episode.attempts = [Attempt((1, 4), (0, 0), "x", "answered", 0, reward=1.0)]
    sent = pickle.loads(pickle.dumps(episode.packed()))
    batches = []
    for each in (episode, sent):
        rows = grpo.training_sequences([each], torch.tensor([[[0.5], [0.0]]]), 1, "seq_mean")
        batches.append(collate(rows, grpo.COLUMNS, torch.device("cpu")))
    texts = [repr(vars(batch)) for batch in batches]
    assert texts[0] == texts[1] and type(sent.ids) is array
    assert len(pickle.dumps(replace(episode, ids=[9] * 9000).packed())) < 40_000


def make_episodes(plain) -> list[Episode]:
    """3 questions x 2 chains of two attempts, each with a tool result inside; the sampler is some
    way off the policy.
    """
    rng, episodes = random.Random(0), []
    for n in range(3 * GROUP):
        cuts = [
            3 + rng.randrange(4),
            9 + rng.randrange(9),
            20 + rng.randrange(3),
            26 + rng.randrange(9),
        ]
        mask = [
            int((cuts[0] <= t < cuts[1] or cuts[2] <= t) and t not in (cuts[0] + 2, cuts[2] + 1))
            for t in range(cuts[3])
        ]
        spans = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
        attempts = [
            Attempt(span, (0, 0), "x", "answered", 0, reward=rng.random()) for span in spans
        ]
        ids = [rng.randrange(250) for _ in mask]
        episodes.append(Episode(f"q{n // GROUP}", "q", ["x"], ids, mask, [], [], 0, attempts))
        with torch.no_grad():
            own = torch.cat([attempt_logps(plain, episodes[-1], span) for span in spans])
        episodes[-1].logps = [x + rng.gauss(0, 0.3) for x in own.tolist()]
    episodes[1].attempts[1].reward = None  # a failed judgment
    episodes[4].attempts.pop()  # a chain without a second stage
    return episodes


def parameters_by_hand(plain, episodes, old_logps: str, loss_agg: str, reference=None):
    """Equations 8 and 9, question by question = minibatch by minibatch, with SGD; the parameters
    and the sum of log pi - log pi_ref over the trained tokens."""
    moved = 0.0
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    jobs = []  # (question, episode, attempt, mu, old)
    for n, episode in enumerate(episodes):
        done = 0
        for attempt in episode.attempts:
            count = sum(episode.mask[slice(*attempt.span)])
            mu = torch.tensor(episode.logps[done : done + count])
            with torch.no_grad():
                old = (
                    attempt_logps(plain, episode, attempt.span) if old_logps == "recomputed" else mu
                )
            done += count
            if attempt.reward is not None:
                jobs.append((n // GROUP, episode, attempt, mu, old))
    for question in range(3):
        pool = [job[1:] for job in jobs if job[0] == question]
        rewards = [attempt.reward for _, attempt, _, _ in pool]
        mean, std = statistics.mean(rewards), statistics.stdev(rewards)
        terms = []
        for episode, attempt, mu, old in pool:
            advantage = (attempt.reward - mean) / (std + 1e-6)
            ratio = (attempt_logps(plain, episode, attempt.span) - old).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clip(0.8, 1.34) * advantage)
            terms.append(surrogate * (old - mu).exp().clip(max=2.0))
            if reference:
                away = attempt_logps(plain, episode, attempt.span)
                away = away - attempt_logps(reference, episode, attempt.span).detach()
                terms[-1] = terms[-1] - KL * away.square() / 2
                moved += away.sum().item()
        loss = -(
            torch.cat(terms).mean()
            if loss_agg == "token_mean"
            else torch.stack([t.mean() for t in terms]).mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in plain.named_parameters()}, moved


@pytest.mark.parametrize(
    "old_logps, loss_agg, kl",
    [
        ("sampler", "seq_mean", False),
        ("recomputed", "seq_mean", False),
        ("sampler", "token_mean", False),
        ("sampler", "seq_mean", True),
    ],
)
def test_three_minibatches_of_updates_equal_a_loop_over_attempts(
    folder, old_logps, loss_agg, kl, tmp_path
):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    episodes, policy = make_episodes(plain), policy_of(folder)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    advantages = grpo.pooled_advantages(grpo.reward_tensor(episodes, GROUP, lambda a: a.reward))
    minibatches = []
    for q in range(3):
        rows = grpo.training_sequences(
            episodes[q * GROUP :][:GROUP], advantages[q : q + 1], GROUP, loss_agg
        )
        minibatches.append(balance(rows, 1, 40)[0])
    references = [None, None]  # another model, so that the KL pulls from the first step on
    if kl:
        other = tiny_model(tmp_path, seed=1)
        references = [policy_of(other), AutoModelForCausalLM.from_pretrained(other)]
    cfg = grpo.Config(temperature=T, old_logps=old_logps, max_grad_norm=1e9, max_dlogp=10.0)
    cfg.kl_coef = KL if kl else 0.0
    optimizer = torch.optim.SGD(policy.parameters(), lr=LR)
    done = grpo.update(policy, optimizer, minibatches, cfg, Alone(), references[0])
    assert len(done["norms"]) == 3 and not done["skipped"] and done["clipped"] > 0
    expected, moved = parameters_by_hand(plain, episodes, old_logps, loss_agg, references[1])
    assert done["kl"] == pytest.approx(moved, rel=1e-3) and (abs(moved) > 1) == kl
    for name, p in policy.hf.named_parameters():
        assert torch.allclose(p.full_tensor(), expected[name], atol=1e-5), name
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-3
