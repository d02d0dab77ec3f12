"""Weights that stay in a file, in the file's dtype, until they are needed.

A file that is mapped into memory costs none: the system reads its pages when they are used, and may drop them again.
So of a model with its decoder layers in a file, memory holds embedding and head, and the layer that is running:

keep(model)             the decoder layers' parameters become `Stored`; a layer is fp32 while it runs
shared(model)           a copy that reads from the same file
own(layer)              an fp32 copy in memory, to be changed
put_back(layer, ...)    from another file
"""

import copy
import ctypes
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from wrinklefree.core.surgery import decoder_layers

Model = TypeVar("Model", bound=nn.Module)

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 1 << 22


class Stored(nn.Parameter):
    """A parameter whose values lie in a file, and may have another dtype than fp32 there."""


def is_stored(module: nn.Module) -> bool:
    """Whether any parameter of `module` lies in a file."""
    return any(isinstance(parameter, Stored) for parameter in module.parameters())


@contextmanager
def widened(*parameters: Tensor) -> Iterator[None]:
    """Let those parameters that are `Stored` be fp32 while the block runs."""
    kept = [(p, p.data) for p in parameters if isinstance(p, Stored)]
    for parameter, data in kept:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


class _Running:
    """The hooks of a layer: its parameters are fp32 while it runs."""

    def __init__(self) -> None:
        # None between two passes: models are copied then, and a running block cannot be.
        self.running: AbstractContextManager[None] | None = None

    def before(self, layer: nn.Module, inputs: object) -> None:
        self.running = widened(*layer.parameters())
        self.running.__enter__()

    def after(self, layer: nn.Module, inputs: object, output: object) -> None:
        assert self.running is not None
        self.running.__exit__(None, None, None)
        self.running = None


def free_at_once() -> None:
    """Let the C library give tensors of `LARGE` bytes back to the system when they are freed.

    By default glibc keeps up to 32 MB for the next one. Then a small tensor, such as a layer's scales, comes to lie in
    it, and the next one does not fit any more: memory grows with each layer. Other libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def keep(model: nn.Module) -> None:
    """Leave the decoder layers of `model`, which was loaded from a file, there. All else becomes fp32, in memory."""
    for layer in decoder_layers(model):
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, Stored(parameter.data, parameter.requires_grad))
    for parameter in model.parameters():
        if not isinstance(parameter, Stored):
            parameter.data = parameter.data.float()
    widen_layers(model)


def widen_layers(model: nn.Module) -> None:
    """Let each decoder layer be fp32 while it runs."""
    for layer in decoder_layers(model):
        hooks = _Running()
        layer.register_forward_pre_hook(hooks.before)
        layer.register_forward_hook(hooks.after, always_call=True)


def shared(model: Model) -> Model:
    """A copy of `model` with parameters of its own that have the same memory."""
    own = {id(p): type(p)(p.data, p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict(own))


def own(layer: nn.Module) -> None:
    """Copy what is stored into memory, as fp32: a write to it would change all that read from the same file."""
    for parameter in layer.parameters():
        if isinstance(parameter, Stored):
            parameter.data = parameter.data.to(torch.float32, copy=True)


def put_back(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let the parameters of `layer` be `tensors`, which come from a file, by name.

    Raises RuntimeError if names or shapes differ.
    """
    parameters = dict(layer.named_parameters(remove_duplicate=False))
    state = {name: Stored(tensor, False) if name in parameters else tensor for name, tensor in tensors.items()}
    layer.load_state_dict(state, assign=True)
