"""The common part of products that read packed codes on a GPU: few tokens use the codes, many a decoded weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.inputs import compute_dtype
from wrinklefree.packed.layer import PackedLinear, by_decoded_weight

FEW = 8  # the most tokens that are multiplied with packed codes; for more, decoding the weight once is faster


class FewTokens:
    """Multiplies up to `FEW` tokens with the codes. For more it decodes the weight, and drops it after the call."""

    def few(self, weight: Tensor, x: Tensor) -> Tensor | None:
        """Multiply `x` [..., in] with the layer's packed `weight`: fp32 [..., out], without bias. None if it cannot."""
        raise NotImplementedError

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def __call__(self, layer: PackedLinear, x: Tensor) -> Tensor:
        dtype, inputs = compute_dtype(x), layer.inputs(x)
        if inputs.numel() > FEW * layer.in_features:
            return F.linear(inputs, layer.decoded().to(dtype), layer.bias)
        y = self.few(layer.weight, inputs)
        if y is None:
            layer.product = by_decoded_weight
            return by_decoded_weight(layer, x)
        return with_bias(layer, y, dtype)


def with_bias(layer: PackedLinear, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the layer's bias to an fp32 result, then cast it to `dtype`."""
    y = y if layer.bias is None else y + layer.bias.float()
    return y if y.dtype == dtype else y.to(dtype)
