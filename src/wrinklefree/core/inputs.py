"""What a quantized layer does to its inputs: it may normalize them, and round them to int8."""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x g / sqrt(mean(x^2) + eps) over the last dimension, in fp32, returned in the dtype of x.

    `weight` is the gain g [features]; names and arithmetic are those of the norms in transformers' Llama.
    """

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain)
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = _Normed.apply(x, self.weight, self.variance_epsilon)
        return normed

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.variance_epsilon:g}"


def normalized(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), worked out in fp32: [..., features] -> the same shape and dtype."""
    return (x.float() * _inverse_rms(x, eps)).to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps): fp32 [..., 1]."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)  # the order of transformers, to the bit


class _Normed(torch.autograd.Function):
    """With u = x / rms: y = g u, dx = (g dy - u mean(g dy u)) / rms, dg = sum dy u. In half of autograd's time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, gain, inverse)
        return (x.float() * inverse).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, inverse = ctx.saved_tensors
        x, grad = x.float(), grad.float()
        products = (grad * x).flatten(0, -2)
        towards_gain = inverse.flatten() @ products
        along = (products @ gain).view_as(inverse) * inverse**3 / x.shape[-1]
        return (grad * gain).mul_(inverse).addcmul_(x, along, value=-1).to(x.dtype), towards_gain, None


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
