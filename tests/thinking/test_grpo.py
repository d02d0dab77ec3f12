"""Reinforcement: the estimate is the exact gradient, and clipping, groups and rewards are what they are called."""

import itertools
import math

import pytest
import torch
from thinkers import TOKENIZER

from wrinklefree.config.thinking import GRPOConfig
from wrinklefree.thinking.grpo import GRPO, group_advantages, policy_loss
from wrinklefree.thinking.hidden_pairs import HiddenPairs
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.speech import Speaker

pytestmark = pytest.mark.numeric


def test_the_estimate_is_the_exact_gradient() -> None:
    """One-token answers: the gradient of the mean reward is known; the loss has it on average, scaled as documented."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    exact = torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)[0]
    groups, size = 20_000, 8
    config = GRPOConfig(advantage="dr_grpo", max_answer_tokens=1, kl_weight=0.0)
    chosen = torch.multinomial(logits.detach().softmax(-1).expand(groups, -1), size, replacement=True)
    advantages, _ = group_advantages(rewards[chosen], "dr_grpo")
    new = logits.log_softmax(-1)[chosen].flatten()
    loss, _ = policy_loss(new, new.detach(), new.detach(), torch.arange(new.numel()), advantages.flatten(), config)
    estimate = torch.autograd.grad(-loss, logits)[0] * size / (size - 1)  # the baseline contains the sample itself
    assert (estimate - exact).norm() < 0.05 * exact.norm()


def test_clipping_stops_at_the_edge_and_only_where_it_would_go_on() -> None:
    config = GRPOConfig(clip=(0.2, 0.28))
    old = torch.zeros(4)
    new = torch.tensor([math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, _ = policy_loss(new, old, new.detach(), torch.arange(4), advantages, config)
    loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]) / 4)
    assert loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8) / 4)


def test_k3_is_an_unbiased_divergence() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 6).log_softmax(-1)
    config = GRPOConfig()
    chosen = torch.multinomial(p.exp(), 200_000, replacement=True)
    _, k3 = policy_loss(p[chosen], p[chosen], q[chosen], torch.arange(len(chosen)), torch.zeros(len(chosen)), config)
    assert k3.item() == pytest.approx(((p - q) * p.exp()).sum().item(), rel=0.03)


def test_a_group_is_judged_against_itself() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    advantages, kept = group_advantages(rewards, "grpo")
    assert kept.tolist() == [True, False, True]
    torch.testing.assert_close(advantages[0], torch.tensor([1.0, -1.0, -1.0, 1.0]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    plain, _ = group_advantages(rewards, "dr_grpo")
    assert plain[2].tolist() == [-0.25, -0.25, -0.25, 0.75]


def test_long_answers_count_as_one_answer_or_by_their_length() -> None:
    new, answer_of = torch.zeros(5), torch.tensor([0, 1, 1, 1, 1])
    advantages = torch.tensor([1.0, -1.0])
    grpo, _ = policy_loss(new, new, new, answer_of, advantages, GRPOConfig())
    assert grpo.item() == 0  # one mean each
    plain, _ = policy_loss(new, new, new, answer_of, advantages, GRPOConfig(advantage="dr_grpo", max_answer_tokens=10))
    assert plain.item() == pytest.approx(3 / 20)


def test_a_rollout_is_what_the_policy_says(thinker: LatentThinker, speaker: Speaker, train: HiddenPairs) -> None:
    """Log-probabilities of sampled answers sum to frequencies: the most sampled one is the likeliest, and so on."""
    config = GRPOConfig(group_size=200, max_answer_tokens=1, temperature=1.3)
    objective = GRPO(thinker, speaker, config)
    batch = train.batch([0])
    torch.manual_seed(0)
    rollout = objective.roll_out(batch)
    if not rollout.answers:
        pytest.skip("all of one reward")
    log_probs, answer_of = objective.log_probs(thinker, batch, rollout)
    assert answer_of.tolist() == list(range(200))
    said = torch.cat(rollout.answers)
    for token in said.unique():
        probability = log_probs[said == token][0].exp().item()
        share = (said == token).float().mean().item()
        assert abs(share - probability) < 5 * math.sqrt(probability / 200) + 0.01


def test_groups_without_spread_are_dropped(
    thinker: LatentThinker, speaker: Speaker, train: HiddenPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GRPO(thinker, speaker, GRPOConfig(group_size=4, max_answer_tokens=2, anchor_weight=0.5))
    judged = itertools.cycle([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(objective, "_reward", lambda said, right: next(judged))
    rollout = objective.roll_out(train.batch([0, 1]))
    assert set(rollout.samples) == {1}
    assert (rollout.reward.item(), rollout.kept.item()) == (5 / 8, 0.5)
    monkeypatch.setattr(objective, "_reward", lambda said, right: 1.0)
    terms, metrics = next(objective(objective.prepare(train.batch([0, 1]))))
    assert terms.keys() == {"loss"}
    assert terms["loss"].item() == pytest.approx(0.5 * metrics["anchor"].item())


def test_the_format_counts_where_it_is_asked_for(thinker: LatentThinker, speaker: Speaker) -> None:
    objective = GRPO(thinker, speaker, GRPOConfig(format_reward=0.25))
    five, end = TOKENIZER.convert_tokens_to_ids(["5", "<eos>"])
    assert [objective._reward(said, [five, end]) for said in ([five, end], [five], [end])] == [1.0, 0.75, 0.25]
