"""Phase 3: reinforce thoughts whose answers are right (GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783).

Policy      pi(o | q) = prod_t LM(o_t | q, <think>, S(q), </think>, o_<t) at a temperature; S(q) are the soft tokens.
            The language model is frozen, and log pi is differentiable in S through it.
Advantage   of a group of G answers with rewards r: (r - mean) / (deviation + 1e-4), or r - mean alone (dr_grpo)
Loss        - min(rho A, clip(rho, 1 - low, 1 + high) A) + beta k3,  rho = pi / pi_old,
            k3 = exp(l_ref - l) - (l_ref - l) - 1, l = log pi; the reference is the thinker at the start;
            a mean over the tokens of an answer and then the answers (grpo), or the sum / (G x the longest) (dr_grpo)
Anchor      the cross entropy of the right answer keeps the thinker from forgetting what it knows

A group whose answers are all right or all wrong has no advantages, and is dropped.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wrinklefree.config.thinking import GRPOConfig
from wrinklefree.core.batch import Batch
from wrinklefree.objectives.base import LOSS, Loss, Metrics, Objective
from wrinklefree.objectives.losses import token_losses
from wrinklefree.thinking.hidden_pairs import answers_of, prompts_of
from wrinklefree.thinking.injection import speak_thoughts
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.reading import read_logits
from wrinklefree.thinking.speech import Speaker

SPREAD_EPS = 1e-4


class Rollout(NamedTuple):
    """Sampled answers, G in a row for each prompt that is kept."""

    samples: list[int]  # the row of the prompt that each answer is to
    answers: list[Tensor]  # ids [A], with the end-of-sequence token if it came
    advantages: Tensor  # [number of answers]
    reward: Tensor  # mean over all prompts, also those that are not kept
    kept: Tensor  # the share of the prompts that is


class GRPO(Objective):
    """The objective of reinforcement, over batches of `HiddenPairs`: their answers are the right ones."""

    def __init__(self, model: LatentThinker, speaker: Speaker, config: GRPOConfig) -> None:
        self.thinker, self.speaker, self.config = model, speaker, config
        self.losses_per_batch = config.updates
        for block in model.network.blocks:
            block.dropout = 0.0  # type: ignore[assignment]  # old and new log-probabilities are of one function
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()

    def prepare(self, batch: Batch) -> Batch:
        """Add sampled answers: how many of them are kept, which the policy's loss is a mean over, depends on them."""
        rollout = self.roll_out(batch)
        lengths = [len(answer) for answer in rollout.answers]
        return {
            **batch,
            "rollout_samples": torch.tensor(rollout.samples, dtype=torch.long),
            "rollout_answers": torch.cat([batch["input_ids"].new_empty(0), *rollout.answers]),
            "rollout_lengths": torch.tensor(lengths, dtype=torch.long),
            "advantages": rollout.advantages,
            "reward": rollout.reward,
            "kept": rollout.kept,
        }

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the tokens of the right answers; for the policy, the sampled answers that are kept."""
        prompts, kept = torch.tensor(len(batch["input_ids"])), torch.tensor(len(batch["rollout_samples"]))
        measured = {"reward": prompts, "kept": prompts, "policy": kept, "k3": kept}
        return {LOSS: batch["answer_length"].sum()} | measured

    def __call__(self, batch: Batch) -> Iterator[tuple[Loss, Metrics]]:
        rollout = _rollout_of(batch)
        measured = {"reward": rollout.reward, "kept": rollout.kept}
        old = self.log_probs(self.thinker, batch, rollout)[0].detach() if rollout.answers else None
        for _ in range(self.config.updates):
            loss, anchor = self._anchor(batch)
            terms = {LOSS: loss}
            metrics = {**measured, "anchor": anchor, "policy": loss.new_zeros(()), "k3": loss.new_zeros(())}
            if old is not None:
                new, answer_of = self.log_probs(self.thinker, batch, rollout)
                reference = self.log_probs(self.reference, batch, rollout)[0].detach()
                policy, k3 = policy_loss(new, old, reference, answer_of, rollout.advantages, self.config)
                terms["policy"] = policy + self.config.kl_weight * k3
                metrics |= {"policy": policy.detach(), "k3": k3.detach()}
            yield terms, metrics

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> Rollout:
        """Sample a group of answers to each prompt and judge them; the prompt itself is run once."""
        size = self.config.group_size
        prefix = self.speaker.prefill([prompt.tolist() for prompt in prompts_of(batch)])
        thoughts, soft_mask = self.speaker.think(self.thinker, prefix)
        said = self.speaker.answer(
            prefix,
            self.thinker.speak(thoughts),
            soft_mask,
            self.config.max_answer_tokens,
            copies=size,
            temperature=self.config.temperature,
        )
        right = answers_of(batch)
        rewards = torch.tensor([self._reward(ids, right[i // size].tolist()) for i, ids in enumerate(said)])
        advantages, kept = group_advantages(rewards.view(-1, size), self.config.advantage)
        chosen = [i for i in range(len(said)) if kept[i // size]]
        device = batch["input_ids"].device
        return Rollout(
            [i // size for i in chosen],
            [torch.tensor(said[i], device=device) for i in chosen],
            advantages.flatten()[chosen].to(device),
            rewards.mean().to(device),
            kept.float().mean().to(device),
        )

    def _reward(self, said: list[int], right: list[int]) -> float:
        """1 for a right answer that ends; `format_reward` of it is for the end, the rest for being right."""
        form = self.config.format_reward
        return (1 - form) * self.speaker.is_right(said, right) + form * (said[-1] in self.speaker.ends)

    def log_probs(self, thinker: LatentThinker, batch: Batch, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The log-probability of every token of all answers [N], and the number of the answer it belongs to [N]."""
        prompts, soft, chosen = prompts_of(batch), speak_thoughts(thinker, batch), rollout.samples
        states = self.speaker.states([prompts[i] for i in chosen], [soft[i] for i in chosen], rollout.answers)
        logits = read_logits(self.speaker.decoder, states) / self.config.temperature
        log_probs = logits.log_softmax(-1).gather(1, torch.cat(rollout.answers)[:, None]).squeeze(1)
        counts = torch.tensor([len(answer) for answer in rollout.answers], device=log_probs.device)
        return log_probs, torch.arange(len(counts), device=log_probs.device).repeat_interleave(counts)

    def _anchor(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The cross entropy of the right answers: weighted, for the loss, and as it is, for the log."""
        prompts, answers, soft = prompts_of(batch), answers_of(batch), speak_thoughts(self.thinker, batch)
        states, head = self.speaker.decoder.project(self.speaker.states(prompts, soft, answers))
        ce = token_losses(states, head.to(states.dtype), torch.cat(answers)).loss
        return self.config.anchor_weight * ce, ce.detach()


def _rollout_of(batch: Batch) -> Rollout:
    """The sampled answers that `GRPO.prepare` added to a batch."""
    answers = batch["rollout_answers"].split(batch["rollout_lengths"].tolist())
    samples = batch["rollout_samples"].tolist()
    return Rollout(samples, list(answers), batch["advantages"], batch["reward"], batch["kept"])


def group_advantages(rewards: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Advantages [P, G] of rewards [P, G], and the mask [P] of the groups whose rewards differ."""
    centred = rewards - rewards.mean(1, keepdim=True)
    kept = rewards.max(1).values > rewards.min(1).values
    if kind == "dr_grpo":
        return centred, kept
    return centred / (rewards.std(1, correction=0, keepdim=True) + SPREAD_EPS), kept


def policy_loss(
    new: Tensor, old: Tensor, reference: Tensor, answer_of: Tensor, advantages: Tensor, config: GRPOConfig
) -> tuple[Tensor, Tensor]:
    """The clipped loss and k3, from log-probabilities [N] of N tokens, the answer of each [N], and advantages [A]."""
    ratio = (new - old).exp()
    low, high = config.clip
    advantage = advantages[answer_of]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    away = reference - new
    k3 = away.exp() - away - 1
    return -_mean(gain, answer_of, len(advantages), config), _mean(k3, answer_of, len(advantages), config)


def _mean(values: Tensor, answer_of: Tensor, count: int, config: GRPOConfig) -> Tensor:
    """The mean over the tokens of each of `count` answers, then over the answers; dr_grpo has one length for all."""
    sums = values.new_zeros(count).index_add(0, answer_of, values)
    if config.advantage == "dr_grpo":
        return sums.sum() / (count * config.max_answer_tokens)
    return (sums / torch.bincount(answer_of, minlength=count)).mean()
