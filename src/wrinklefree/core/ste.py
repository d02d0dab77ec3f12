"""Straight-through estimators: the exact quantized value forward, a chosen gradient backward."""

from typing import Any

import torch
from torch import Tensor


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """The value of `y`, the gradient of `x` (and of `y`, where `y` depends on trained parameters).

    Written as `y + (x - x.detach())` because the other order does not return exactly `y` in low precision.
    """
    if not y.requires_grad:
        return _Replaced.apply(x, y)  # the same, without three passes over the values
    return y + (x - x.detach())


class _Replaced(torch.autograd.Function):
    """Forward `y` in place of `x`, backward the gradient unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_fp16(x: Tensor) -> Tensor:
    """Nearest finite half-precision number of `x`, in the dtype of `x`; identity gradient."""
    limit = torch.finfo(torch.float16).max
    rounded = x.detach().clamp(-limit, limit).to(torch.float16).to(x.dtype)
    return straight_through(x, rounded)


def int8_per_token(x: Tensor) -> Tensor:
    """Symmetric 8-bit fake quantization with one scale per token: [..., features] -> the same shape and dtype.

    q = clamp(round(s x), -128, 127) with s = 127 / max|x|, returned as q / s: the order of operations is that of
    transformers' BitNet layers, so that both round alike. Arithmetic in fp32, identity gradient.
    """
    x32 = x.detach().float()
    scale = 127 / x32.abs().amax(dim=-1, keepdim=True).clamp_min(1e-5)
    quantized = (x32 * scale).round().clamp(-128, 127) / scale
    return straight_through(x, quantized.to(x.dtype))
