"""Fuse MLPs and norms of packed Llamas in transformers. At one token, half of their time is Python between products.

    MLP     down(act(gate x) * up x), BitNet's with a norm before `down`: two products and a step between them
    norm    x / sqrt(mean x^2 + eps) * weight: one call

Only classes of known architectures are fused, because another class may compute more than this. A fused module calls
its original code if

- a gradient is needed, or `set_exact` was called,
- a compiler traces it, or it is on a GPU,
- it is a norm in half precision,
- it is an MLP whose layers have biases, norms or hooks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from wrinklefree.core import library
from wrinklefree.core.inputs import compute_dtype
from wrinklefree.families.architectures import FAMILIES, MLP, SUB_NORMS
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.products.native import Matrix, NativeProduct, matmul, norm

MLPS = tuple(f"{family.stem}MLP" for family in FAMILIES)
NORMS = tuple(f"{family.stem}RMSNorm" for family in FAMILIES)


def _plain(x: Tensor) -> bool:
    """Whether a kernel may compute with `x`: on the CPU, without a gradient, and not while a compiler traces."""
    return x.is_cpu and not (torch.is_grad_enabled() and x.requires_grad) and not torch.compiler.is_compiling()


class Fused(nn.Module):
    """Base of fused modules. A class made at run time inherits from it first and from the module's own class second."""

    exact = False  # True: call the original code

    def __reduce__(self) -> tuple[Any, ...]:  # a class made at run time cannot be imported, so copies make it again
        return _empty, type(self).__bases__, vars(self)


def _class(first: type[Fused], own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (first, own), {"__module__": own.__module__})


def _empty(first: type[Fused], own: type[nn.Module]) -> nn.Module:
    kind = _class(first, own)
    return kind.__new__(kind)


def _bare(layer: nn.Module) -> bool:
    """Whether `layer` is still a packed layer, without a bias and without forward hooks."""
    if not isinstance(layer, PackedLinear) or layer.bias is not None:
        return False
    return not layer._forward_hooks and not layer._forward_pre_hooks


class FusedMLP(Fused):
    """An MLP that calls the native library twice. Its layers are those of the model's own class."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        matrices = self._matrices() if _plain(x) else None
        if matrices is None:
            y: Tensor = super().forward(x)
            return y
        with torch.no_grad():
            gate, up = matmul(matrices[:2], x)
            inner, between = self.act_fn(gate).mul_(up), self._modules.get(SUB_NORMS["down_proj"])
            (y,) = matmul(matrices[2:], inner if between is None else between(inner))
        return y.to(compute_dtype(x))

    def _matrices(self) -> list[Matrix] | None:
        """The matrices of gate, up and down. None if a layer cannot be fused."""
        matrices = []
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            product = layer.chosen() if _bare(layer) else None
            if not isinstance(product, NativeProduct) or not product.takes_inputs_of(layer):
                return None
            matrices.append(product.matrix)
        return matrices


class FusedNorm(Fused):
    """An RMSNorm that is one call of the native library. Its weight is that of the model's own class."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if self.exact or not _plain(x) or not _plain(self.weight) or not x.dtype == self.weight.dtype == torch.float32:
            y: Tensor = super().forward(x)
            return y
        return norm(x.detach(), self.weight, self.variance_epsilon)


def fuse(model: nn.Module) -> None:
    """Fuse the known norms of `model`, and the known MLPs whose layers are all packed. Without kernels do nothing."""
    if library.available() is not None:
        return
    made: dict[type, type[nn.Module]] = {}
    for module in model.modules():
        first, own = _fused(module), type(module)
        if first is not None and not isinstance(module, first):
            made.setdefault(own, _class(first, own))
            module.__class__ = made[own]


def _fused(module: nn.Module) -> type[Fused] | None:
    """The fused class for a module, or None if the module is not a known one."""
    name, children = type(module).__name__, dict(module.named_children())
    if name in MLPS and all(isinstance(children.get(layer), PackedLinear) for layer in MLP):
        return FusedMLP
    return FusedNorm if name in NORMS else None
