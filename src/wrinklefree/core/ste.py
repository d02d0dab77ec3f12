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
