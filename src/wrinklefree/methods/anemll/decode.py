"""Decode ANEMLL's codes: W = lut[codes] * (A B)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wrinklefree.core.codes import Codes, look_up


def decode(codes: Codes) -> Tensor:
    """Turn codes into the fp32 weight [out, in]. The tensors are lut [2**bits], a [out, r], b [r, in]."""
    scales = product(codes.tensors["a"].float(), codes.tensors["b"].float())
    return look_up(codes.tensors["lut"].float(), codes.index) * scales


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute A B [out, in]."""
    if not torch.compiler.is_compiling():
        return a @ b
    scales = a[:, :1] * b[:1]  # a sum over ranks, so that the compiler can compute each entry inside a fused loop
    for k in range(1, len(b)):
        scales = scales + a[:, k : k + 1] * b[k]
    return scales


def int8_inputs(settings: Mapping[str, Any]) -> bool:
    """False: no setting of ANEMLL rounds inputs to int8."""
    return False
