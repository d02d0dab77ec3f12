"""Choose the function that multiplies a packed layer.

| device | product |
|---|---|
| CPU | the native kernels, from their own copy of the codes |
| GPU | a Triton program, else a kernel that torch.compile makes; both read the codes in the layer's buffer |
| others | the decoded weight, in the model's dtype |

On every device the decoded weight is used instead if

- the inputs need a gradient,
- no kernel knows the codes, or
- `set_exact` was called.

The native kernels round inputs to int8 per token. If the method did not do so in training, logits differ by about one
percent.
"""

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import nn

from wrinklefree.core import library
from wrinklefree.core.method import QuantLinear, QuantMethod
from wrinklefree.packed.layer import PackedLinear, Product, by_decoded_weight
from wrinklefree.packed.pack import packed_layers
from wrinklefree.packed.products import compiled, native
from wrinklefree.packed.products.fused import Fused

log = logging.getLogger("wrinklefree")


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def choose(layer: PackedLinear) -> Product:
    """The product for the device that the layer is on. Packed layers call this at their first forward pass."""
    if layer.weight.is_cpu:
        return on_cpu(layer)
    return on_gpu(layer) if layer.weight.is_cuda else by_decoded_weight


def on_cpu(layer: PackedLinear) -> Product:
    """A native kernel, or the decoded weight if no kernel knows the codes."""
    if not usable():
        return by_decoded_weight
    codes = layer.codes()
    form = method_layer(layer).form(codes)
    return by_decoded_weight if form is None else native.product(form, codes.shape)


def on_gpu(layer: PackedLinear) -> Product:
    """A Triton program, or a compiled kernel if no program reads the codes."""
    codes, programs = layer.codes(), gpu_programs()
    form = method_layer(layer).form(codes)
    product: Product | None = None if programs is None else programs.product(form, codes, layer.weight.device)
    return product or compiled.product(layer, method_layer(layer), codes)


def method_layer(layer: PackedLinear) -> type[QuantLinear]:
    """The trained layer's class, whose `form` describes the codes to kernels."""
    assert isinstance(layer.method, QuantMethod)
    return layer.method.layer


@cache
def usable() -> bool:
    """Whether the native library can be used. If not, warn once."""
    reason = library.available()
    if reason is not None:
        log.warning("packed layers multiply with decoded weights, many times slower: %s", reason)
    return reason is None


@cache
def gpu_programs() -> ModuleType | None:
    """The module with the Triton programs. None if Triton is not installed."""
    installed = importlib.util.find_spec("triton") is not None
    return importlib.import_module("wrinklefree.packed.products.triton") if installed else None


def set_exact(model: nn.Module, exact: bool = True) -> None:
    """Make packed layers multiply with the decoded weight, which equals training bit for bit.

    `exact=False` lets every layer choose its fastest product again.
    """
    for module in model.modules():
        if isinstance(module, (PackedLinear, Fused)):
            module.exact = exact
    for layer in packed_layers(model).values():
        layer.product = None


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """Call `set_exact` for the block. Afterwards every layer has the product that it had before."""
    flags = [(module, module.exact) for module in model.modules() if isinstance(module, (PackedLinear, Fused))]
    products = [(layer, layer.product) for layer in packed_layers(model).values()]
    set_exact(model)
    try:
        yield
    finally:
        for module, exact in flags:
            module.exact = exact
        for layer, product in products:
            layer.product = product
