"""The gated MLP of a packed Llama in two products and a step between them: down(act(gate x) * up x), or, where BitNet's
has one, down(norm(act(gate x) * up x)).

In transformers it is four modules and two operations, each with more Python than a product of one token takes. Only
the MLPs named below are known to be this and no more; with biases, norms of their layers' own, gradients, under a
compiler, on a GPU, or where exact products are wanted, they go on as they were.
"""

from typing import Any

import torch
from torch import Tensor, nn

from wrinklefree.core.method import compute_dtype
from wrinklefree.packed.native import Matrix, products

KNOWN = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "BitNetMLP")
NAMES = ("gate_proj", "up_proj", "down_proj")


class PackedMLP(nn.Module):
    """Goes before the model's own class, whose children these are."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        matrices = self._matrices(x)
        if matrices is None:
            y: Tensor = super().forward(x)
            return y
        with torch.no_grad():
            gate, up = products(matrices[:2], x)
            inner, norm = self.act_fn(gate).mul_(up), self._modules.get("ffn_sub_norm")
            (y,) = products(matrices[2:], inner if norm is None else norm(inner))
        return y.to(compute_dtype(x))

    def _matrices(self, x: Tensor) -> list[Matrix] | None:
        """Of gate, up and down; None where the layers have to be called one by one."""
        if not x.is_cpu or (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
            return None
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        found = [layer.shared_matrix() for layer in layers if layer.bias is None]
        matrices = [matrix for matrix in found if matrix is not None]
        return matrices if len(matrices) == len(layers) else None


def fuse_mlps(model: nn.Module, kind: type[nn.Module]) -> None:
    """Let known MLPs whose layers are all of `kind`, packed ones, work so."""
    made: dict[str, type[nn.Module]] = {}
    for module in model.modules():
        own, children = type(module), dict(module.named_children())
        known = own.__name__ in KNOWN and not isinstance(module, PackedMLP)
        if known and all(isinstance(children.get(name), kind) for name in NAMES):
            made.setdefault(own.__name__, type(own.__name__, (PackedMLP, own), {"__module__": own.__module__}))
            module.__class__ = made[own.__name__]
