"""Two residual sign stages in reals: the control for Fairy2i's complex ones, at the same bits. Paper: arXiv 2511.21736.

    q = a_i sign(W_ij) + b_i sign(W_ij - a_i sign(W_ij))

The scales a and b of a row are trained. They start at least squares, alternating with the signs.

Codes uint8 [out, in], 2 if W < 0, plus 1 if what the first stage leaves is below 0; scales fp16 [out, 2], a and b.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantLinear, QuantMethod
from wrinklefree.core.row_scales import RowScaledLinear

ROUNDS = 10  # of alternating least squares
SMALLEST = 1e-5
RIDGE = 1e-6  # keeps the 2 x 2 systems solvable if both stages have the same signs in a row


def codes_of(weight: Tensor, scales: Tensor) -> Tensor:
    """The signs of both stages of a weight [out, columns] as codes 0 to 3, uint8, given scales [out, 2]."""
    first = weight < 0
    left = weight - scales[:, :1] * (1 - 2 * first.float())
    return 2 * first.to(torch.uint8) + (left < 0).to(torch.uint8)


def signs(index: Tensor) -> Tensor:
    """Both stages' signs of codes [out, columns], fp32 [out, 2, columns]."""
    return torch.stack([1 - 2 * (index >> 1).float(), 1 - 2 * (index & 1).float()], dim=1)


def fitted(weight: Tensor, importance: Tensor) -> Tensor:
    """Least-squares scales [out, 2] of a weight [out, in], alternating with its codes; `importance` is [in]."""
    first = weight.abs().mean(1, keepdim=True)
    second = (weight.abs() - first).abs().mean(1, keepdim=True)
    scales = torch.cat([first, second], dim=1).clamp_min(SMALLEST)
    for _ in range(ROUNDS):
        stages = signs(codes_of(weight, scales))
        weighted = stages * importance
        gram = weighted @ stages.mT + RIDGE * importance.sum() * torch.eye(2, device=weight.device)
        scales = torch.linalg.solve(gram, weighted @ weight.unsqueeze(2)).squeeze(2).clamp_min(SMALLEST)
    return scales


class ResidualSignsLinear(RowScaledLinear):
    """A linear layer with two signs per weight and two trained scales per row."""

    num_scales = 2
    codes_of, fitted = staticmethod(codes_of), staticmethod(fitted)

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        return (signs(codes.index) * codes.tensors["scales"].float().unsqueeze(2)).sum(1)


@dataclass(kw_only=True)
class Config(QuantMethod):
    """No settings but `exclude_names`."""

    layer: ClassVar[type[QuantLinear]] = ResidualSignsLinear

    name: Literal["residual_signs"] = "residual_signs"

    @property
    def weight_bits(self) -> float:
        return 2.0
