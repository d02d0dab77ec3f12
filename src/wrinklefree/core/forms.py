"""How a method's codes look to the native kernels: its `QuantLinear.form` returns one of these.

    y = row * (V (col * x))        V [n, k] given by codes; row [n] and col [k] may be left out

A table may have several pairs of them, row [r, n] and col [r, k], whose results add up.

Kernels know these forms and no method; a method whose layers have none of them is served by its decoded weight.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from wrinklefree.core.codes import look_up

MAX_RANK = 8  # pairs of row and col
MAX_PRODUCTS = 8  # integer products for a weight of codes, above which a weight of bytes is read sooner


@dataclass(frozen=True)
class Table:
    """V = table[index] * scales: one scale for each row, or for all, and group of columns."""

    index: Tensor  # uint8 [n, k]
    table: Tensor  # fp32 [2**bits], bits 1 to 4
    scales: Tensor  # fp32 [1 or n, groups]
    row: Tensor | None = None  # [n], or [r, n], 2 to MAX_RANK of them
    col: Tensor | None = None  # [k], or [r, k]

    @property
    def rank(self) -> int:
        """Pairs of row and col."""
        return 1 if self.col is None or self.col.ndim == 1 else len(self.col)


@dataclass(frozen=True)
class Complex:
    """V is the real form of U x + W conj(x), entries sums of i^code times scales of each axis (arXiv 2512.02901)."""

    index: Tensor  # uint8 [2 (U, W), T, n / 2, k / 2]
    scales: Tensor  # fp32 [2, T, 2 (re, im), 1 or n / 2, groups]
    row: Tensor | None = None
    col: Tensor | None = None


@dataclass(frozen=True)
class Integers:
    """V is a weight of bytes."""

    weight: Tensor  # int8 [n, k]
    row: Tensor  # fp32


Form: TypeAlias = Table | Complex | Integers


def rounded(weight: Tensor) -> Integers:
    """A weight [n, k] as bytes, a scale for each row: what a product of tables and many scales is folded into.

    The error of an entry is at most 1/254 of its row's largest.
    """
    scales = weight.abs().amax(1) / 127
    integers = (weight / scales.clamp_min(1e-30).unsqueeze(1)).round()
    return Integers(integers.to(torch.int8), scales)


def low_rank(index: Tensor, table: Tensor, a: Tensor, b: Tensor) -> Form:
    """V = table[index] * (a @ b): a [n, r], b [r, k].

    One rank is a factor of each row and one of each column; of few, each is one more product with the same codes, read
    once for all. Many would take longer than reading a weight of bytes does, and are folded into one.
    """
    if len(b) == 1:
        return Table(index, table, torch.ones(1, 1), a.flatten(), b.flatten())
    if len(b) * products(table) <= MAX_PRODUCTS:
        return Table(index, table, torch.ones(1, 1), a.T.contiguous(), b)
    return rounded(look_up(table, index) * (a @ b))


def products(table: Tensor) -> int:
    """Integer products that a weight of a table takes: one for up to 4 even steps, else one for each of two bytes."""
    steps = table.diff()
    even = torch.allclose(steps, steps.mean(), rtol=1e-3, atol=0)
    return 1 if len(table) <= 4 and even else 2
