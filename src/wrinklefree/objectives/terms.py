"""Loss terms that compare layers inside student and teacher: attention relations and hidden states."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.config.schema import AttentionConfig, HiddenConfig
from wrinklefree.core import surgery
from wrinklefree.core.batch import Batch, places
from wrinklefree.core.errors import UserError
from wrinklefree.objectives import losses


class Watched:
    """Records the outputs of some modules during a forward pass."""

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        self.outputs: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record one output per module in `outputs` while the block runs."""
        self.outputs = [torch.empty(0)] * len(self.modules)

        def keep(index: int, module: nn.Module, inputs: Any, output: Any) -> None:
            self.outputs[index] = output if isinstance(output, Tensor) else output[0]

        handles = [m.register_forward_hook(partial(keep, i)) for i, m in enumerate(self.modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Pair:
    """Modules of student and teacher whose outputs are compared, one with one."""

    def __init__(self, student: list[Any], teacher: list[Any]) -> None:
        self.student, self.teacher = Watched(student), Watched(teacher)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self.student.watching(), self.teacher.watching():
            yield

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (student's, teacher's) output for each pair of modules, and drop the record to free its memory."""
        pairs = list(zip(self.student.outputs, self.teacher.outputs, strict=True))
        self.student.outputs, self.teacher.outputs = [], []
        return iter(pairs)


class AttentionRelations(Pair):
    """`losses.attention_relation` in one layer, summed over Q, K and V as they are before rotary positions."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, config: AttentionConfig) -> None:
        """Raises UserError if the layer does not exist, has no separate projections, or does not split into heads."""
        self.config = config
        mine, other = surgery.decoder_layers(student), surgery.decoder_layers(teacher)
        if not -len(mine) <= config.layer < len(mine):
            raise UserError(f"distillation.attention.layer={config.layer}: the model has {len(mine)} layers")
        depth = config.layer % len(mine) + 1  # the teacher may have more or fewer layers: compare at equal depth
        super().__init__(_projections(mine[depth - 1]), _projections(other[round(depth * len(other) / len(mine)) - 1]))
        for module in [*self.student.modules, *self.teacher.modules]:
            if module.out_features % config.split_heads:
                raise UserError(
                    f"distillation.attention.split_heads={config.split_heads}: does not divide a projection to "
                    f"{module.out_features} features"
                )

    def __call__(self, batch: Batch) -> Tensor:
        mask = losses.same_document(places(batch))
        c = self.config
        terms = [losses.attention_relation(s, t, mask, c.split_heads, c.temperature) for s, t in self.outputs()]
        return torch.stack(terms).sum()


def _projections(layer: nn.Module) -> list[Any]:
    """Return a decoder layer's projections to Q, K and V. Raises UserError if it has no such modules."""
    named = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    if not {"q_proj", "k_proj", "v_proj"} <= named.keys():
        raise UserError("distillation.attention.weight: this architecture has no separate q_proj, k_proj, v_proj")
    return [named["q_proj"], named["k_proj"], named["v_proj"]]


class HiddenStates(Pair):
    """Weighted sum of `losses.hidden_alignment` after every decoder layer."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, config: HiddenConfig) -> None:
        """Raises UserError if the models differ in depth or width, or if `layer_weights` has the wrong length."""
        mine, other = surgery.decoder_layers(student), surgery.decoder_layers(teacher)
        shapes = [(len(x), m.config.hidden_size) for x, m in ((mine, student), (other, teacher))]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"distillation.hidden: the teacher has {shapes[1][0]} layers of {shapes[1][1]}, the model "
                f"{shapes[0][0]} of {shapes[0][1]}: hidden states need equal shapes"
            )
        super().__init__(list(mine), list(other))
        self.weights = layer_weights(config.layer_weights, len(mine))

    def __call__(self, batch: Batch) -> Tensor:
        kept = losses.related(places(batch))
        terms = [losses.hidden_alignment(s, t, kept) for s, t in self.outputs()]
        return torch.stack([w * term for w, term in zip(self.weights, terms, strict=True)]).sum()


def layer_weights(weights: str | list[float], num_layers: int) -> list[float]:
    """Return one weight per layer, first to last, scaled to sum 1; `weights` is a rule's name or the numbers.

    Raises UserError if there is not one number per layer, or if all are 0.
    """
    if isinstance(weights, str):
        rules = {"uniform": lambda i: 1.0, "progressive": lambda i: i + 1.0, "exponential": lambda i: 2.0**i}
        weights = [rules[weights](i) for i in range(num_layers)]
    if len(weights) != num_layers or not sum(weights):
        raise UserError(f"distillation.hidden.layer_weights={weights}: needs {num_layers} numbers, not all 0")
    return [weight / sum(weights) for weight in weights]


def hidden_share(config: HiddenConfig, step: int, max_steps: int) -> float:
    """Return the share d that hidden states have in the loss of `step`: constant, then along the schedule."""
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.initial_weight
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_weight + (config.initial_weight - config.final_weight) * remaining
