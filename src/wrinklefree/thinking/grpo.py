"""Phase 3: reinforce thoughts whose answers are right (GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783).

Policy      pi(o | q) = prod_t LM(o_t | q, <think>, S(q), </think>, o_<t) at a temperature; S(q) the soft tokens. The
            language model is frozen, and log pi is differentiable in S through it.
Advantage   of a group of G answers with rewards r: (r - mean) / (deviation + 1e-4), or r - mean alone (dr_grpo)
Loss        - min(rho A, clip(rho, 1 - low, 1 + high) A) + beta k3,  rho = pi / pi_old,
            k3 = exp(l_ref - l) - (l_ref - l) - 1, the reference being the thinker as it was at the start;
            a mean over the tokens of an answer and the answers (grpo), or a sum over G x the longest answer (dr_grpo)
Anchor      the cross entropy of the right answer, so that what is known is not forgotten

Groups whose answers are all right or all wrong say nothing and are dropped.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.thinking import GRPOConfig
from wrinklefree.data.problems import same_answer
from wrinklefree.methods.trm import LatentThinker
from wrinklefree.objectives.base import Batch, Metrics, Objective
from wrinklefree.objectives.losses import token_losses
from wrinklefree.thinking.injection import soft_tokens
from wrinklefree.thinking.speech import Speaker, rows_of

SPREAD_EPS = 1e-4


class Rollout(NamedTuple):
    """Answers to some prompts: G in a row for each of the kept ones."""

    samples: list[int]  # which prompt each answer is to
    answers: list[Tensor]  # ids, with the end-of-sequence token where it came
    advantages: Tensor  # [N]
    reward: Tensor  # mean over all prompts, kept or not
    kept: Tensor  # share of the prompts


class GRPO(Objective):
    """Objective over batches of `HiddenPairs`, whose answers are the right ones."""

    def __init__(self, model: LatentThinker, speaker: Speaker, config: GRPOConfig) -> None:
        self.thinker, self.speaker, self.config = model, speaker, config
        for block in model.network.blocks:
            block.dropout = 0.0  # type: ignore[assignment]  # a policy is one function
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()

    def __call__(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        rollout = self.roll_out(batch)
        measured = {"reward": rollout.reward, "kept": rollout.kept}
        old = self.log_probs(self.thinker, batch, rollout)[0].detach() if rollout.answers else None
        for _ in range(self.config.updates):
            loss, anchor = self._anchor(batch)
            metrics = {**measured, "anchor": anchor, "policy": loss.new_zeros(()), "k3": loss.new_zeros(())}
            if old is not None:
                new, answer_of = self.log_probs(self.thinker, batch, rollout)
                reference = self.log_probs(self.reference, batch, rollout)[0].detach()
                policy, k3 = policy_loss(new, old, reference, answer_of, rollout.advantages, self.config)
                loss = loss + policy + self.config.kl_weight * k3
                metrics |= {"policy": policy.detach(), "k3": k3.detach()}
            yield loss, metrics

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> Rollout:
        """Sample a group of answers to each prompt, the prompt itself being run once, and judge them."""
        size = self.config.group_size
        prefix = self.speaker.prefill([row.tolist() for row in rows_of(batch["input_ids"], batch["prompt_length"])])
        thoughts, made = self.speaker.think(self.thinker, prefix)
        said = self.speaker.answer(
            prefix,
            self.thinker.speak(thoughts),
            made,
            self.config.max_answer_tokens,
            copies=size,
            temperature=self.config.temperature,
        )
        right = rows_of(batch["answer_ids"], batch["answer_length"])
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
        """1 for the right answer, shared with the reward for one that comes to its end."""
        decode = self.speaker.tokenizer.decode
        texts = (decode(ids, skip_special_tokens=True) for ids in (said, right))
        form = self.config.format_reward
        return (1 - form) * same_answer(*texts) + form * (said[-1] in self.speaker.ends)

    def log_probs(self, thinker: LatentThinker, batch: Batch, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The log-probability of every token of every answer [N], and which answer it belongs to [N]."""
        prompts = rows_of(batch["input_ids"], batch["prompt_length"])
        soft = soft_tokens(thinker, batch)
        chosen = rollout.samples
        states = self.speaker.states([prompts[i] for i in chosen], [soft[i] for i in chosen], rollout.answers)
        operand, head = self.speaker.decoder.project(states)
        logits = F.linear(operand, head.to(operand.dtype)).float() / self.config.temperature
        log_probs = logits.log_softmax(-1).gather(1, torch.cat(rollout.answers)[:, None]).squeeze(1)
        counts = torch.tensor([len(answer) for answer in rollout.answers], device=log_probs.device)
        return log_probs, torch.arange(len(counts), device=log_probs.device).repeat_interleave(counts)

    def _anchor(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted cross entropy of the right answers, and itself."""
        prompts = rows_of(batch["input_ids"], batch["prompt_length"])
        answers = rows_of(batch["answer_ids"], batch["answer_length"])
        soft = soft_tokens(self.thinker, batch)
        states, head = self.speaker.decoder.project(self.speaker.states(prompts, soft, answers))
        ce = token_losses(states, head.to(states.dtype), torch.cat(answers)).loss
        return self.config.anchor_weight * ce, ce.detach()


def group_advantages(rewards: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Advantages [P, G] of rewards [P, G], and which groups have any spread [P]."""
    centred = rewards - rewards.mean(1, keepdim=True)
    kept = rewards.max(1).values > rewards.min(1).values
    if kind == "dr_grpo":
        return centred, kept
    return centred / (rewards.std(1, correction=0, keepdim=True) + SPREAD_EPS), kept


def policy_loss(
    new: Tensor, old: Tensor, reference: Tensor, answer_of: Tensor, advantages: Tensor, config: GRPOConfig
) -> tuple[Tensor, Tensor]:
    """The clipped loss, and k3; log-probabilities of N tokens [N], of which answer each is [N], advantages [A]."""
    ratio = (new - old).exp()
    low, high = config.clip
    advantage = advantages[answer_of]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    away = reference - new
    k3 = away.exp() - away - 1
    return -_mean(gain, answer_of, len(advantages), config), _mean(k3, answer_of, len(advantages), config)


def _mean(values: Tensor, answer_of: Tensor, count: int, config: GRPOConfig) -> Tensor:
    """Over the tokens of each of `count` answers, and over these; dr_grpo divides by one length for all."""
    sums = values.new_zeros(count).index_add(0, answer_of, values)
    if config.advantage == "dr_grpo":
        return sums.sum() / (count * config.max_answer_tokens)
    return (sums / torch.bincount(answer_of, minlength=count)).mean()
