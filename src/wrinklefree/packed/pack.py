"""Make packed layers from codes, and find them in a model."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from wrinklefree.core.codes import Codes, pack
from wrinklefree.core.method import QuantMethod
from wrinklefree.packed.layer import LayerSpec, PackedEmbedding, PackedLinear

Kind = TypeVar("Kind", PackedLinear, PackedEmbedding)


def pack_layer(
    kind: type[Kind],
    method: QuantMethod,
    codes: Codes,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
    rotated: bool = False,
) -> Kind:
    """Make a packed layer of the class `kind` that holds `codes`. `rotated` says whether it rotates its inputs.

    With `norm_eps` it has a norm, whose gain stays on the meta device until the caller replaces it.
    Raises ValueError if a scale is not exactly an fp16 number, because the file would change it.
    """
    tensors = {name: list(tensor.shape) for name, tensor in codes.tensors.items()}
    shape, index_shape = list(codes.shape), list(codes.index.shape)
    spec = LayerSpec(shape, codes.bits, index_shape, tensors, bias is not None, norm_eps, rotated=rotated or None)
    with torch.device("meta"):
        layer = kind(method, spec)
    layer.weight = pack(codes.index, codes.bits)
    for name, tensor in codes.tensors.items():
        setattr(layer, name, _exact_fp16(name, tensor))
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _exact_fp16(name: str, tensor: Tensor) -> Tensor:
    half = tensor.detach().to(torch.float16)
    if not torch.equal(half.to(tensor.dtype), tensor.detach()):
        raise ValueError(f"{name}: not representable in fp16, so the packed layer would differ from the trained one")
    return half


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """All packed layers of `model` by fqn."""
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, PackedLinear)}
