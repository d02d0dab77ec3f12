"""Scales on the grid that the fast kernels want, moved there when a model is packed.

The codes stay as they were trained: only scales move, by up to a few percent. The packed model is certified against the
trained one with the same scales, and what moving them costs is measured apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantLinear, quant_layers


def moves(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers whose method has a grid."""
    return {fqn: layer for fqn, layer in quant_layers(model).items() if type(layer).snap is not QuantLinear.snap}


def _snapped(layer: QuantLinear) -> Codes:
    return layer.snap(type(layer).encode(layer))


@contextmanager
def snapped(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let the layers of `model` encode, and compute, with their scales on the grid for a while."""
    layers = moves(model).values() if wanted else ()
    for layer in layers:
        vars(layer)["encode"] = partial(_snapped, layer)  # in front of the class's own
        layer.effective.clear()
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["encode"]
            layer.effective.clear()
