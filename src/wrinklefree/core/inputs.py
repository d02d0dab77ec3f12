"""What a quantized layer may do to its inputs, besides rotation.py: normalize them, and round them to int8."""

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
