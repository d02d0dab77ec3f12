"""Phase 2, first half: train the network to think what the language model thought, and read out what it thinks.

The loss of a thought is the KL from what the language model's head reads in the true hidden state to what it reads in
the thought, plus a share of the squared error of the whitened states, plus the cross entropy of the decision to halt.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.thinking import NetworkConfig
from wrinklefree.methods.trm import LatentThinker
from wrinklefree.objectives.base import Batch, Metrics, Objective
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.objectives.losses import token_losses
from wrinklefree.thinking.hidden_pairs import HiddenPairs

AVERAGE_WARMUP = 10  # steps in which the mean of the weights forgets where it began


def prompt_of(thinker: LatentThinker, batch: Batch) -> tuple[Tensor, Tensor]:
    """Whitened states [B, L, D'] of the prompts of hidden pairs, and the mask [B, L]."""
    states = thinker.whiten(batch["prompt_states"])
    places = torch.arange(states.shape[1], device=states.device)
    return states, places < batch["prompt_length"][:, None]


class Recursion(Objective):
    """Objective of both modes; batches are of `HiddenPairs`."""

    def __init__(self, model: LatentThinker, decoder: BodyAndHead, config: NetworkConfig) -> None:
        self.thinker, self.decoder, self.config = model, decoder, config
        self.sampling = False

    def on_step(self, step: int, max_steps: int) -> None:
        """Whether thoughts follow the network's own by now; and the mean of the weights so far."""
        self.sampling = step >= self.config.sampled_from * max_steps
        self.thinker.update_average(min(self.config.ema_decay, (1 + step) / (AVERAGE_WARMUP + step)))

    def __call__(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        if self.config.mode == "trajectory":
            yield self.trajectory(batch)
        else:
            yield from self.final(batch)

    def trajectory(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """All thoughts of all samples at once, each after the true one before it, or after the network's own."""
        network = self.thinker.network
        states, mask = prompt_of(self.thinker, batch)
        targets = self.thinker.whiten(batch["thoughts"])
        context = network.context(states, mask)
        numbers = torch.arange(targets.shape[1], device=targets.device).expand(targets.shape[:2])
        valid = numbers < batch["num_thoughts"][:, None]
        before = F.pad(targets, (0, 0, 1, 0))[:, :-1]
        if self.sampling:
            before = F.pad(self._own(batch, targets.shape[1]), (0, 0, 1, 0))[:, :-1]
        before = before + self.config.noise * torch.randn_like(before) * (numbers > 0)[..., None]
        each = context.take(valid.nonzero()[:, 0])
        thoughts, halts = network.step(each, before[valid], numbers[valid])
        last = (numbers == batch["num_thoughts"][:, None] - 1)[valid]
        return self._loss(thoughts, targets[valid], batch["tokens"][valid], halts, last.float())

    @torch.no_grad()
    def _own(self, batch: Batch, count: int) -> Tensor:
        """The network's own thoughts [B, count, D'], each after the one before."""
        network = self.thinker.network
        context = network.context(*prompt_of(self.thinker, batch))
        thought = context.x.new_zeros(len(context.x), self.thinker.config.d_compressed)
        thoughts = []
        for number in range(count):
            number_of = torch.full((len(thought),), number, device=thought.device)
            thought = network.step(context, thought, number_of)[0].float()
            thoughts.append(thought)
        return torch.stack(thoughts, 1)

    def final(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        """Round after round towards the last thought, an optimizer step each; halting learns whether it is there."""
        network = self.thinker.network
        states, mask = prompt_of(self.thinker, batch)
        rows, last = torch.arange(len(states), device=states.device), batch["num_thoughts"] - 1
        target, token = self.thinker.whiten(batch["thoughts"])[rows, last], batch["tokens"][rows, last]
        carried = None
        for _ in range(self.config.max_thoughts):
            context = network.context(states, mask)  # anew: the step in between has changed the weights
            y, z = network.recurse(context, *(network.begin(context) if carried is None else carried))
            thought, halt = network.read(y)
            right = read(self.decoder, self.thinker, thought).argmax(-1) == token
            yield self._loss(thought, target, token, halt, right.float())
            carried = y.detach(), z.detach()

    def _loss(
        self, thoughts: Tensor, targets: Tensor, tokens: Tensor, halts: Tensor, ends: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Of N thoughts: [N, D'], [N, D'], [N], [N], [N]."""
        thoughts = thoughts.float()
        said, head = self.decoder.project(self.thinker.states(thoughts))
        meant = self.decoder.project(self.thinker.states(targets))[0]
        reading = token_losses(
            said, head.to(said.dtype), tokens, teacher=(meant, head.to(meant.dtype)), ce_weight=0.0, kl_weight=1.0
        )
        mse = F.mse_loss(thoughts, targets)
        halting = F.binary_cross_entropy_with_logits(halts.float(), ends)
        loss = reading.loss + self.config.mse_weight * mse + self.config.halt_weight * halting
        metrics = {
            "kl": reading.kl,
            "mse": mse.detach(),
            "cosine": F.cosine_similarity(thoughts, targets, dim=-1).mean().detach(),
            "halting": halting.detach(),
        }
        return loss, metrics


def read(decoder: BodyAndHead, thinker: LatentThinker, thoughts: Tensor) -> Tensor:
    """What the language model's head reads in whitened thoughts [..., D']: fp32 logits [..., V].

    Only of the first token after a thought: later ones look at keys and values that a thought does not have.
    """
    states, head = decoder.project(thinker.states(thoughts))
    return F.linear(states, head.to(states.dtype)).float()


class ReadOut(NamedTuple):
    """Of held-out pairs, thinking freely."""

    accuracy: float  # the head reads the answer's first token in the last thought
    kl: float  # of the last thought, from the true state
    cosine: float  # of the last thought, whitened
    mean_cosine: float  # of the mean of all last thoughts: what a constant would reach
    r2: float  # of the last thought, centred
    halted: float  # stopped after exactly as many thoughts as the language model
    steps: float  # thoughts on average
    by_steps: dict[int, float]  # accuracy by the number of thoughts that the language model had


@torch.no_grad()
def read_out(
    thinker: LatentThinker, decoder: BodyAndHead, pairs: HiddenPairs, count: int, batch_size: int = 256
) -> ReadOut:
    """Think about the first `count` pairs and compare the last thoughts with the true ones."""
    device = thinker.mean.device
    rows: list[tuple[Tensor, ...]] = []
    for held in pairs.batches(batch_size, count):
        batch = {name: tensor.to(device) for name, tensor in held.items()}
        thoughts, made = thinker.think(*prompt_of(thinker, batch))
        each = torch.arange(len(made), device=device)
        thought = thoughts[each, made.sum(1) - 1]
        target = thinker.whiten(batch["thoughts"])[each, batch["num_thoughts"] - 1]
        token = batch["tokens"][each, batch["num_thoughts"] - 1]
        said, meant = (read(decoder, thinker, x).log_softmax(-1) for x in (thought, target))
        kl = F.kl_div(said, meant, log_target=True, reduction="none").sum(-1)
        rows.append((thought, target, said.argmax(-1) == token, kl, made.sum(1), batch["num_thoughts"]))
    thought, target, right, kl, steps, wanted = (torch.cat(column) for column in zip(*rows, strict=True))
    centre = target.mean(0)
    return ReadOut(
        accuracy=float(right.float().mean()),
        kl=float(kl.mean()),
        cosine=float(F.cosine_similarity(thought, target, dim=-1).mean()),
        mean_cosine=float(F.cosine_similarity(centre.expand_as(target), target, dim=-1).mean()),
        r2=float(1 - (thought - target).square().sum() / (target - centre).square().sum()),
        halted=float((steps == wanted).float().mean()),
        steps=float(steps.float().mean()),
        by_steps={int(n): float(right[wanted == n].float().mean()) for n in wanted.unique()},
    )
