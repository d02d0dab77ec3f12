"""Terms that watch layers inside of student and teacher: attention relations, hidden states."""

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
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.objectives import losses


class Watched:
    """The outputs of some modules during a forward pass."""

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        self.outputs: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect `outputs`, one a module, while the block runs."""
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
    """Modules of student and teacher whose outputs are compared."""

    def __init__(self, student: list[Any], teacher: list[Any]) -> None:
        self.student, self.teacher = Watched(student), Watched(teacher)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self.student.watching(), self.teacher.watching():
            yield

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(student's, teacher's), and forget them."""
        pairs = list(zip(self.student.outputs, self.teacher.outputs, strict=True))
        self.student.outputs, self.teacher.outputs = [], []
        return iter(pairs)


class AttentionRelations(Pair):
    """`losses.attention_relation`, summed over Q, K and V of one layer, before rotary positions."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, config: AttentionConfig) -> None:
        """Raises UserError where the layer is not there, has no separate projections, or does not split."""
        self.config = config
        mine, other = surgery.decoder_layers(student), surgery.decoder_layers(teacher)
        if not -len(mine) <= config.layer < len(mine):
            raise UserError(f"distillation.attention.layer={config.layer}: the model has {len(mine)} layers")
        depth = config.layer % len(mine) + 1
        super().__init__(_projections(mine[depth - 1]), _projections(other[round(depth * len(other) / len(mine)) - 1]))
        for module in [*self.student.modules, *self.teacher.modules]:
            if module.out_features % config.split_heads:
                raise UserError(
                    f"distillation.attention.split_heads={config.split_heads}: does not divide a projection to "
                    f"{module.out_features} features"
                )

    def __call__(self, batch: Batch) -> Tensor:
        mask = losses.same_document(batch["position_ids"])
        c = self.config
        terms = [losses.attention_relation(s, t, mask, c.split_heads, c.temperature) for s, t in self.outputs()]
        return torch.stack(terms).sum()


def _projections(layer: nn.Module) -> list[Any]:
    """The projections to Q, K and V in a decoder layer."""
    named = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    if not {"q_proj", "k_proj", "v_proj"} <= named.keys():
        raise UserError("distillation.attention.weight: this architecture has no separate q_proj, k_proj, v_proj")
    return [named["q_proj"], named["k_proj"], named["v_proj"]]


class HiddenStates(Pair):
    """`losses.hidden_alignment` after every decoder layer, weighted by layer."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, config: HiddenConfig) -> None:
        """Raises UserError where the two models have other depths or widths, or `layer_weights` another length."""
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
        kept = losses.same_document(batch["position_ids"]).sum(-1) > 1  # padding stands alone
        terms = [losses.hidden_alignment(s, t, kept) for s, t in self.outputs()]
        return torch.stack([w * term for w, term in zip(self.weights, terms, strict=True)]).sum()


def layer_weights(given: str | list[float], num_layers: int) -> list[float]:
    """Weights of the layers, first to last, that sum to 1. Raises UserError for a list of another length, or zeros."""
    if isinstance(given, str):
        rules = {"uniform": lambda i: 1.0, "progressive": lambda i: i + 1.0, "exponential": lambda i: 2.0**i}
        given = [rules[given](i) for i in range(num_layers)]
    if len(given) != num_layers or not sum(given):
        raise UserError(f"distillation.hidden.layer_weights={given}: needs {num_layers} numbers, not all 0")
    return [weight / sum(given) for weight in given]


def hidden_share(config: HiddenConfig, step: int, max_steps: int) -> float:
    """The share d of the hidden states in the loss of `step`: constant at first, then along its schedule to the end."""
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.initial_weight
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_weight + (config.initial_weight - config.final_weight) * left
