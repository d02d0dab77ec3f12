"""Reading ternary codes: W = D (codes - 1), D one scale per tensor, row or group of columns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wrinklefree.core.codes import Codes


def decode(codes: Codes) -> Tensor:
    """The fp32 weight [out, in]; scales [1, 1], [out, 1] or [out, groups]."""
    # A scale for each row first: the gradient's sum then does not depend on the number of threads.
    scales = codes.tensors["scales"].float().expand(codes.shape[0], -1)
    blocks = (codes.index.float() - 1).unflatten(1, (scales.shape[1], -1))
    return (blocks * scales.unsqueeze(-1)).flatten(1)


def int8_inputs(settings: Mapping[str, Any]) -> bool:
    """Whether layers with these settings round their inputs to int8 per token."""
    return settings["activation_bits"] is not None
