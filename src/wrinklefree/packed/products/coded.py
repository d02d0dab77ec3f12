"""What products that read packed codes on a GPU have in common."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.inputs import compute_dtype
from wrinklefree.packed.layer import PackedLinear, by_decoded_weight

FEW = 8  # tokens that are multiplied with packed codes; more of them with the decoded weight


class FewTokens:
    """Reads the codes for few tokens. For more it decodes the weight, for this once, so that memory stays small."""

    def few(self, weight: Tensor, x: Tensor) -> Tensor | None:
        """The layer's packed `weight` and x [..., in] -> fp32 [..., out], without bias; None if it cannot be had."""
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
    """A result in fp32 -> with the layer's bias, in `dtype`."""
    y = y if layer.bias is None else y + layer.bias.float()
    return y if y.dtype == dtype else y.to(dtype)
