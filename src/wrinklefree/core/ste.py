"""Straight-through estimators: the exact quantized value forward, a chosen gradient backward."""

import torch
from torch import Tensor


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """The value of `y`, the gradient of `x` (and of `y`, where `y` depends on trained parameters).

    Written as `y + (x - x.detach())` because the other order does not return exactly `y` in low precision.
    """
    return y + (x - x.detach())


def round_fp16(x: Tensor) -> Tensor:
    """Nearest finite half-precision number of `x`, in the dtype of `x`; identity gradient."""
    limit = torch.finfo(torch.float16).max
    rounded = x.detach().clamp(-limit, limit).to(torch.float16).to(x.dtype)
    return straight_through(x, rounded)


def int8_per_token(x: Tensor) -> Tensor:
    """Symmetric 8-bit fake quantization with one scale per token: [..., features] -> the same shape and dtype.

    q = clamp(round(127 x / max|x|), -127, 127), returned as q max|x| / 127. Arithmetic in fp32, identity gradient.
    """
    x32 = x.detach().float()
    scale = x32.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 127
    quantized = (x32 / scale).round().clamp(-127, 127) * scale
    return straight_through(x, quantized.to(x.dtype))
