"""Phase 2, second half: an adapter turns thoughts into soft tokens that the frozen language model understands.

Trained by the cross entropy of the right answer after the soft tokens and the KL to the model after its written
thought. Beside it, on the same batches, constant soft tokens are trained that know nothing of the problem: the pause
control.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from wrinklefree.core.thinking import InjectionConfig
from wrinklefree.methods.trm import LatentThinker
from wrinklefree.objectives.base import Batch, Metrics, Objective
from wrinklefree.objectives.losses import token_losses
from wrinklefree.thinking.hidden_pairs import HiddenPairs
from wrinklefree.thinking.recursion import prompt_of
from wrinklefree.thinking.speech import Speaker, rows_of

RIDGE = 1e-3  # of the mean square of the states


class Injection(Objective):
    """Objective for `adapter` and `pause`; batches are of `HiddenPairs`."""

    def __init__(self, model: LatentThinker, speaker: Speaker, config: InjectionConfig) -> None:
        self.thinker, self.speaker, self.config = model, speaker, config

    def __call__(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        prompts = rows_of(batch["input_ids"], batch["prompt_length"])
        answers = rows_of(batch["answer_ids"], batch["answer_length"])
        targets = torch.cat(answers)
        with torch.no_grad():
            written = [self.speaker.embed(ids) for ids in rows_of(batch["thought_ids"], batch["thought_length"])]
            meant, head = self.speaker.decoder.project(self.speaker.states(prompts, written, answers))
        losses = []
        for middles in (soft_tokens(self.thinker, batch), [self.thinker.pause] * len(prompts)):
            said = self.speaker.decoder.project(self.speaker.states(prompts, middles, answers))[0]
            losses.append(
                token_losses(said, head.to(said.dtype), targets, teacher=(meant, head), kl_weight=self.config.kl_weight)
            )
        soft, pause = losses
        yield soft.loss + pause.loss, {"ce": soft.ce, "kl": soft.kl, "pause_ce": pause.ce}


def soft_tokens(thinker: LatentThinker, batch: Batch) -> list[Tensor]:
    """What the thinker would say of each prompt: [k, D] each, differentiable in what of it is trained."""
    thoughts, made = thinker.think(*prompt_of(thinker, batch))
    return rows_of(thinker.speak(thoughts), made.sum(1))


@torch.no_grad()
def fit_adapter(thinker: LatentThinker, speaker: Speaker, pairs: HiddenPairs, count: int) -> None:
    """Set the adapter to the ridge regression from the states of true thoughts to the embeddings of what they led to.

    A state is what predicts a token, a soft token stands where that token would: so this is where the adapter begins.
    It looks at the first `count` pairs.
    """
    width = thinker.config.width
    gram, cross = torch.zeros(width + 1, width + 1).double(), torch.zeros(width + 1, width).double()
    for held in pairs.batches(256, count):
        batch = {name: tensor.to(thinker.mean.device) for name, tensor in held.items()}
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
    """Bring what a random adapter says to the size of the embeddings, which may be a hundredth of it."""
    batch = {name: tensor.to(thinker.mean.device) for name, tensor in pairs.batch(range(min(256, len(pairs)))).items()}
    there = batch["tokens"] >= 0
    said = thinker.speak(thinker.whiten(batch["thoughts"]))[there]
    factor = speaker.embed(batch["tokens"][there]).float().square().mean().sqrt() / said.square().mean().sqrt()
    thinker.adapter.weight.mul_(factor)
    thinker.adapter.bias.mul_(factor)
