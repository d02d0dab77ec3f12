"""Decode uniform integers: W = s (q - z), with one scale s per row or group of columns. By default z = 2^(b-1)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wrinklefree.core.codes import Codes


def decode(codes: Codes) -> Tensor:
    """Turn codes into the fp32 weight [out, in]. The scales are [out, 1] or [out, groups], z is `zero` [1]."""
    scales, zero = codes.tensors["scales"].float(), codes.tensors.get("zero", 2 ** (codes.bits - 1))
    return ((codes.index.float() - zero).unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)


def int8_inputs(settings: Mapping[str, Any]) -> bool:
    """Whether layers with these settings round their inputs to int8 per token."""
    return settings["activation_bits"] is not None
