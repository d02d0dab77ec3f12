"""SEQ, stretched elastic quantization: four evenly spaced levels and no zero. Paper: arXiv 2502.02631 (ParetoQ).

    q = s_i l(W_ij / s_i)        l(v) = clip(round(v - 1/2) + 1/2, -3/2, 3/2)        levels -1.5, -0.5, 0.5, 1.5

The scale of a row is trained as in LSQ (arXiv 1902.08153): with v = W / s,

    dq/dW = 1 if |v| <= 2, else 0        dq/ds = l(v) - v if |v| <= 2, else l(v)

It starts at the least-squares scale, as our own methods' do; the paper starts at the row's largest weight.

Codes uint8 [out, in], l + 3/2; scales fp16 [out, 1].
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wrinklefree.core.codes import Codes
from wrinklefree.core.forms import Table
from wrinklefree.core.method import QuantLinear, QuantMethod
from wrinklefree.core.row_scales import RowScaledLinear

LEVELS = (-1.5, -0.5, 0.5, 1.5)
EDGE = 2.0  # beyond it the nearest level does not move with the weight
ROUNDS = 10  # of alternating least squares
SMALLEST = 1e-5


def codes_of(weight: Tensor, scales: Tensor) -> Tensor:
    """Round a weight [out, columns] to codes 0 to 3, uint8, given scales [out, 1]."""
    return ((weight / scales).floor() + 2).clamp(0, 3).to(torch.uint8)


def fitted(weight: Tensor, importance: Tensor) -> Tensor:
    """Least-squares scales [out, 1] of a weight [out, in], alternating with its codes; `importance` is [in]."""
    scales = weight.abs().mean(1, keepdim=True).clamp_min(SMALLEST)
    for _ in range(ROUNDS):
        levels = codes_of(weight, scales).float() - 1.5
        moments = (weight * levels * importance).sum(1, keepdim=True)
        scales = (moments / (levels.square() * importance).sum(1, keepdim=True)).clamp_min(SMALLEST)
    return scales


class SeqLinear(RowScaledLinear):
    """A linear layer with four levels per weight and a trained scale per row."""

    num_scales = 1
    codes_of, fitted = staticmethod(codes_of), staticmethod(fitted)

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        return codes.tensors["scales"].float() * (codes.index.float() - 1.5)

    @staticmethod
    def form(codes: Codes) -> Table:
        return Table(codes.index, torch.tensor(LEVELS), codes.tensors["scales"])

    def quantized_weight(self) -> Tensor:
        codes = self.encode()
        scales, levels = codes.tensors["scales"], codes.index.float() - 1.5
        clipped = (self.weight / scales).clamp(-EDGE, EDGE)
        return scales * (levels + (clipped - clipped.detach()))  # in this order the value is exactly decode()'s


@dataclass(kw_only=True)
class Config(QuantMethod):
    """No settings but `exclude_names`."""

    layer: ClassVar[type[QuantLinear]] = SeqLinear

    name: Literal["seq"] = "seq"

    @property
    def weight_bits(self) -> float:
        return 2.0
