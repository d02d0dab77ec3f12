"""The values of tensors in a GGUF file, as torch has them."""

import numpy as np
import torch
from torch import Tensor

from wrinklefree.core.errors import UserError
from wrinklefree.gguf.blocks import INTEGERS, Array, decoded
from wrinklefree.gguf.header import Header
from wrinklefree.gguf.names import above_one, gguf_names, halved

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_weight(header: Header, name: str, heads: int | None = None) -> Tensor:
    """Return the parameter that transformers calls `name`, in fp32, with rows of `heads` in transformers' order.

    A vector that transformers has as one row stays a vector.
    Raises UserError if the file has none, if the package `gguf` is needed for its type, or if it does not know it.
    """
    arch = str(header.metadata.get("general.architecture"))
    parts = [_values(header, place) for place in gguf_names(name, arch)]
    if not parts:
        raise UserError(f"{header.file}: {name} is missing")
    values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
    return halved(values, heads) - above_one(name, arch)


def _values(header: Header, place: str) -> Tensor:
    if place not in header.tensors:
        raise UserError(f"{header.file}: {place} is missing")
    tensor = header.tensors[place]
    data = header.data(place)
    if tensor.kind in _FLOATS:
        values = torch.from_numpy(np.array(data)).view(_FLOATS[tensor.kind]).float()
    elif tensor.kind in INTEGERS:
        values = torch.from_numpy(decoded(tensor.kind, np.array(data)))
    else:
        values = torch.from_numpy(_by_the_library(header, tensor.kind, np.array(data)))
    return values.reshape(tensor.shape)


def _by_the_library(header: Header, kind: str, data: Array) -> Array:
    """Decode a type without integers times a scale, as transformers does."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{header.file}: to read {kind}: pip install 'wrinklefree[gguf]'") from error
    values: Array = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return values
