"""Round scales to small integers times one unit, because the fast kernels have tables of bytes."""

import torch
from torch import Tensor

MOST = 127  # the most that the scales of one axis may add up to, in units: the largest int8
PASS = 2  # how many stages a kernel computes at once


def snapped(scales: Tensor) -> Tensor:
    """Move complex scales [2, T, 2 (axis), R, G] to the grid with the least squared error.

    Every row, group and pair of stages has a grid of its own: the multiples of one unit. A unit has 4 binary digits,
    of which there are 8 per octave, and a multiple has 7. So each product has 11 and is exactly an fp16 number.
    """
    return torch.cat([_nearest_grid(part) for part in scales.split(PASS, dim=1)], dim=1)


def _nearest_grid(scales: Tensor) -> Tensor:
    reach = scales.sum((0, 1)).amax(0)  # [R, G]
    best, least = scales, torch.full_like(reach, torch.inf)
    for digits in range(8, 16):
        room = digits * (MOST - 2)  # four terms are summed, and each may be rounded up by a half
        unit = digits * torch.exp2((reach / room).log2().ceil())
        moved = (scales / unit).round().clamp_min(1) * unit
        error = (moved - scales).square().sum((0, 1, 2))
        best = torch.where(error < least, moved, best)
        least = torch.minimum(error, least)
    return best
