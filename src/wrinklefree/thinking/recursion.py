"""Phase 2, first half: train the network to think what the language model thought, and read out what it thinks.

The loss of a thought is a sum of three terms:

    kl         from what the language model's head reads in the true hidden state to what it reads in the thought
    mse        the squared error of the whitened states, times `mse_weight`
    halting    the cross entropy of the decision to halt, times `halt_weight`
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.config.thinking import NetworkConfig
from wrinklefree.core.batch import Batch
from wrinklefree.objectives.base import LOSS, Loss, Metrics, Objective
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking.hidden_pairs import HiddenPairs
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.reading import compare_readings, read_logits

AVERAGE_WARMUP = 10  # the mean of the weights decays by (1 + step) / (10 + step) at first, so that it forgets its start


def prompt_of(thinker: LatentThinker, batch: Batch) -> tuple[Tensor, Tensor]:
    """The whitened states [B, L, D'] of the prompts of a batch of pairs, and their mask [B, L]."""
    states = thinker.whiten(batch["prompt_states"])
    places = torch.arange(states.shape[1], device=states.device)
    return states, places < batch["prompt_length"][:, None]


class Recursion(Objective):
    """The objective of the network, in either mode, over batches of `HiddenPairs`."""

    def __init__(self, model: LatentThinker, decoder: BodyAndHead, config: NetworkConfig) -> None:
        self.thinker, self.decoder, self.config = model, decoder, config
        self.losses_per_batch = 1 if config.mode == "trajectory" else config.max_thoughts
        self.sampling = False

    def on_step(self, step: int, max_steps: int) -> None:
        """Begin scheduled sampling once its step has come, and update the mean of the weights."""
        self.sampling = step >= self.config.sampled_from * max_steps
        self.thinker.update_average(min(self.config.ema_decay, (1 + step) / (AVERAGE_WARMUP + step)))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count thoughts; in mode final, of which only the last counts, samples."""
        thoughts = batch["num_thoughts"]
        return {LOSS: thoughts.sum() if self.config.mode == "trajectory" else thoughts.new_tensor(len(thoughts))}

    def __call__(self, batch: Batch) -> Iterator[tuple[Loss, Metrics]]:
        if self.config.mode == "trajectory":
            yield self.trajectory(batch)
        else:
            yield from self.final(batch)

    def trajectory(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """All thoughts of all samples at once. Each follows the true thought before it, later the network's own one."""
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
        return self._loss(thoughts, targets[valid], halts, last.float())

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
        """Rounds towards the last thought, an optimizer step for each. Halting learns whether the thought is right."""
        network = self.thinker.network
        states, mask = prompt_of(self.thinker, batch)
        rows, last = torch.arange(len(states), device=states.device), batch["num_thoughts"] - 1
        target, token = self.thinker.whiten(batch["thoughts"])[rows, last], batch["tokens"][rows, last]
        carried = None
        for _ in range(self.config.max_thoughts):
            context = network.context(
                states, mask
            )  # again in each round, since the optimizer step has changed the weights
            y, z = network.recurse(context, *(network.begin(context) if carried is None else carried))
            thought, halt = network.read(y)
            right = read(self.decoder, self.thinker, thought).argmax(-1) == token
            yield self._loss(thought, target, halt, right.float())
            carried = y.detach(), z.detach()

    def _loss(self, thoughts: Tensor, targets: Tensor, halts: Tensor, ends: Tensor) -> tuple[Tensor, Metrics]:
        """The loss of N thoughts [N, D'] with targets [N, D'], logits of halting [N] and what they should be [N]."""
        thoughts = thoughts.float()
        reading = compare_readings(self.decoder, self.thinker.states(targets), self.thinker.states(thoughts))
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

    They are those of the first token after a thought. Later tokens attend to keys and values, which a thought has not.
    """
    return read_logits(decoder, thinker.states(thoughts))


class ReadOut(NamedTuple):
    """How near the network's own thoughts come to the true ones, on held-out pairs."""

    accuracy: float  # share of last thoughts in which the head reads the answer's first token
    kl: float  # of the last thought, from the true state
    cosine: float  # of the last thought, whitened
    mean_cosine: float  # of the mean of all last thoughts: what a constant would reach
    r2: float  # of the last thought, centred
    halted: float  # share that stopped after as many thoughts as the language model had
    steps: float  # thoughts on average
    by_steps: dict[int, float]  # accuracy by the number of thoughts that the language model had


@torch.no_grad()
def read_out(
    thinker: LatentThinker, decoder: BodyAndHead, pairs: HiddenPairs, count: int, batch_size: int = 256
) -> ReadOut:
    """Think about the first `count` pairs and compare the last thoughts with the true ones."""
    device = thinker.mean.device
    rows: list[tuple[Tensor, ...]] = []
    for batch in pairs.batches(batch_size, count, device):
        thoughts, soft_mask = thinker.think(*prompt_of(thinker, batch))
        each = torch.arange(len(thoughts), device=device)
        thought = thoughts[each, soft_mask.sum(1) - 1]
        target = thinker.whiten(batch["thoughts"])[each, batch["num_thoughts"] - 1]
        token = batch["tokens"][each, batch["num_thoughts"] - 1]
        said, meant = (read(decoder, thinker, x).log_softmax(-1) for x in (thought, target))
        kl = F.kl_div(said, meant, log_target=True, reduction="none").sum(-1)
        rows.append((thought, target, said.argmax(-1) == token, kl, soft_mask.sum(1), batch["num_thoughts"]))
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
