"""Scales as small integers times one unit, for kernels whose tables hold bytes."""

import torch
from torch import Tensor

MOST = 127  # what the scales of one axis may add up to, in units
PASS = 2  # stages that a kernel takes at once


def snapped(scales: Tensor) -> Tensor:
    """Complex scales [2, T, 2 (axis), R, G] moved to the nearest grid, one for each row, group and two stages.

    Units have 4 binary digits and integers 7, so that their products are fp16 numbers: of 8 units to an octave the one
    with the least squared error is taken.
    """
    return torch.cat([_nearest_grid(part) for part in scales.split(PASS, dim=1)], dim=1)


def _nearest_grid(scales: Tensor) -> Tensor:
    reach = scales.sum((0, 1)).amax(0)  # [R, G]
    best, least = scales, torch.full_like(reach, torch.inf)
    for digits in range(8, 16):
        room = digits * (MOST - 2)  # four terms, each rounded by a half at most
        unit = digits * torch.exp2((reach / room).log2().ceil())
        moved = (scales / unit).round().clamp_min(1) * unit
        error = (moved - scales).square().sum((0, 1, 2))
        best = torch.where(error < least, moved, best)
        least = torch.minimum(error, least)
    return best
