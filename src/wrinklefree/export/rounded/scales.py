"""Moves scales to the grid that the fast kernels want, when a model is packed.

Only scales move, by up to a few percent; codes stay as they were trained. The certificate compares with the trained
model with the same scales, and the cost of moving them is measured separately.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantLinear, quant_layers


def moves(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized layers whose method has a grid, by fqn."""
    return {fqn: layer for fqn, layer in quant_layers(model).items() if type(layer).snap is not QuantLinear.snap}


def _snapped(layer: QuantLinear) -> Codes:
    return layer.snap(type(layer).encode(layer))


@contextmanager
def snapped(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let the layers of `model` encode and compute with their scales on the grid while the block runs."""
    layers = moves(model).values() if wanted else ()
    for layer in layers:
        vars(layer)["encode"] = partial(_snapped, layer)  # hides the class's own function
        layer.effective.clear()
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["encode"]
            layer.effective.clear()
