"""Linear layers and embeddings that hold packed codes instead of a weight. Each packed folder has a copy of this file.

A layer saves these tensors:

    weight      uint8 [..., ceil(n * bits / 8)]   the codes `index` [..., n], packed along the last dimension
    <name>      fp16, the method's shape          one per entry of `Codes.tensors`: scales, tables
    bias        [out]                             a parameter, if the trained layer has a bias
    rms_norm.weight  [in]                         a parameter, if the trained layer normalizes its inputs

The codes are called `weight` on purpose. A program that does not know this format then finds a weight of the wrong
shape, which transformers refuses. Under another name it would only warn, and go on with random weights.
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
from wrinklefree.core.rotation import rotated


class Method(Protocol):
    """The part of a method that a packed layer needs."""

    name: str

    @property
    def int8_inputs(self) -> bool: ...  # whether inputs are rounded to int8 per token

    def decode(self, codes: Codes) -> Tensor: ...  # the fp32 weight [out, in]


@dataclass(frozen=True)
class LayerSpec:
    """The shapes of one packed layer, known before its tensors are read. All values can be written as JSON."""

    shape: list[int]  # [out_features, in_features]
    bits: int  # width of one code
    index_shape: list[int]  # of the unpacked codes
    tensors: dict[str, list[int]]  # shape of each scale or table
    bias: bool
    norm_eps: float | None = None  # eps of the layer's norm; None if it has no norm
    method: dict[str, Any] | None = None  # settings of the layer's method; None means the model's method
    rotated: bool | None = None  # whether inputs are rotated before the product; None means no

    @property
    def packed_shape(self) -> list[int]:
        return [*self.index_shape[:-1], packed_length(self.index_shape[-1], self.bits)]


class PackedLinear(nn.Module):
    """A linear layer with the weight `decode(codes)`. Codes and scales keep their dtype if the model is cast."""

    weight: Tensor
    exact = False  # True: multiply with the decoded weight, never with a kernel
    choose: ClassVar[Callable[["PackedLinear"], "Product"]]  # picks a product; the package sets one that knows kernels

    def __init__(self, method: Method, spec: LayerSpec) -> None:
        """Create uninitialized buffers of the right shapes on the default device."""
        super().__init__()
        self.method = method
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        self.dense: Tensor | None = None  # the decoded weight, cached at its first use
        self.product: Product | None = None  # chosen at the first forward pass on this device
        self.register_buffer("weight", torch.empty(spec.packed_shape, dtype=torch.uint8))
        for name, shape in spec.tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float16))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if spec.bias else None
        self.rms_norm = None if spec.norm_eps is None else PlainRMSNorm(torch.empty(self.in_features), spec.norm_eps)

    def codes(self) -> Codes:
        """Unpack the codes. Scales and tables are cast to fp32."""
        index = unpack(self.weight, self.spec.bits, self.spec.index_shape[-1])
        tensors = {name: self.get_buffer(name).float() for name in self.spec.tensors}
        return Codes(index, self.spec.bits, tensors, (self.out_features, self.in_features))

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight [out, in] in `dtype`. It is decoded once and cached."""
        if self.dense is None or self.dense.dtype != dtype or self.dense.device != self.weight.device:
            with torch.inference_mode(False), torch.no_grad():
                self.dense = self.decoded().to(dtype)
        return self.dense

    def decoded(self) -> Tensor:
        """Decode the weight to fp32 [out, in]."""
        with torch.autocast(self.weight.device.type, enabled=False):  # it would round the factors
            return self.method.decode(self.codes())

    def inputs(self, x: Tensor, rounded: bool = True) -> Tensor:
        """Normalize, rotate and round `x` as in training. The weight multiplies the result."""
        x = x if self.rms_norm is None else self.rms_norm(x)
        x = rotated(x) if self.spec.rotated else x
        return int8_per_token(x) if rounded and self.method.int8_inputs else x

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:  # kernels have no backward pass
            return by_decoded_weight(self, x)
        return self.chosen()(self, x)

    def chosen(self) -> "Product":
        """The function that multiplies this layer. It is chosen once per device."""
        if self.product is None:
            self.product = by_decoded_weight if self.exact else self.choose()
        return self.product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves to other devices but ignore casts, because bf16 has too few digits for an fp16 scale."""
        keep = {id(self.get_buffer(name)) for name in ("weight", *self.spec.tensors)}

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in keep and moved.dtype != tensor.dtype else moved

        self.dense = self.product = None
        super()._apply(apply, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the product out of copies and pickles. They choose their own."""
        return vars(self) | {"product": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.dense = self.product = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.spec.bits}, method={self.method.name}"


Product = Callable[[PackedLinear, Tensor], Tensor]  # (layer, x [..., in]) -> [..., out], with bias


def by_decoded_weight(layer: PackedLinear, x: Tensor) -> Tensor:
    """Multiply with the decoded weight. The result equals that of the trained layer bit for bit."""
    x = layer.inputs(x)
    return F.linear(x, layer.effective_weight(compute_dtype(x)), layer.bias)


PackedLinear.choose = lambda layer: by_decoded_weight


class PackedEmbedding(PackedLinear):
    """An embedding [vocabulary, width] that decodes the rows it needs. Results have the dtype the model is cast to."""

    like: Tensor
    scale = 1.0  # of the embedding that it replaces: `scale_of`

    def __init__(self, method: Method, spec: LayerSpec, dtype: torch.dtype | None = None) -> None:
        """`dtype` is the dtype of the results. None means torch's default."""
        super().__init__(method, spec)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self, ids).to(self.like.dtype) * self.like.new_tensor(self.scale)


class TiedEmbedding(nn.Module):
    """An embedding that reads its rows from the packed output head, which owns the tensors."""

    like: Tensor
    scale = 1.0

    def __init__(self, head: PackedLinear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.head = [head]  # a list hides it from nn.Module, so it is not saved twice
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return rows(self.head[0], ids).to(self.like.dtype) * self.like.new_tensor(self.scale)


def scale_of(embedding: nn.Module) -> float:
    """The factor of an embedding's rows. Gemma's and BART's classes multiply by the root of their width."""
    values = vars(embedding)
    return float(values.get("scalar_embed_scale", values.get("embed_scale", 1.0)))


def rows(layer: PackedLinear, ids: Tensor) -> Tensor:
    """Decode the rows `ids` [...] of a weight to fp32 [..., in]. Every scale tensor must have one row per row."""
    chosen = ids.flatten()
    index = unpack(layer.weight[chosen], layer.spec.bits, layer.in_features)
    tensors = {name: layer.get_buffer(name)[chosen].float() for name in layer.spec.tensors}
    codes = Codes(index, layer.spec.bits, tensors, (len(chosen), layer.in_features))
    return layer.method.decode(codes).unflatten(0, ids.shape)
