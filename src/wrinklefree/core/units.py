"""Codes k for the four units i^k, and the real weight that scaled sums of them stand for (methods/fairy2.py)."""

import torch
from torch import Tensor


def spread(scales: Tensor, n: int, m: int) -> Tensor:
    """Scales [..., R, G] in a shape that broadcasts with [..., n, m]."""
    groups = scales.shape[-1]
    return scales if groups == 1 else scales.repeat_interleave(m // groups, dim=-1)


def units(index: Tensor) -> tuple[Tensor, Tensor]:
    """Codes k -> Re(i^k), Im(i^k), as fp32."""
    sign = 1.0 - (index & 2).float()
    imaginary = (index & 1).float()
    return sign * (1 - imaginary), sign * imaginary


def entries(index: Tensor, scales: Tensor) -> Tensor:
    """The real weight R [2n, 2m] of codes [2 (U, W), T, n, m] and scales [2, T, 2 (re, im), R, G], fp32.

    One formula for each entry, which a compiler can put where it is used: R is never written. Codes are seen from each
    quadrant of R; both axes are worked out there, and one of them is taken.

        R = [[Re U + Re W, Im W - Im U], [Im U + Im W, Re U - Re W]]
    """
    seen = index[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # [2, T, 2 (half of rows), n, 2 (of columns), m]
    wide = spread(scales, *index.shape[-2:])[:, :, :, None, :, None]  # [2, T, 2 (axis), 1, R, 1, m or 1]
    axes = []
    for part in range(2):
        terms = [units(seen[part, t]) for t in range(index.shape[1])]
        for axis in range(2):
            scaled = [unit[axis] * wide[part, t, axis] for t, unit in enumerate(terms)]
            axes.append(sum(scaled[1:], scaled[0]))
    U_re, U_im, W_re, W_im = axes
    half = torch.arange(2, device=index.device)
    sign = (1 - 2 * half).view(2, 1, 1, 1)  # of the half of rows
    diagonal = half.view(2, 1, 1, 1) == half.view(2, 1)
    return torch.where(diagonal, U_re + sign * W_re, W_im - sign * U_im).flatten(2).flatten(0, 1)
