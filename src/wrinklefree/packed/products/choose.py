"""A packed layer's product: by native kernels on a CPU, from their own copy of the codes in the method's form; on a GPU
from the codes as they lie in the layer's buffer.
"""

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.codes import Codes
from wrinklefree.core.forms import Complex, Form, Integers, Table
from wrinklefree.packed.products.native import Matrix, available, matmul

log = logging.getLogger("wrinklefree")


@dataclass(frozen=True)
class Product:
    """y = V x for one layer, activations rounded to int8 per token."""

    matrix: Matrix
    shape: tuple[int, int]  # of the layer; the matrix may be padded
    rounds_inputs: bool  # the rounding is that of x itself, not of x times a factor of each column

    @property
    def padded(self) -> bool:
        return self.matrix.shape != self.shape

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] on the CPU -> fp32 [..., out]."""
        if not self.padded:
            return matmul([self.matrix], x)[0]
        y = matmul([self.matrix], F.pad(x, (0, self.matrix.shape[1] - self.shape[1])))[0]
        return y[..., : self.shape[0]]


def product(form: Form, codes: Codes) -> Product:
    """The kernels' copy of a layer that has `form`."""
    rounds_inputs = isinstance(form, Integers) or form.col is None
    return Product(matrix(form), codes.shape, rounds_inputs)


def matrix(form: Form, bias: Tensor | None = None) -> Matrix:
    """`form` in the kernels' memory; widths are the form's, which may be padded."""
    if isinstance(form, Integers):
        return Matrix.int8(form.weight, form.row, bias)
    if isinstance(form, Complex):
        return Matrix.complex(form.index, form.scales, row=form.row, col=form.col, bias=bias)
    assert isinstance(form, Table)
    return Matrix.table(form.index, form.table, form.scales, row=form.row, col=form.col, bias=bias)


@cache
def usable() -> bool:
    """Whether there are kernels; says so once where there are none."""
    reason = available()
    if reason is not None:
        log.warning("packed layers multiply with decoded weights, many times slower: %s", reason)
    return reason is None


@dataclass(frozen=True)
class GpuProduct:
    """y = V x for few tokens on a GPU; all but the codes, in fp32 on the device."""

    programs: ModuleType  # packed/gpu.py
    bits: int
    table: Tensor | None  # None: the codes are complex ones
    scales: Tensor
    row: Tensor | None
    col: Tensor | None

    def __call__(self, weight: Tensor, x: Tensor) -> Tensor:
        """The layer's packed `weight` and x [..., in] -> fp32 [..., out]."""
        z = x.float().flatten(0, -2)
        z = z.contiguous() if self.col is None else z * self.col
        if self.table is None:
            y: Tensor = self.programs.fairy_product(weight, self.scales, z)
        else:
            y = self.programs.table_product(weight, self.bits, self.table, self.scales, z)
        return (y if self.row is None else y * self.row).unflatten(0, x.shape[:-1])


@cache
def gpu_programs() -> ModuleType | None:
    """The Triton programs; None without Triton, and in a folder's own loader, which does not bring them."""
    there = all(importlib.util.find_spec(name) is not None for name in ("triton", "wrinklefree"))
    return importlib.import_module("wrinklefree.packed.products.triton") if there else None


def gpu_product(form: Form | None, codes: Codes, device: torch.device) -> GpuProduct | None:
    """None where the packed codes are not the form's own, or padded, or lie across bytes; or of several ranks."""
    programs = gpu_programs()
    if programs is None or codes.bits == 3 or not isinstance(form, (Table, Complex)) or form.index is not codes.index:
        return None
    if isinstance(form, Table) and form.rank > 1:
        return None
    whole = form.index.shape[-2:] if isinstance(form, Table) else [2 * size for size in form.index.shape[-2:]]
    if list(whole) != list(codes.shape):
        return None
    table = form.table if isinstance(form, Table) else None

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, torch.float32)

    scales = form.scales.to(device, torch.float32)
    return GpuProduct(programs, codes.bits, moved(table), scales, moved(form.row), moved(form.col))
