"""Decode Fairy2i's codes with one formula per entry, for torch.compile: the weight is never written to memory."""

import torch
from torch import Tensor

from wrinklefree.methods.fairy2.decode import spread, units


def entries(index: Tensor, scales: Tensor) -> Tensor:
    """Decode codes [2 (U, W), T, n, m] and scales [2, T, 2 (re, im), R, G] to the real weight, fp32 [2n, 2m]:

    R = [[Re U + Re W, Im W - Im U], [Im U + Im W, Re U - Re W]]
    """
    # Each quadrant of R sees all codes, computes both axes and takes one. So an entry depends only on its own indices,
    # and the compiler can compute it inside the loop that uses it.
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
    sign = (1 - 2 * half).view(2, 1, 1, 1)  # 1 in the upper half of the rows, -1 in the lower
    diagonal = half.view(2, 1, 1, 1) == half.view(2, 1)
    return torch.where(diagonal, U_re + sign * W_re, W_im - sign * U_im).flatten(2).flatten(0, 1)
