"""Multiply few tokens with packed codes by a kernel that torch.compile makes from the method's `decode`.

It serves codes that no program in products/triton.py reads. Unpacking, decoding and the sum over columns become one
loop over the packed bytes, so the decoded weight is never written to memory. Sums are in fp32. torch.compile needs
Triton on a GPU and a C++ compiler on a CPU.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.codes import Codes, unpack
from wrinklefree.core.method import QuantLinear
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.products.coded import FewTokens

log = logging.getLogger("wrinklefree")

Function = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]

# By default the compiler writes a value to memory if its formula is long or it is used several times. All uses of a
# decoded weight here are in one loop, so it is never computed twice.
NEVER = 1_000_000
OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "realize_opcount_threshold": NEVER,
    "realize_reads_threshold": NEVER,
    "realize_acc_reads_threshold": NEVER,
}


@dataclass(frozen=True)
class Layout:
    """The key of a compiled function. Layers with equal layouts share one."""

    layer: type[QuantLinear]
    bits: int
    shape: tuple[int, int]  # [out, in]
    length: int  # of the codes' last dimension
    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of scales and tables
    device: torch.device


@dataclass(frozen=True)
class CompiledProduct(FewTokens):
    """Multiplies a layer by its compiled function. `tensors` are the layer's buffers of scales and tables."""

    layout: Layout
    tensors: dict[str, Tensor] = field(repr=False)

    def few(self, weight: Tensor, x: Tensor) -> Tensor | None:
        """Multiply `x` [..., in] with the packed `weight`: fp32 [..., out]. None if it cannot be compiled."""
        # torch.compile would compile again for each of the caller's modes, and autocast would round decoded values.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            tokens = x.clone().float() if x.is_inference() else x.float()
            y = _call_compiled(self.layout, weight, self.tensors, _padded(tokens.flatten(0, -2)))
        return None if y is None else y[: x.numel() // x.shape[-1]].unflatten(0, x.shape[:-1])


def _padded(x: Tensor) -> Tensor:
    """Add zero tokens up to 1, 2, 4 or 8, because a function is compiled for each number of tokens."""
    return F.pad(x, (0, 0, 0, (1 << (len(x) - 1).bit_length()) - len(x))).contiguous()


def product(layer: PackedLinear, kind: type[QuantLinear], codes: Codes) -> CompiledProduct:
    """The product for a layer with `codes`, which `kind` decodes."""
    tensors = {name: layer.get_buffer(name) for name in layer.spec.tensors}
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    layout = Layout(kind, codes.bits, codes.shape, codes.index.shape[-1], shapes, codes.index.device)
    return CompiledProduct(layout, tensors)


_refused: set[Layout] = set()  # layouts that torch.compile has failed for


def _call_compiled(layout: Layout, weight: Tensor, tensors: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """Call the compiled function of a layout. None, with one warning per reason, if it cannot be compiled."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # slow to import

    function = _function(layout)
    if function is None or layout in _refused:
        return None
    try:
        return function(weight, tensors, x)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        _refused.add(layout)
        _warn_once(" ".join(str(error).partition("\n\n")[0].split())[:200])  # the rest is for torch's developers
        return None


@cache
def _function(layout: Layout) -> Function | None:
    """The function (weight, tensors, x fp32 [tokens, in]) -> fp32 [tokens, out] of a layout.

    It is compiled at its first call. None if torch.compile does not support this Python or platform.
    """
    layer, bits, shape, length = layout.layer, layout.bits, layout.shape, layout.length

    def product(weight: Tensor, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        scales = {name: tensor.float() for name, tensor in tensors.items()}
        decoded = layer.decode(Codes(unpack(weight, bits, length), bits, scales, shape))
        return torch.stack([(decoded * token).sum(-1) for token in x.unbind()])

    # torch gives up after it has compiled one code object eight times, so each layout gets its own.
    code = product.__code__.replace(co_name=f"product_of_{layer.__name__}")
    own = FunctionType(code, product.__globals__, code.co_name, None, product.__closure__)
    try:
        return torch.compile(own, dynamic=False, fullgraph=True, options=OPTIONS)
    except RuntimeError as error:
        _warn_once(str(error))
        return None


@cache
def _warn_once(reason: str) -> None:
    """Warn that layers keep decoded weights, once per reason."""
    log.warning("some packed layers keep their decoded weights, which takes memory: %s", reason)
