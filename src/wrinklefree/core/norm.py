"""RMSNorm for training: PyTorch's autograd is replaced by a hand-written backward pass."""

from typing import Any

import torch
from torch import Tensor

from wrinklefree.core.inputs import PlainRMSNorm, inverse_rms


class RMSNorm(PlainRMSNorm):
    """RMSNorm over the last dimension, with a backward pass that takes half as long as autograd's.

    Its results equal those of `PlainRMSNorm` bit for bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = _Normed.apply(x, self.weight, self.variance_epsilon)
        return normed

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.variance_epsilon:g}"


def normalized(x: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) in fp32. Takes [..., features], returns that shape in the dtype of `x`."""
    return (x.float() * inverse_rms(x, eps)).to(x.dtype)


class _Normed(torch.autograd.Function):
    """With u = x / rms: y = g u, dx = (g dy - u mean(g dy u)) / rms, dg = sum dy u."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps)
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
