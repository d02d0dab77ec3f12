"""What a quantized layer may do to its inputs: normalize them, rotate them, and round them to int8.

Rotation spreads what a few large channels hold over many (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456). The
weight turns with the inputs, so that their product stays what it was:

    W x = (W R^T)(R x)      R = H D

D [in, in] is diagonal with signs, and H has an orthogonal Hadamard matrix for every `rotation_block` columns.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class PlainRMSNorm(nn.Module):
    """Compute x g / sqrt(mean(x^2) + eps) in fp32, g [features]. Parameter names are those of transformers' Llama."""

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain)
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * inverse_rms(x, self.variance_epsilon) * self.weight).to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Compute 1 / sqrt(mean(x^2) + eps) over the last dimension: fp32 [..., 1]."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)  # same order as transformers: same bits


LARGEST_BLOCK = 256
# The sign of column i is a bit of this product: it looks random, and the native decoder computes the same.
SIGN_FACTOR, SIGN_BIT = 2654435761, 13


def rotation_block(width: int) -> int:
    """How many columns a Hadamard matrix mixes: the largest power of 4 up to 256 that divides `width`.

    Its entries are then plus and minus a power of two, which every floating-point type holds exactly.
    """
    block = LARGEST_BLOCK
    while width % block:
        block //= 4
    return block


def _rotation(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The signs D [width], and the Hadamard matrix [block, block]."""
    columns = torch.arange(width, dtype=torch.int64)
    signs = 1 - 2 * (columns * SIGN_FACTOR >> SIGN_BIT & 1)
    size, matrix = rotation_block(width), torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return signs.to(device, dtype), (matrix / size**0.5).to(device, dtype)


_kept_rotation = cache(_rotation)


def rotation(x: Tensor) -> tuple[Tensor, Tensor]:
    """The signs D [in], and the Hadamard matrix [block, block], for x [..., in]."""
    make = _rotation if torch.compiler.is_compiling() else _kept_rotation  # a compiler folds what is constant
    return make(x.shape[-1], x.dtype, x.device)


def rotated(x: Tensor) -> Tensor:
    """Compute R x over the last dimension: [..., in]."""
    signs, matrix = rotation(x)
    return ((x * signs).unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def int8_per_token(x: Tensor) -> Tensor:
    """Round `x` [..., features] to 8 bits with one scale per token; shape and dtype stay.

    q = clamp(round(s x), -128, 127) with s = 127 / max|x|; the result is q / s. Computed in fp32, in the order of
    transformers' BitNet layers, so both round alike. The gradient passes through unchanged.
    """
    rounded: Tensor = _Int8.apply(x)
    return rounded


class _Int8(torch.autograd.Function):
    """Rounding forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = 127 / x.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-5)
        return ((x.float() * scale).round().clamp(-128, 127) / scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with `x`: autocast's if autocast is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
