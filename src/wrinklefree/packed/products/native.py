"""Matrices of the native library (`native/wf.h`), their products, and the product of a packed layer.

Tensors must be on the CPU. The library copies weights. If it refuses a call, its reason is raised as a ValueError of
one line. `core/library.py` loads the library and says why it cannot be used.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core import library
from wrinklefree.core.forms import Complex, Form, Integers, Table
from wrinklefree.core.inputs import compute_dtype
from wrinklefree.core.library import Pool
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.products.coded import with_bias

MOST_MATRICES = 8  # the most matrices that one call multiplies
INT8, EXACT = 0, 1  # round activations to int8 per token, or leave them in fp32

_pointer = ctypes.c_void_p


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", dtype).contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Matrix:
    """A linear layer [n, k] in the library's memory. `native/wf.h` says what each kind computes."""

    def __init__(self, handle: int | None, shape: tuple[int, int]) -> None:
        self.handle = library.checked(handle)
        self.shape = shape
        self._free = library.load().wf_matrix_free

    def __del__(self) -> None:
        if "handle" in vars(self) and "_free" in vars(self):
            self._free(self.handle)

    @classmethod
    def table(
        cls,
        codes: Tensor,
        table: Tensor,
        scales: Tensor,
        *,
        row: Tensor | None = None,
        col: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> "Matrix":
        """The matrix row * (table[codes] * scales) * col, with r pairs of row and col summed.

        codes uint8 [n, k]; table [2**bits]; scales [1 or n, groups]; row [n] or [r, n]; col [k] or [r, k].
        """
        n, k = codes.shape
        rank = 1 if col is None or col.ndim == 1 else len(col)
        bits = (len(table) - 1).bit_length()
        if len(table) != 2**bits:
            raise ValueError(f"table: {len(table)} entries, not a power of 2")
        factors = _factors(n, k, row, col, bias, rank)
        index, entries, grid = _as(codes, torch.uint8), _as(table, torch.float32), _as(scales, torch.float32)
        rows, groups = scales.shape
        handle = library.load().wf_matrix_table(
            n, k, bits, _at(index), _at(entries), _at(grid), rows, groups, rank, *map(_at, factors)
        )
        return cls(handle, (n, k))

    @classmethod
    def complex(
        cls,
        codes: Tensor,
        scales: Tensor,
        *,
        row: Tensor | None = None,
        col: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> "Matrix":
        """The real matrix of complex codes, times row [n] and col [k].

        codes uint8 [2 (U, W), T, n / 2, k / 2]; scales [2, T, 2 (re, im), 1 or n / 2, groups].
        """
        two, stages, half_n, half_k = codes.shape
        if two != 2 or scales.ndim != 5 or scales.shape[:3] != (2, stages, 2):
            raise ValueError(f"codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together")
        n, k = 2 * half_n, 2 * half_k
        factors = _factors(n, k, row, col, bias)
        index, grid = _as(codes, torch.uint8), _as(scales, torch.float32)
        rows, groups = scales.shape[3:]
        handle = library.load().wf_matrix_complex(n, k, stages, _at(index), _at(grid), rows, groups, *map(_at, factors))
        return cls(handle, (n, k))

    @classmethod
    def int8(cls, weight: Tensor, row: Tensor, bias: Tensor | None = None) -> "Matrix":
        """The matrix of a weight int8 [n, k], each row times its factor in `row` [n]."""
        n, k = weight.shape
        factor, _, offset = _factors(n, k, row, None, bias)
        entries = _as(weight, torch.int8)
        return cls(library.load().wf_matrix_int8(n, k, _at(entries), _at(factor), _at(offset)), (n, k))

    @classmethod
    def dense(cls, weight: Tensor, bias: Tensor | None = None, exact: bool = False) -> "Matrix":
        """The matrix of a weight [n, k], stored as bf16, or as fp32 if `exact`."""
        n, k = weight.shape
        _, _, offset = _factors(n, k, None, None, bias)
        entries = _as(weight, torch.float32)
        return cls(library.load().wf_matrix_dense(n, k, _at(entries), _at(offset), int(exact)), (n, k))

    @property
    def kernel(self) -> str:
        """The name of the kernel that multiplies this matrix."""
        return str(library.load().wf_matrix_kernel(self.handle).decode())

    @property
    def nbytes(self) -> int:
        """The memory that the matrix takes, in bytes."""
        return int(library.load().wf_matrix_bytes(self.handle))

    def row(self, n: int) -> Tensor:
        """Row n of the dense weight: fp32 [k]."""
        out = torch.empty(self.shape[1])
        if library.load().wf_matrix_row(self.handle, n, out.data_ptr()):
            raise ValueError(library.last_error(library.load()))
        return out


def _factors(
    n: int, k: int, row: Tensor | None, col: Tensor | None, bias: Tensor | None, rank: int = 1
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Row, col and bias as contiguous fp32 tensors. Raises ValueError if one has the wrong shape."""
    many = [] if rank == 1 else [rank]
    for name, tensor, shape in (("row", row, [*many, n]), ("col", col, [*many, k]), ("bias", bias, [n])):
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name}: {list(tensor.shape)}, not {shape}")
    return _as(row, torch.float32), _as(col, torch.float32), _as(bias, torch.float32)


_few = [_pointer * count for count in range(MOST_MATRICES + 1)]  # array types, made once: making one takes long


def matmul(matrices: Sequence[Matrix], x: Tensor, mode: int = INT8, threads: Pool | None = None) -> list[Tensor]:
    """Multiply `x` [..., k] with up to `MOST_MATRICES` matrices: one fp32 tensor [..., n_i] per matrix.

    `x` is rounded once for all of them. Raises ValueError if widths differ.
    """
    # A model calls this hundreds of times per token, so it does as little in Python as it can.
    if x.shape[-1] != matrices[0].shape[1]:  # the library checks that the other matrices are as wide as the first
        raise ValueError(f"x {list(x.shape)} does not fit a matrix {list(matrices[0].shape)}")
    x = (x if x.dtype == torch.float32 else x.float()).contiguous()
    shape, count = x.shape[:-1], len(matrices)
    outs = [x.new_empty((*shape, matrix.shape[0])) for matrix in matrices]
    handles = _few[count](*[matrix.handle for matrix in matrices])
    targets = _few[count](*[out.data_ptr() for out in outs])
    batch, owner = x.numel() // x.shape[-1], library.pool() if threads is None else threads
    if batch and library.load().wf_matmul(owner.handle, handles, count, x.data_ptr(), batch, targets, mode):
        raise ValueError(library.last_error(library.load()))
    return outs


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean x^2 + eps) * weight in fp32: x [..., k], weight [k]. Raises ValueError if widths differ."""
    x, k = x.contiguous(), x.shape[-1]
    if weight.shape != (k,):
        raise ValueError(f"x {list(x.shape)} does not fit a weight {list(weight.shape)}")
    y, batch = torch.empty_like(x), x.numel() // k
    if batch and library.load().wf_norm(x.data_ptr(), weight.data_ptr(), eps, batch, k, y.data_ptr()):
        raise ValueError(library.last_error(library.load()))
    return y


def matrix(form: Form, bias: Tensor | None = None) -> Matrix:
    """Copy `form` into a matrix of the library. It is as wide as the form, which may be padded."""
    if isinstance(form, Integers):
        return Matrix.int8(form.weight, form.row, bias)
    if isinstance(form, Complex):
        return Matrix.complex(form.index, form.scales, row=form.row, col=form.col, bias=bias)
    assert isinstance(form, Table)
    return Matrix.table(form.index, form.table, form.scales, row=form.row, col=form.col, bias=bias)


@dataclass(frozen=True)
class NativeProduct:
    """Multiplies a packed layer by the native kernels, which have a copy of its codes and round inputs to int8."""

    matrix: Matrix
    shape: tuple[int, int]  # of the layer; the matrix may be padded
    rounds_inputs: bool  # whether the kernels round x itself; with factors of columns they round col * x

    def __call__(self, layer: PackedLinear, x: Tensor) -> Tensor:
        return self._uncompiled(layer, x) if torch.compiler.is_compiling() else self._multiply(layer, x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(self, layer: PackedLinear, x: Tensor) -> Tensor:
        return self._multiply(layer, x)

    def _multiply(self, layer: PackedLinear, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._multiply(layer, x)
        dtype = compute_dtype(x)
        x = layer.inputs(x, rounded=not self.rounds_inputs)
        if not self.padded:
            return with_bias(layer, matmul([self.matrix], x)[0], dtype)
        y = matmul([self.matrix], F.pad(x, (0, self.matrix.shape[1] - self.shape[1])))[0]
        return with_bias(layer, y[..., : self.shape[0]], dtype)

    @property
    def padded(self) -> bool:
        """Whether the matrix is larger than the layer."""
        return self.matrix.shape != self.shape

    def takes_inputs_of(self, layer: PackedLinear) -> bool:
        """Whether the matrix can multiply the layer's inputs as they are: without anything done to them first."""
        rounds_as_trained = self.rounds_inputs or not layer.method.int8_inputs
        return rounds_as_trained and layer.rms_norm is None and not layer.spec.rotated and not self.padded


def product(form: Form, shape: tuple[int, int]) -> NativeProduct:
    """The product for a layer of this shape [out, in] with the weight `form`."""
    return NativeProduct(matrix(form), shape, isinstance(form, Integers) or form.col is None)
