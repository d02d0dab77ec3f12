"""Products of few tokens with packed codes, made by torch.compile from the method's `decode`.

For codes that no program of our own reads (products/triton.py). Unpacking, decoding and the sum over columns become one
loop over the packed bytes; a weight is worked out where it is used, once for all tokens, and none is kept or written to
memory. Sums are in fp32. It needs what torch.compile does: Triton on a GPU, a C++ compiler on a CPU.
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

# The compiler would write a decoded weight to memory where a formula is long or has several uses. All uses here are in
# one loop, so nothing is worked out twice.
NEVER = 1_000_000
OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "realize_opcount_threshold": NEVER,
    "realize_reads_threshold": NEVER,
    "realize_acc_reads_threshold": NEVER,
}


@dataclass(frozen=True)
class Layout:
    """What a compiled function is made for: layers that have all of this in common share one."""

    layer: type[QuantLinear]
    bits: int
    shape: tuple[int, int]  # [out, in]
    length: int  # of the codes' last dimension
    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of scales and tables
    device: torch.device


@dataclass(frozen=True)
class CompiledProduct(FewTokens):
    """y = V x for few tokens; scales and tables are the layer's own buffers."""

    layout: Layout
    tensors: dict[str, Tensor] = field(repr=False)

    def few(self, weight: Tensor, x: Tensor) -> Tensor | None:
        """None if it cannot be compiled."""
        # The modes that a caller is in would each be compiled for, and autocast would round what is decoded.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            tokens = x.clone().float() if x.is_inference() else x.float()
            y = _run(self.layout, weight, self.tensors, _filled(tokens.flatten(0, -2)))
        return None if y is None else y[: x.numel() // x.shape[-1]].unflatten(0, x.shape[:-1])


def _filled(x: Tensor) -> Tensor:
    """1, 2, 4 or 8 tokens, those that are missing zeros: a function is compiled for each number."""
    return F.pad(x, (0, 0, 0, (1 << (len(x) - 1).bit_length()) - len(x))).contiguous()


def product(layer: PackedLinear, kind: type[QuantLinear], codes: Codes) -> CompiledProduct:
    """The product of a layer with `codes`, which `kind` decodes."""
    tensors = {name: layer.get_buffer(name) for name in layer.spec.tensors}
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    layout = Layout(kind, codes.bits, codes.shape, codes.index.shape[-1], shapes, codes.index.device)
    return CompiledProduct(layout, tensors)


_refused: set[Layout] = set()


def _run(layout: Layout, weight: Tensor, tensors: dict[str, Tensor], x: Tensor) -> Tensor | None:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # slow to import

    function = _function(layout)
    if function is None or layout in _refused:
        return None
    try:
        return function(weight, tensors, x)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        _refused.add(layout)
        _say(" ".join(str(error).partition("\n\n")[0].split())[:200])  # advice for torch's developers follows
        return None


@cache
def _function(layout: Layout) -> Function | None:
    """(weight, tensors, x fp32 [tokens, in]) -> fp32 [tokens, out], not compiled until its first call."""
    layer, bits, shape, length = layout.layer, layout.bits, layout.shape, layout.length

    def product(weight: Tensor, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        scales = {name: tensor.float() for name, tensor in tensors.items()}
        decoded = layer.decode(Codes(unpack(weight, bits, length), bits, scales, shape))
        return torch.stack([(decoded * token).sum(-1) for token in x.unbind()])

    # torch counts how often it compiled one code object, and gives up after eight: each layout gets its own.
    code = product.__code__.replace(co_name=f"product_of_{layer.__name__}")
    own = FunctionType(code, product.__globals__, code.co_name, None, product.__closure__)
    try:
        return torch.compile(own, dynamic=False, fullgraph=True, options=OPTIONS)
    except RuntimeError as error:  # this Python or platform is none of torch.compile's
        _say(str(error))
        return None


@cache
def _say(reason: str) -> None:
    """Once for each reason."""
    log.warning("some packed layers keep their decoded weights, which takes memory: %s", reason)
