"""Reading ANEMLL's codes: W = lut[codes] * (A B), rank by rank if a compiler reads it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wrinklefree.core.codes import Codes, look_up


def decode(codes: Codes) -> Tensor:
    """The fp32 weight [out, in]; lut [2**bits], a [out, r], b [r, in]."""
    scales = product(codes.tensors["a"].float(), codes.tensors["b"].float())
    return look_up(codes.tensors["lut"].float(), codes.index) * scales


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B [out, in]. A compiler gets a sum over ranks, so that it can work out each entry where it is used."""
    if not torch.compiler.is_compiling():
        return a @ b
    scales = a[:, :1] * b[:1]
    for k in range(1, len(b)):
        scales = scales + a[:, k : k + 1] * b[k]
    return scales


def int8_inputs(settings: Mapping[str, Any]) -> bool:
    """Inputs stay as they are, whatever the settings."""
    return False
