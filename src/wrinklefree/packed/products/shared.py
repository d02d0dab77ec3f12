"""Layers that see the same inputs (Q, K, V; gate, up): one product for all, whose inputs are rounded once.

The first of them to be called works out all; the others take theirs, as long as they are given the very same tensor,
unchanged since. Tensors made in inference mode do not tell whether they were changed: there each layer works for
itself.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from wrinklefree.packed.products.native import Matrix, matmul

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Member(Protocol):
    """What a packed layer is to its siblings."""

    def shared_matrix(self) -> Matrix | None:
        """Its matrix, where the kernels take the layer's inputs just as they come."""


class Shared:
    """Some layers with the same inputs, and results that wait to be taken."""

    def __init__(self, layers: Sequence[Member]) -> None:
        self.layers = layers
        self._forget()

    def _forget(self) -> None:
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without results, for copies and pickles."""
        return vars(self) | {"_x": None, "_waiting": {}}

    def take(self, layer: Member, x: Tensor) -> Tensor | None:
        """The layer's fp32 result, without its bias; None where it has to work for itself."""
        if x.is_inference():
            return None
        if self._x is not x or self._version != x._version or id(layer) not in self._waiting:
            matrices = [matrix for other in self.layers if (matrix := other.shared_matrix()) is not None]
            if len(matrices) < len(self.layers):
                return None
            self._x, self._version = x, x._version
            self._waiting = {id(m): y for m, y in zip(self.layers, matmul(matrices, x), strict=True)}
        y = self._waiting.pop(id(layer))
        if not self._waiting:
            self._x = None
        return y


def share_inputs(model: nn.Module, kind: type[nn.Module]) -> None:
    """Let layers of `kind`, which are `Member`s, work together where they bear the names above in one module."""
    for module in model.modules():
        children = dict(module.named_children())
        for names in TOGETHER:
            layers: list[Any] = [children[name] for name in names if isinstance(children.get(name), kind)]
            if len(layers) == len(names):
                group = Shared(layers)
                for layer in layers:
                    layer.shared = group
