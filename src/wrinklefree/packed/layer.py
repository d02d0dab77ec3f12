"""A linear layer that holds packed codes instead of a weight.

Buffers, all of them in the saved file:

    weight      uint8 [..., ceil(n * bits / 8)]   the codes `index` [..., n], packed along the last dimension
    <name>      fp16, the method's shape          one for each of `Codes.tensors`: scales, tables
    bias        [out]                             a parameter, only where the trained layer has one
    rms_norm.weight  [in]                         a parameter, only where the trained layer normalizes its inputs

On a CPU the native kernels multiply, where they could be built (packed/native.py); they round activations to int8 per
token, as BitNet-like methods do in training, and every other method's here, which changes logits by about a percent.
`set_exact(model)` turns that off: the decoded weight multiplies in the model's dtype then. So it does where a gradient
is wanted, and where there are no kernels. They hold a copy of the codes, beside the saved buffers. On a GPU few tokens
are multiplied with the codes as they lie here, in fp32, by programs of ours (packed/gpu.py), or by what torch.compile
makes of the method's `decode` (packed/compiled.py).

The codes are called `weight` on purpose: to a program that does not know this format they are a weight of the wrong
shape, which transformers refuses. Under any other name it would start from random weights and say so in a warning.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from wrinklefree.core.codes import Codes, pack, packed_length, unpack
from wrinklefree.core.inputs import RMSNorm, int8_per_token
from wrinklefree.core.method import QuantMethod, compute_dtype
from wrinklefree.packed.products.choose import GpuProduct, Product, gpu_product, product, usable
from wrinklefree.packed.products.compiled import CompiledProduct, compiled_product
from wrinklefree.packed.products.native import Matrix
from wrinklefree.packed.products.shared import Shared

FEW = 8  # tokens that a GPU multiplies with packed codes; more of them with the decoded weight


@dataclass(frozen=True)
class LayerSpec:
    """The shapes of one packed layer: what has to be known before its tensors are read. Plain JSON values."""

    shape: list[int]  # [out_features, in_features]
    bits: int  # width of one code
    index_shape: list[int]  # of the unpacked codes
    tensors: dict[str, list[int]]  # shape of each scale or table
    bias: bool
    norm_eps: float | None = None  # of the norm of its inputs, where it has one
    method: dict[str, Any] | None = None  # its own method's settings, where that is not the model's

    @classmethod
    def of(cls, codes: Codes, bias: bool, norm_eps: float | None = None) -> "LayerSpec":
        tensors = {name: list(tensor.shape) for name, tensor in codes.tensors.items()}
        return cls(list(codes.shape), codes.bits, list(codes.index.shape), tensors, bias, norm_eps)

    @property
    def packed_shape(self) -> list[int]:
        return [*self.index_shape[:-1], packed_length(self.index_shape[-1], self.bits)]


class ByKernels(nn.Module):
    """A module that native kernels work for, unless `exact`: then it does what the trained one did, bit for bit."""

    exact = False


class PackedLinear(ByKernels):
    """`decode(codes)` as a linear layer. Codes and scales keep their dtype whatever the model is cast to."""

    weight: Tensor

    def __init__(self, config: QuantMethod, spec: LayerSpec) -> None:
        """Empty buffers of the right shapes, on the current default device."""
        super().__init__()
        self.config = config
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        self.dense: Tensor | None = None  # the decoded weight, kept from the first forward on
        self.product: Product | None = None  # the kernels' copy of the codes, likewise; None where they know no form
        self.gpu_product: GpuProduct | CompiledProduct | None = None  # of few tokens; None where neither can be had
        self.asked = False  # whether the products are up to date
        self.shared: Shared | None = None  # with layers that see the same inputs
        self.register_buffer("weight", torch.empty(spec.packed_shape, dtype=torch.uint8))
        for name, shape in spec.tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float16))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if spec.bias else None
        self.rms_norm = None if spec.norm_eps is None else RMSNorm(torch.empty(self.in_features), spec.norm_eps)

    @classmethod
    def from_codes(
        cls, config: QuantMethod, codes: Codes, bias: Tensor | None, norm_eps: float | None = None
    ) -> "PackedLinear":
        """Pack `codes`; the gain of a norm is left on the meta device for its own tensor to take its place.

        Raises ValueError where a scale is not exactly an fp16 number: it would change in the file.
        """
        with torch.device("meta"):
            layer = cls(config, LayerSpec.of(codes, bias is not None, norm_eps))
        layer.weight = pack(codes.index, codes.bits)
        for name, tensor in codes.tensors.items():
            setattr(layer, name, _exact_fp16(name, tensor))
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def codes(self) -> Codes:
        """The codes as they were trained, scales in fp32: the argument of the method's `decode`."""
        index = unpack(self.weight, self.spec.bits, self.spec.index_shape[-1])
        tensors = {name: self.get_buffer(name).float() for name in self.spec.tensors}
        return Codes(index, self.spec.bits, tensors, (self.out_features, self.in_features))

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight [out, in] in the compute dtype, decoded once and kept."""
        if self.dense is None or self.dense.dtype != dtype or self.dense.device != self.weight.device:
            with torch.inference_mode(False), torch.no_grad():
                self.dense = self._decode().to(dtype)
        return self.dense

    def _decode(self) -> Tensor:
        """The decoded weight in fp32, also where autocast would round its factors."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.config.layer.decode(self.codes())

    def inputs(self, x: Tensor) -> Tensor:
        """What is multiplied with the weight: `x` through the layer's norm, if any, and the method's quantizer."""
        x = x if self.rms_norm is None else self.rms_norm(x)
        return int8_per_token(x) if self.config.int8_inputs else x

    def forward(self, x: Tensor) -> Tensor:
        if self.exact or (torch.is_grad_enabled() and x.requires_grad):
            return self._decoded(x)
        if x.is_cpu:
            return self._uncompiled(x) if torch.compiler.is_compiling() else self._native(x)
        return self._on_gpu(x) if x.is_cuda else self._decoded(x)

    def _decoded(self, x: Tensor) -> Tensor:
        """By the decoded weight."""
        x = self.inputs(x)
        return F.linear(x, self.effective_weight(compute_dtype(x)), self.bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(self, x: Tensor) -> Tensor:
        return self._native(x)

    def _native(self, x: Tensor) -> Tensor:
        """By the kernels, where there are any for this layer."""
        if not self.asked:
            self.product, self.asked = self._build(), True
        if self.product is None:
            return self._decoded(x)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._native(x)
        dtype = compute_dtype(x)
        y = None if self.shared is None else self.shared.take(self, x)
        y = self._alone(x, self.product) if y is None else y
        y = y if self.bias is None else y + self.bias.float()
        return y if y.dtype == dtype else y.to(dtype)

    def _alone(self, x: Tensor, product: Product) -> Tensor:
        x = x if self.rms_norm is None else self.rms_norm(x)
        rounded_within = self.config.int8_inputs and product.rounds_inputs
        return product(int8_per_token(x) if self.config.int8_inputs and not rounded_within else x)

    def shared_matrix(self) -> Matrix | None:
        """Its matrix, where the kernels take its inputs as they come, so that they can be rounded for others too."""
        if self.exact or self.rms_norm is not None:
            return None
        if not self.asked:
            self.product, self.asked = self._build(), True
        if self.product is None:
            return None
        plain = self.product.rounds_inputs or not self.config.int8_inputs
        return self.product.matrix if plain and not self.product.padded else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_gpu(self, x: Tensor) -> Tensor:
        """Few tokens from the packed codes; more by the weight, decoded for this once, so that memory stays small."""
        if not self.asked:
            self.gpu_product, self.asked = self._build_for_gpu(), True
        if self.gpu_product is None:
            return self._decoded(x)
        with torch.no_grad():
            dtype, inputs = compute_dtype(x), self.inputs(x)
            if inputs.numel() > FEW * self.in_features:
                return F.linear(inputs, self._decode().to(dtype), self.bias)
            y = self.gpu_product(self.weight, inputs)
            if y is None:
                self.gpu_product = None
                return self._decoded(x)
            return (y if self.bias is None else y + self.bias.float()).to(dtype)

    @torch.no_grad()
    def _build_for_gpu(self) -> GpuProduct | CompiledProduct:
        codes = self.codes()
        return gpu_product(self.config.layer.form(codes), codes, self.weight.device) or self.compiled(codes)

    def compiled(self, codes: Codes) -> CompiledProduct:
        """The product that torch.compile makes for `codes`, which are the layer's own."""
        tensors = {name: self.get_buffer(name) for name in self.spec.tensors}
        return compiled_product(self.config.layer, codes, tensors)

    @torch.no_grad()
    def _build(self) -> Product | None:
        if not usable():
            return None
        codes = self.codes()
        form = self.config.layer.form(codes)
        return None if form is None else product(form, codes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves to other devices, ignore casts: bf16 has not the digits of an fp16 scale."""
        keep = {id(buffer) for buffer in self.buffers(recurse=False)}

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in keep and moved.dtype != tensor.dtype else moved

        self._forget()
        super()._apply(apply, recurse)
        return self

    def _forget(self) -> None:
        """Drop what was made of the buffers."""
        self.dense, self.product, self.gpu_product, self.asked = None, None, None, False

    def __getstate__(self) -> dict[str, Any]:
        """Without the kernels' memory, for copies and pickles."""
        return vars(self) | {"product": None, "gpu_product": None, "asked": False}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.spec.bits}, method={self.config.name}"


def _exact_fp16(name: str, tensor: Tensor) -> Tensor:
    half = tensor.detach().to(torch.float16)
    if not torch.equal(half.to(tensor.dtype), tensor.detach()):
        raise ValueError(f"{name}: not representable in fp16, so the packed layer would differ from the trained one")
    return half


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed layer by fqn."""
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, PackedLinear)}


def set_exact(model: nn.Module, exact: bool = True) -> None:
    """Let packed layers multiply with the decoded weight, activations unrounded; or (False, the default) by kernels."""
    for module in _by_kernels(model):
        module.exact = exact


def _by_kernels(model: nn.Module) -> list[ByKernels]:
    return [module for module in model.modules() if isinstance(module, ByKernels)]


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """`set_exact` for a while."""
    before = [(module, module.exact) for module in _by_kernels(model)]
    set_exact(model)
    try:
        yield
    finally:
        for module, exact in before:
            module.exact = exact
