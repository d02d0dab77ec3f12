"""Straight-through estimators: the forward pass uses the quantized value, the backward pass skips the rounding."""

from typing import Any

import torch
from torch import Tensor


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """Return the value of `y`, and send the gradient to `x`. It also goes to `y` if `y` has trained parameters."""
    replaced: Tensor = _Replaced.apply(x, y)  # equals y + (x - x.detach()) without three passes over the values
    return replaced


class _Replaced(torch.autograd.Function):
    """Return `y` forward; pass the gradient to both unchanged backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def round_fp16(x: Tensor) -> Tensor:
    """Round `x` to the nearest finite fp16 number, and keep its dtype. The gradient passes through unchanged."""
    limit = torch.finfo(torch.float16).max
    rounded = x.detach().clamp(-limit, limit).to(torch.float16).to(x.dtype)
    return straight_through(x, rounded)
