"""Which product multiplies a packed layer.

| device | product |
|---|---|
| CPU | the native kernels, from their own copy of the codes |
| GPU | a Triton program, or else what torch.compile makes of `decode`; both read the codes in the layer's buffer |
| others | the decoded weight, in the model's dtype |

The kernels round inputs to int8 per token. A method that did not in training gets logits that differ by about a
percent. The decoded weight multiplies everywhere if a gradient is wanted, if no kernel knows the codes, and after
`set_exact`.
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

from wrinklefree.core.method import QuantLinear, QuantMethod
from wrinklefree.packed.layer import PackedLinear, Product, by_decoded_weight
from wrinklefree.packed.pack import packed_layers
from wrinklefree.packed.products import compiled, native
from wrinklefree.packed.products.fused import Fused

log = logging.getLogger("wrinklefree")


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def choose(layer: PackedLinear) -> Product:
    """The product for the device that the layer is on."""
    if layer.weight.is_cpu:
        return on_cpu(layer)
    return on_gpu(layer) if layer.weight.is_cuda else by_decoded_weight


def on_cpu(layer: PackedLinear) -> Product:
    if not usable():
        return by_decoded_weight
    codes = layer.codes()
    form = method_layer(layer).form(codes)
    return by_decoded_weight if form is None else native.product(form, codes.shape)


def on_gpu(layer: PackedLinear) -> Product:
    codes, programs = layer.codes(), gpu_programs()
    form = method_layer(layer).form(codes)
    found: Product | None = None if programs is None else programs.product(form, codes, layer.weight.device)
    return found or compiled.product(layer, method_layer(layer), codes)


def method_layer(layer: PackedLinear) -> type[QuantLinear]:
    """The method's layer, which knows the form of its codes."""
    assert isinstance(layer.method, QuantMethod)
    return layer.method.layer


@cache
def usable() -> bool:
    """Whether there are kernels. Says so once if there are none."""
    reason = native.available()
    if reason is not None:
        log.warning("packed layers multiply with decoded weights, many times slower: %s", reason)
    return reason is None


@cache
def gpu_programs() -> ModuleType | None:
    """The Triton programs; None without Triton."""
    there = importlib.util.find_spec("triton") is not None
    return importlib.import_module("wrinklefree.packed.products.triton") if there else None


def set_exact(model: nn.Module, exact: bool = True) -> None:
    """Let packed layers multiply with the decoded weight, inputs unrounded; or (False, the default) choose anew."""
    for module in model.modules():
        if isinstance(module, (PackedLinear, Fused)):
            module.exact = exact
    for layer in packed_layers(model).values():
        layer.product = None


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """`set_exact` for a while. Afterwards every layer has the product again that it had."""
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
