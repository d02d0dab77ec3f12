"""The native library's loops for training (`native/train.h`), as functions of tensors with gradients of their own.

Torch needs tens of passes over a matrix to choose codes, decode them and add up the gradients of their scales. Each
function here needs one. Results have the same bits for any number of threads, and codes are those of torch.
`serves(tensor)` says whether the library can be used; the methods' torch code serves everything else.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrinklefree.core import library
from wrinklefree.core.inputs import int8_per_token

_int, _pointer = ctypes.c_int, ctypes.c_void_p


def serves(tensor: Tensor) -> bool:
    """Whether the library can work on `tensor`: in memory of the CPU, outside of compiled code."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and library.available() is None


class _Complex(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("n", "m", "stages", "num_rows", "num_groups")),
        *((name, _pointer) for name in ("scales", "rows", "columns")),
    )


class _Table(ctypes.Structure):
    _fields_ = (*((name, _int) for name in ("n", "k", "size")), *((name, _pointer) for name in ("scales", "table")))


class ComplexScales(NamedTuple):
    """Scales [2 (U, W), T, 2 (re, im), R, G] of complex codes, and factors of rows [n] and columns [m] or None."""

    scales: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def plain(self) -> "ComplexScales":
        """The same values as contiguous fp32 tensors without gradient."""
        return ComplexScales(_plain(self.scales), *(None if t is None else _plain(t) for t in self[1:]))

    def check(self, index: torch.Size) -> None:
        """Raises ValueError unless these are scales and factors for codes of the shape `index`."""
        both, stages, n, m = index
        num_rows, num_groups = self.scales.shape[-2:]
        fits = self.scales.shape == (2, stages, 2, num_rows, num_groups) and both == 2
        fits = fits and num_rows in (1, n) and num_groups > 0 and m % num_groups == 0
        factors = [None if t is None else t.shape for t in self[1:]]
        if not fits or factors not in ([None, None], [(n,), (m,)]):
            shapes = [list(t.shape) for t in self if t is not None]
            raise ValueError(f"scales of shapes {shapes} are not those of codes {list(index)}")

    def described(self, n: int, m: int) -> Any:
        """A pointer for the library, to a layer of n x m complex numbers. It is valid as long as `self` is."""
        _, stages, _, num_rows, num_groups = self.scales.shape
        return ctypes.byref(_Complex(n, m, stages, num_rows, num_groups, *map(_at, self)))


def complex_codes(weight: Tensor, scales: ComplexScales) -> Tensor:
    """The codes uint8 [2, T, n, m] whose weighted sums of units are nearest to a real weight [2n, 2m]."""
    weight, scales = _plain(weight), scales.plain()
    n, m = weight.shape[0] // 2, weight.shape[1] // 2
    index = torch.empty(2, scales.scales.shape[1], n, m, dtype=torch.uint8)
    scales.check(index.shape)
    _call("wf_complex_codes", scales.described(n, m), _at(weight), _at(index))
    return index


def complex_weight(index: Tensor, scales: ComplexScales) -> Tensor:
    """The real weight [2n, 2m] that codes [2, T, n, m] stand for. Differentiable in the scales.

    Raises ValueError if the scales are not those of such codes.
    """
    scales.check(index.shape)
    weight: Tensor = _ComplexWeight.apply(index, *scales)
    return weight


class _ComplexWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, scale: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        index, scales = index.contiguous(), ComplexScales(scale, rows, columns).plain()
        ctx.save_for_backward(index, *scales)
        n, m = index.shape[-2:]
        weight = torch.empty(2 * n, 2 * m)
        _call("wf_complex_weight", scales.described(n, m), _at(index), _at(weight))
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, *tensors = ctx.saved_tensors
        scales, grad = ComplexScales(*tensors), _plain(grad)
        grads = [None if t is None else torch.empty_like(t) for t in scales]
        _call("wf_complex_gradient", scales.described(*index.shape[-2:]), _at(index), _at(grad), *map(_at, grads))
        return None, *grads


def table_codes(weight: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The index uint8 [out, in] of the entry of an ascending table that is nearest to weight / scales."""
    check_table(weight.shape, scales, table)
    weight, scales, table = _plain(weight), _plain(scales), _plain(table)
    index = torch.empty(weight.shape, dtype=torch.uint8)
    _call("wf_table_codes", _described(scales, table), _at(weight), _at(index))
    return index


def table_weight(index: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Compute table[index] * scales: [out, in], without gradient. Raises ValueError if shapes do not fit."""
    check_table(index.shape, scales, table)
    index, scales, table = index.contiguous(), _plain(scales), _plain(table)
    weight = torch.empty(index.shape)
    _call("wf_table_weight", _described(scales, table), _at(index), _at(weight))
    return weight


class TableGradients(NamedTuple):
    """Gradients of the latent weight, of the scales [out, in], and of the table."""

    weight: Tensor
    scales: Tensor
    table: Tensor


def table_gradients(grad: Tensor, weight: Tensor, scales: Tensor, table: Tensor) -> TableGradients:
    """Gradients from that of table[index] * scales, with r = weight / scales, q = table[index] and m = |r| <= 1 entry:

    m g for the weight, g (q - r m) for the scales, and for an entry of the table the sum of g scales over its codes.
    """
    check_table(weight.shape, scales, table)
    check_table(grad.shape, scales, table)
    grad, weight, scales, table = _plain(grad), _plain(weight), _plain(scales), _plain(table)
    grads = TableGradients(*(torch.empty_like(t) for t in (weight, scales, table)))
    _call("wf_table_gradient", _described(scales, table), _at(weight), _at(grad), *map(_at, grads))
    return grads


def rounded(x: Tensor) -> Tensor:
    """Round `x` [..., features] as `int8_per_token` does. The gradient passes through unchanged."""
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.numel() or not serves(x):
        return int8_per_token(x)
    result: Tensor = _Rounded.apply(x)
    return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, width = torch.empty_like(x), x.shape[-1]
        _call("wf_rounded", x.numel() // width, width, int(x.dtype == torch.bfloat16), _at(x), _at(y))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def check_table(shape: torch.Size, scales: Tensor, table: Tensor) -> None:
    """Raises ValueError unless `scales` has the shape [out, in] of a weight or its codes, and `table` is a vector."""
    if len(shape) != 2 or scales.shape != shape or table.ndim != 1:
        raise ValueError(f"scales {list(scales.shape)} and a table {list(table.shape)} for {list(shape)}")


def _described(scales: Tensor, table: Tensor) -> Any:
    return ctypes.byref(_Table(*scales.shape, len(table), _at(scales), _at(table)))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, *arguments: Any) -> None:
    lib = library.load()
    if getattr(lib, name)(library.pool().handle, *arguments):
        raise ValueError(library.last_error(lib))
