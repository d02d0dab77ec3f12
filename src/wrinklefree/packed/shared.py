"""Layers that see the same inputs (Q, K, V; gate, up): one product for all, whose inputs are rounded once.

The first of them to be called works out all; the others take theirs, as long as they are given the very same tensor,
unchanged since. Tensors made in inference mode do not tell whether they were changed: there each layer works for
itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from wrinklefree.packed import native

if TYPE_CHECKING:
    from wrinklefree.packed.linear import PackedLinear

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Shared:
    """Some layers with the same inputs, and results that wait to be taken."""

    def __init__(self, layers: list[PackedLinear]) -> None:
        self.layers = layers
        self._forget()

    def _forget(self) -> None:
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without results, for copies and pickles."""
        return {"layers": self.layers, "_x": None, "_version": 0, "_waiting": {}}

    def take(self, layer: PackedLinear, x: Tensor) -> Tensor | None:
        """The layer's fp32 result, without its bias; None where it has to work for itself."""
        if x.is_inference():
            return None
        if self._x is not x or self._version != x._version or id(layer) not in self._waiting:
            if not all(other.shares() for other in self.layers):
                return None
            matrices = [other.product.matrix for other in self.layers if other.product is not None]
            results = native.matmul(matrices, x)
            self._x, self._version = x, x._version
            self._waiting = {id(other): y for other, y in zip(self.layers, results, strict=True)}
        y = self._waiting.pop(id(layer))
        if not self._waiting:
            self._forget()
        return y


def share_inputs(model: nn.Module, kind: type[nn.Module]) -> None:
    """Let layers of `kind` with the names above, side by side in one module, work together."""
    for module in model.modules():
        children = dict(module.named_children())
        for names in TOGETHER:
            layers = [children[name] for name in names if isinstance(children.get(name), kind)]
            if len(layers) == len(names):
                group = Shared(layers)  # type: ignore[arg-type]  # of `kind`, which is PackedLinear
                for layer in layers:
                    vars(layer)["shared"] = group
