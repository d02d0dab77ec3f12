"""Reading Fairy2i's codes: sums of scaled units i^k for U and W, and the real weight of U z + W conj(z).

Symbols and shapes are those of the method: codes [2 (U, W), T, n, m], scales [2, T, 2 (re, im), R, G], Z [2, 2, n, m].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wrinklefree.core.codes import Codes


def units(index: Tensor) -> tuple[Tensor, Tensor]:
    """Codes k -> Re(i^k), Im(i^k), as fp32."""
    sign = 1.0 - (index & 2).float()
    imaginary = (index & 1).float()
    return sign * (1 - imaginary), sign * imaginary


def spread(scales: Tensor, n: int, m: int) -> Tensor:
    """Scales [..., R, G] in a shape that broadcasts with [..., n, m]."""
    groups = scales.shape[-1]
    return scales if groups == 1 else scales.repeat_interleave(m // groups, dim=-1)


def dequantized(index: Tensor, scales: Tensor) -> Tensor:
    """Codes and scales -> Z."""
    wide = spread(scales, *index.shape[-2:])
    Z = torch.zeros(2, 2, *index.shape[-2:], device=index.device)
    for t in range(index.shape[1]):
        for axis, unit in enumerate(units(index[:, t])):
            Z[:, axis].addcmul_(unit, wide[:, t, axis])
    return Z


def to_real(Z: Tensor) -> Tensor:
    """Z [2 (U, W), 2 (re, im), n, m] -> the real matrix [2n, 2m]."""
    (U_re, U_im), (W_re, W_im) = Z
    top = torch.cat([U_re + W_re, W_im - U_im], dim=1)
    return torch.cat([top, torch.cat([U_im + W_im, U_re - W_re], dim=1)], dim=0)


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Factors of complex rows [n] and columns [m] -> factors of the real weight's entries [2n, 2m]."""
    return rows.repeat(2).unsqueeze(1) * columns.repeat(2)


def decode(codes: Codes) -> Tensor:
    """The fp32 weight [out, in]."""
    return finished(codes, to_real(dequantized(codes.index, codes.tensors["scales"].float())))


def finished(codes: Codes, weight: Tensor) -> Tensor:
    """The real matrix of codes and scales, with the factors of its rows and columns, and without padding."""
    if "rows" in codes.tensors:
        weight = weight * outer(codes.tensors["rows"].float(), codes.tensors["columns"].float())
    return weight[: codes.shape[0], : codes.shape[1]]


def int8_inputs(settings: Mapping[str, Any]) -> bool:
    """Whether layers with these settings round their inputs to int8 per token."""
    return settings["activation_bits"] is not None
