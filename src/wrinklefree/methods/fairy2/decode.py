"""Decode Fairy2i's codes: sum scaled units i^k to Z (U and W), then build the real matrix of U z + W conj(z).

Shapes: codes [2 (U, W), T, n, m], scales [2 (U, W), T, 2 (re, im), R, G], Z [2 (U, W), 2 (re, im), n, m].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wrinklefree.core.codes import Codes


def units(index: Tensor) -> tuple[Tensor, Tensor]:
    """Return Re(i^k) and Im(i^k) for codes k, in fp32 and in the shape of `index`."""
    sign = 1.0 - (index & 2).float()
    imaginary = (index & 1).float()
    return sign * (1 - imaginary), sign * imaginary


def spread(scales: Tensor, n: int, m: int) -> Tensor:
    """Repeat scales [..., R, G] over their groups, so that they broadcast with [..., n, m]."""
    groups = scales.shape[-1]
    return scales if groups == 1 else scales.repeat_interleave(m // groups, dim=-1)


def dequantized(index: Tensor, scales: Tensor) -> Tensor:
    """Sum the scaled units of codes [2, T, n, m]: Z [2, 2, n, m]."""
    wide = spread(scales, *index.shape[-2:])
    Z = torch.zeros(2, 2, *index.shape[-2:], device=index.device)
    for t in range(index.shape[1]):
        for axis, unit in enumerate(units(index[:, t])):
            Z[:, axis].addcmul_(unit, wide[:, t, axis])
    return Z


def to_real(Z: Tensor) -> Tensor:
    """Build the real matrix [2n, 2m] of Z [2 (U, W), 2 (re, im), n, m]."""
    (U_re, U_im), (W_re, W_im) = Z
    top = torch.cat([U_re + W_re, W_im - U_im], dim=1)
    return torch.cat([top, torch.cat([U_im + W_im, U_re - W_re], dim=1)], dim=0)


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply factors of complex rows [n] and columns [m] to one factor per real weight: [2n, 2m]."""
    return rows.repeat(2).unsqueeze(1) * columns.repeat(2)


def decode(codes: Codes) -> Tensor:
    """Turn codes into the fp32 weight [out, in]."""
    return finished(codes, to_real(dequantized(codes.index, codes.tensors["scales"].float())))


def finished(codes: Codes, weight: Tensor) -> Tensor:
    """Apply the factors of rows and columns to a real matrix [2n, 2m], if there are any, and cut the padding off."""
    if "rows" in codes.tensors:
        weight = weight * outer(codes.tensors["rows"].float(), codes.tensors["columns"].float())
    return weight[: codes.shape[0], : codes.shape[1]]


def int8_inputs(settings: Mapping[str, Any]) -> bool:
    """Whether layers with these settings round their inputs to int8 per token."""
    return settings["activation_bits"] is not None
