"""Quantized layers as integers times scales, for formats that hold integers in blocks.

The codes decide whether a layer fits, not its method: its weight has to be integers times scales, with one scale per
matrix, per row, or per equal group of columns in a row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wrinklefree.core.forms import Form, Integers, Table
from wrinklefree.core.method import QuantLinear


@dataclass(frozen=True)
class Levels:
    """A layer with the weight scales x integers."""

    integers: Tensor  # int8 [out, in]
    scales: Tensor  # fp32 [out, groups], each an fp16 number

    @property
    def group(self) -> int:
        """How many columns share a scale."""
        return self.integers.shape[1] // self.scales.shape[1]

    def weight(self) -> Tensor:
        """Return the effective weight, fp32 [out, in]."""
        blocks = self.integers.float().unflatten(1, (self.scales.shape[1], -1))
        return (blocks * self.scales.unsqueeze(-1)).flatten(1)

    def scales_of(self, columns: int) -> Tensor:
        """Return one scale for each `columns` columns, which have to divide `group`: [out, in / columns]."""
        return self.scales.repeat_interleave(self.group // columns, dim=1)


def below_each_other(parts: Sequence[Levels]) -> Levels:
    """The rows of several layers of one width as one: they share a scale over as many columns as all of them do."""
    group = math.gcd(*(part.group for part in parts))
    scales = torch.cat([part.scales_of(group) for part in parts])
    return Levels(torch.cat([part.integers for part in parts]), scales)


@torch.no_grad()
def levels_of(layer: QuantLinear) -> Levels | None:
    """Return a layer as integers times scales, equal to its effective weight bit for bit, or None if it is none."""
    codes = layer.encode()
    weight = layer.decode(codes).cpu()
    for found in _candidates(layer.form(codes), weight):
        halves = found.scales.half().float()
        if torch.equal(halves, found.scales) and torch.equal(found.weight(), weight):
            return found
    return None


def _candidates(form: Form | None, weight: Tensor) -> Iterator[Levels]:
    rows = len(weight)
    if isinstance(form, Integers):
        yield Levels(form.weight.cpu(), form.row.float().cpu().unsqueeze(1))
    if isinstance(form, Table) and form.row is None and form.col is None:
        values = form.table.float().cpu()[form.index.cpu().long()]
        yield Levels(values.round().to(torch.int8), form.scales.float().cpu().expand(rows, -1))
    # A method without a form: one magnitude per row, and zeros.
    yield Levels(weight.sign().to(torch.int8), weight.abs().amax(1, keepdim=True))
