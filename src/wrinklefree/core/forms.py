"""The weight formats that the native kernels can multiply. `QuantLinear.form` returns one of them, or None.

    y = row * (V (col * x))        V [n, k] given by codes; row [n] and col [k] are optional

`Table` may have r pairs, row [r, n] and col [r, k]. Their results are summed.

Kernels know these formats and no method. If a method has none of them, its decoded weight is multiplied.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from wrinklefree.core.codes import look_up

MAX_RANK = 8  # most pairs of row and col
MAX_PRODUCTS = 8  # integer products per weight; with more of them, one byte per weight is read faster


@dataclass(frozen=True)
class Table:
    """V = table[index] * scales. Each group of columns has one scale per row, or one for all rows."""

    index: Tensor  # uint8 [n, k]
    table: Tensor  # fp32 [2**bits], bits 1 to 4
    scales: Tensor  # fp32 [1 or n, groups]
    row: Tensor | None = None  # [n], or [r, n] with r from 2 to MAX_RANK
    col: Tensor | None = None  # [k], or [r, k]

    @property
    def rank(self) -> int:
        """How many pairs of row and col there are."""
        return 1 if self.col is None or self.col.ndim == 1 else len(self.col)


@dataclass(frozen=True)
class Complex:
    """V is the real matrix of U x + W conj(x). Entries are sums of i^code times a scale per axis (arXiv 2512.02901)."""

    index: Tensor  # uint8 [2 (U, W), T, n / 2, k / 2]
    scales: Tensor  # fp32 [2, T, 2 (re, im), 1 or n / 2, groups]
    row: Tensor | None = None
    col: Tensor | None = None


@dataclass(frozen=True)
class Integers:
    """V is an int8 weight, with one factor per row."""

    weight: Tensor  # int8 [n, k]
    row: Tensor  # fp32


Form: TypeAlias = Table | Complex | Integers


def rounded(weight: Tensor) -> Integers:
    """Round a weight [n, k] to int8 with one scale per row.

    An entry is off by at most 1/254 of the largest entry in its row.
    """
    scales = weight.abs().amax(1) / 127
    integers = (weight / scales.clamp_min(1e-30).unsqueeze(1)).round()
    return Integers(integers.to(torch.int8), scales)


def low_rank(index: Tensor, table: Tensor, a: Tensor, b: Tensor) -> Form:
    """The fastest form of V = table[index] * (a @ b), with a [n, r] and b [r, k].

    With few ranks it is a `Table` with r pairs. With many it is decoded and rounded to `Integers`.
    """
    if len(b) == 1:
        return Table(index, table, torch.ones(1, 1), a.flatten(), b.flatten())
    if len(b) * products(table) <= MAX_PRODUCTS:  # the kernel reads the codes once for all ranks
        return Table(index, table, torch.ones(1, 1), a.T.contiguous(), b)
    return rounded(look_up(table, index) * (a @ b))


def products(table: Tensor) -> int:
    """How many integer products a kernel needs for one weight of this table: 1 or 2."""
    steps = table.diff()
    even = torch.allclose(steps, steps.mean(), rtol=1e-3, atol=0)
    # Up to four evenly spaced entries are integers times one unit. Other entries are split into two bytes.
    return 1 if len(table) <= 4 and even else 2
