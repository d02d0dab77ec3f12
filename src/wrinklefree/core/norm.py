"""Root mean square normalization, as a part of a quantized layer."""

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
        return self.weight.to(x.dtype) * normalized(x, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.variance_epsilon:g}"


def normalized(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), worked out in fp32: [..., features] -> the same shape and dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
