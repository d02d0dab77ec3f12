"""Second moments of what a block's layers are given: H = sum_t w_t x_t x_t^T / sum_t w_t.

x_t [in] is a layer's input at token t, and w_t says how much an error at that token counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from wrinklefree.core.method import QuantLinear


@dataclass(frozen=True)
class Seen:
    """What a layer was given, and what came of it."""

    layer: QuantLinear
    x: Tensor
    version: int  # of x: it grows when x is written to
    product: Tensor

    def is_for(self, layer: QuantLinear, x: Tensor) -> bool:
        """Whether `layer` is given the same and makes the same of it. A norm before the weight is each layer's own."""
        same = x is self.x and x._version == self.version
        return same and layer.config == self.layer.config and layer.rms_norm is None and self.layer.rms_norm is None


class Moments:
    """Adds up second moments while the layers run. Use it as a context manager, and `weigh` before each run."""

    def __init__(self, layers: Mapping[str, QuantLinear]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.total = 0.0
        self.last: Seen | None = None
        self.handles = [layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in layers.items()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.last = None
        for handle in self.handles:
            handle.remove()

    def weigh(self, weights: Tensor) -> None:
        """Give the weights [B, L] of the tokens that run next."""
        self.weights, self.last = weights, None
        self.total += weights.double().sum().item()

    @torch.no_grad()
    def _see(self, name: str, layer: QuantLinear, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if self.last is None or not self.last.is_for(layer, x):  # queries, keys and values have one product
            self.last = Seen(layer, x, x._version, self._product(layer.inputs(x).float()))
        product = self.last.product
        self.sums[name] = self.sums[name].add_(product) if name in self.sums else product.clone()

    def _product(self, x: Tensor) -> Tensor:
        """The weighted sum of x_t x_t^T over the tokens of `x` [..., in], fp64 [in, in]."""
        # An expert gets some of the tokens in an order of its own: there they all count alike.
        weights = self.weights if x.shape[:-1] == self.weights.shape else self.weights.mean()
        x = (x * weights.sqrt().unsqueeze(-1)).flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            return (x.T @ x).double()  # the sum over batches is in fp64

    def means(self) -> dict[str, Tensor]:
        """The moments of each layer that ran, by name: fp32 [in, in]. The sums are gone afterwards."""
        return {name: (self.sums.pop(name) / self.total).float() for name in list(self.sums)}
