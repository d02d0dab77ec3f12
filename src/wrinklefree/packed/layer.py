"""Linear layers and embeddings that hold packed codes, not a weight. Each packed folder has a copy of this file.

Buffers, all of them in the saved file:

    weight      uint8 [..., ceil(n * bits / 8)]   the codes `index` [..., n], packed along the last dimension
    <name>      fp16, the method's shape          one for each of `Codes.tensors`: scales, tables
    bias        [out]                             a parameter, if the trained layer has one
    rms_norm.weight  [in]                         a parameter, if the trained layer normalizes its inputs

The codes are called `weight` on purpose: to a program that does not know this format they are a weight of the wrong
shape, which transformers refuses. Under any other name it would start from random weights and say so in a warning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from wrinklefree.core.codes import Codes, packed_length, unpack
from wrinklefree.core.inputs import PlainRMSNorm, compute_dtype, int8_per_token


class Method(Protocol):
    """What a packed layer has to know of the method that made its codes."""

    name: str

    @property
    def int8_inputs(self) -> bool: ...  # whether inputs are rounded to int8 per token

    def decode(self, codes: Codes) -> Tensor: ...  # the fp32 weight [out, in]


@dataclass(frozen=True)
class LayerSpec:
    """The shapes of one packed layer: what has to be known before its tensors are read. Plain JSON values."""

    shape: list[int]  # [out_features, in_features]
    bits: int  # width of one code
    index_shape: list[int]  # of the unpacked codes
    tensors: dict[str, list[int]]  # shape of each scale or table
    bias: bool
    norm_eps: float | None = None  # of the norm of its inputs, if it has one
    method: dict[str, Any] | None = None  # its own method's settings, if that is not the model's

    @property
    def packed_shape(self) -> list[int]:
        return [*self.index_shape[:-1], packed_length(self.index_shape[-1], self.bits)]


class PackedLinear(nn.Module):
    """`decode(codes)` as a linear layer. Codes and scales keep their dtype whatever the model is cast to."""

    weight: Tensor
    exact = False  # whether the decoded weight has to multiply
    choose: ClassVar[Callable[["PackedLinear"], "Product"]]  # the fastest product; the package sets another

    def __init__(self, method: Method, spec: LayerSpec) -> None:
        """Empty buffers of the right shapes, on the current default device."""
        super().__init__()
        self.method = method
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        self.dense: Tensor | None = None  # the decoded weight, kept from its first use on
        self.product: Product | None = None  # chosen at the first forward on this device
        self.register_buffer("weight", torch.empty(spec.packed_shape, dtype=torch.uint8))
        for name, shape in spec.tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float16))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if spec.bias else None
        self.rms_norm = None if spec.norm_eps is None else PlainRMSNorm(torch.empty(self.in_features), spec.norm_eps)

    def codes(self) -> Codes:
        """The codes as they were trained, scales in fp32."""
        index = unpack(self.weight, self.spec.bits, self.spec.index_shape[-1])
        tensors = {name: self.get_buffer(name).float() for name in self.spec.tensors}
        return Codes(index, self.spec.bits, tensors, (self.out_features, self.in_features))

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight [out, in] in the compute dtype, decoded once and kept."""
        if self.dense is None or self.dense.dtype != dtype or self.dense.device != self.weight.device:
            with torch.inference_mode(False), torch.no_grad():
                self.dense = self.decoded().to(dtype)
        return self.dense

    def decoded(self) -> Tensor:
        """The decoded weight in fp32. Autocast would round its factors."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.method.decode(self.codes())

    def inputs(self, x: Tensor) -> Tensor:
        """What is multiplied with the weight: `x`, normalized and rounded as in training."""
        x = x if self.rms_norm is None else self.rms_norm(x)
        return int8_per_token(x) if self.method.int8_inputs else x

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:  # other products have no gradient
            return by_decoded_weight(self, x)
        return self.chosen()(self, x)

    def chosen(self) -> "Product":
        """The product for this device, asked for once."""
        if self.product is None:
            self.product = by_decoded_weight if self.exact else self.choose()
        return self.product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves to other devices, ignore casts: bf16 has not the digits of an fp16 scale."""
        keep = {id(self.get_buffer(name)) for name in ("weight", *self.spec.tensors)}

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in keep and moved.dtype != tensor.dtype else moved

        self.dense = self.product = None
        super()._apply(apply, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles choose their own product."""
        return vars(self) | {"product": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.dense = self.product = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.spec.bits}, method={self.method.name}"


Product = Callable[[PackedLinear, Tensor], Tensor]  # a layer and its inputs [..., in] -> [..., out], bias and all


def by_decoded_weight(layer: PackedLinear, x: Tensor) -> Tensor:
    """The product that training computes, bit for bit."""
    x = layer.inputs(x)
    return F.linear(x, layer.effective_weight(compute_dtype(x)), layer.bias)


PackedLinear.choose = lambda layer: by_decoded_weight


class PackedEmbedding(PackedLinear):
    """`nn.Embedding` over the rows of a packed layer [vocabulary, width]; its results follow the model's casts."""

    like: Tensor

    def __init__(self, method: Method, spec: LayerSpec, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of the results; None is torch's default."""
        super().__init__(method, spec)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self, ids).to(self.like.dtype)


class TiedEmbedding(nn.Module):
    """`nn.Embedding` over the rows of the packed head, which owns the tensors."""

    like: Tensor

    def __init__(self, head: PackedLinear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.head = [head]  # in a list, so that it is not registered, and saved, twice
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self.head[0], ids).to(self.like.dtype)


def rows(layer: PackedLinear, ids: Tensor) -> Tensor:
    """Rows of the decoded weight: ids [...] -> fp32 [..., in]. Every tensor of the codes has a row for each row."""
    chosen = ids.flatten()
    index = unpack(layer.weight[chosen], layer.spec.bits, layer.in_features)
    tensors = {name: layer.get_buffer(name)[chosen].float() for name in layer.spec.tensors}
    codes = Codes(index, layer.spec.bits, tensors, (len(chosen), layer.in_features))
    return layer.method.decode(codes).unflatten(0, ids.shape)
