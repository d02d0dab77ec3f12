"""Phase 2, second half: an adapter turns thoughts into soft tokens that the frozen language model understands.

The loss is the cross entropy of the right answer after the soft tokens, plus the KL to what the model says after its
written thought. The same batches train a control, `pause`: constant soft tokens, which know nothing of the problem.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from wrinklefree.config.thinking import InjectionConfig
from wrinklefree.core.batch import Batch
from wrinklefree.objectives.base import LOSS, Loss, Metrics, Objective
from wrinklefree.objectives.losses import token_losses
from wrinklefree.thinking.hidden_pairs import HiddenPairs, answers_of, prompts_of, rows_of
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.recursion import prompt_of
from wrinklefree.thinking.speech import Speaker

RIDGE = 1e-3  # of the mean square of the states


class Injection(Objective):
    """The objective of `adapter` and `pause`, over batches of `HiddenPairs`."""

    def __init__(self, model: LatentThinker, speaker: Speaker, config: InjectionConfig) -> None:
        self.thinker, self.speaker, self.config = model, speaker, config

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the tokens of the answers."""
        return {LOSS: batch["answer_length"].sum()}

    def __call__(self, batch: Batch) -> Iterator[tuple[Loss, Metrics]]:
        prompts, answers = prompts_of(batch), answers_of(batch)
        targets = torch.cat(answers)
        with torch.no_grad():
            written = [self.speaker.embed(ids) for ids in rows_of(batch["thought_ids"], batch["thought_length"])]
            meant, head = self.speaker.decoder.project(self.speaker.states(prompts, written, answers))
        losses = []
        for thoughts in (speak_thoughts(self.thinker, batch), [self.thinker.pause] * len(prompts)):
            said = self.speaker.decoder.project(self.speaker.states(prompts, thoughts, answers))[0]
            losses.append(
                token_losses(said, head.to(said.dtype), targets, teacher=(meant, head), kl_weight=self.config.kl_weight)
            )
        soft, pause = losses
        yield soft.loss + pause.loss, {"ce": soft.ce, "kl": soft.kl, "pause_ce": pause.ce}


def speak_thoughts(thinker: LatentThinker, batch: Batch) -> list[Tensor]:
    """The thinker's soft tokens for each prompt, [k, D] each, differentiable in its trained parameters."""
    thoughts, soft_mask = thinker.think(*prompt_of(thinker, batch))
    return rows_of(thinker.speak(thoughts), soft_mask.sum(1))


@torch.no_grad()
def fit_adapter(thinker: LatentThinker, speaker: Speaker, pairs: HiddenPairs, count: int) -> None:
    """Set the adapter to the ridge regression from the states of true thoughts to the embeddings of their tokens.

    A state predicts a token, and the soft token takes that token's place, so this is a good start. The regression is
    over the first `count` pairs.
    """
    width = thinker.config.width
    gram, cross = torch.zeros(width + 1, width + 1).double(), torch.zeros(width + 1, width).double()
    for batch in pairs.batches(256, count, thinker.mean.device):
        there = batch["tokens"] >= 0
        states = thinker.states(thinker.whiten(batch["thoughts"]))[there].double().cpu()
        inputs = torch.cat([states, torch.ones(len(states), 1).double()], dim=1)
        gram += inputs.T @ inputs
        cross += inputs.T @ speaker.embed(batch["tokens"][there]).double().cpu()
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(width + 1).double()
    solution = torch.linalg.solve(gram + ridge, cross)
    thinker.adapter.weight.copy_(solution[:-1].T)
    thinker.adapter.bias.copy_(solution[-1])


@torch.no_grad()
def scale_adapter(thinker: LatentThinker, speaker: Speaker, pairs: HiddenPairs) -> None:
    """Scale a random adapter until its soft tokens are as large as the embeddings, which may be a hundredth of it."""
    batch = next(pairs.batches(256, 256, thinker.mean.device))
    there = batch["tokens"] >= 0
    said = thinker.speak(thinker.whiten(batch["thoughts"]))[there]
    factor = speaker.embed(batch["tokens"][there]).float().square().mean().sqrt() / said.square().mean().sqrt()
    thinker.adapter.weight.mul_(factor)
    thinker.adapter.bias.mul_(factor)
