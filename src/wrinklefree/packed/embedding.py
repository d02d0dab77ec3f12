"""Embeddings that hold packed codes: rows are decoded as they are looked up.

An embedding that is tied to the head has no tensors of its own: it reads the head's rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from wrinklefree.core.codes import Codes, unpack
from wrinklefree.core.method import QuantMethod
from wrinklefree.packed.layer import LayerSpec, PackedLinear


def rows(layer: PackedLinear, ids: Tensor) -> Tensor:
    """Rows of the decoded weight: ids [...] -> fp32 [..., in]. Every tensor of the codes has a row for each row."""
    chosen = ids.flatten()
    index = unpack(layer.weight[chosen], layer.spec.bits, layer.in_features)
    tensors = {name: layer.get_buffer(name)[chosen].float() for name in layer.spec.tensors}
    codes = Codes(index, layer.spec.bits, tensors, (len(chosen), layer.in_features))
    return layer.config.layer.decode(codes).unflatten(0, ids.shape)


class PackedEmbedding(PackedLinear):
    """`nn.Embedding` over the rows of a packed layer [vocabulary, width]; its results follow the model's casts."""

    like: Tensor

    def __init__(self, config: QuantMethod, spec: LayerSpec, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of the results; None is torch's default."""
        super().__init__(config, spec)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self, ids).to(self.like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        like = fn(self.like)
        super()._apply(fn, recurse)
        self.like = like
        return self


class TiedEmbedding(nn.Module):
    """`nn.Embedding` over the rows of the packed head, which owns the tensors."""

    like: Tensor

    def __init__(self, head: PackedLinear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.head = [head]  # in a list, so that it is not registered, and saved, twice
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self.head[0], ids).to(self.like.dtype)
