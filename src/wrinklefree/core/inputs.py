"""What a quantized layer does to its inputs: it may normalize them, and round them to int8."""

from typing import Any

import torch
from torch import Tensor, nn


class PlainRMSNorm(nn.Module):
    """x g / sqrt(mean(x^2) + eps) with the gain g [features], in fp32: names and arithmetic of transformers' Llama."""

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain)
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * inverse_rms(x, self.variance_epsilon) * self.weight).to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps): fp32 [..., 1]."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)  # the order of transformers, to the bit


def int8_per_token(x: Tensor) -> Tensor:
    """Symmetric 8-bit fake quantization with one scale per token: [..., features] -> the same shape and dtype.

    q = clamp(round(s x), -128, 127) with s = 127 / max|x|, returned as q / s. The order of operations is that of
    transformers' BitNet layers, so both round alike. Arithmetic in fp32, identity gradient.
    """
    rounded: Tensor = _Int8.apply(x)
    return rounded


class _Int8(torch.autograd.Function):
    """The gradient passes through the rounding unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = 127 / x.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-5)
        return ((x.float() * scale).round().clamp(-128, 127) / scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if on, or else `x` itself will be multiplied."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
