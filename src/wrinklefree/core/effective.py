"""The effective weight of a quantized layer, computed once per optimizer step.

Weights change only when the optimizer steps. So `decode(encode(W))` is worked out at the first forward after a change
and shared by all micro-batches, by the second forward of gradient checkpointing, by evaluation and by generation. The
shared value is a leaf of the autograd graph; whenever a backward pass has added to its gradient, a hook hands that
gradient on to the master weight and to the trained scales, so any training loop works unchanged.

A sharded layer is whole during its own forward and backward alone, so nothing may outlive these: whoever shards it sets
`cached` to False, and every forward quantizes anew, as a plain part of the graph.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

Key = tuple[tuple[int, int, torch.dtype, torch.device, bool], ...]


def state_key(module: nn.Module) -> Key:
    """Changes whenever a parameter of `module` itself is replaced, moved, cast, frozen or written in place.

    Writes through `parameter.data` leave no trace in PyTorch; switching between `train()` and `eval()` clears the
    cache for such code.
    """
    return tuple(
        (p.data_ptr(), p._version, p.dtype, p.device, p.requires_grad) for p in module.parameters(recurse=False)
    )


class EffectiveWeight:
    """A cache of one tensor: `get` returns it, recomputing only after the module's parameters have changed."""

    def __init__(self) -> None:
        self.cached = True
        self.key: Key | None = None
        self.graph: Tensor | None = None  # fp32, depends on the parameters
        self.leaf: Tensor | None = None  # the same values in the compute dtype

    def __deepcopy__(self, memo: dict[int, object]) -> "EffectiveWeight":
        return EffectiveWeight()

    def __reduce__(self) -> tuple[type["EffectiveWeight"], tuple[()]]:
        return EffectiveWeight, ()

    def clear(self) -> None:
        self.key = self.graph = self.leaf = None

    def get(self, module: nn.Module, compute: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        """The value of `compute()` in `dtype`, with a gradient where the module trains and autograd records."""
        if torch.compiler.is_compiling() and self.leaf is not None:
            return self.leaf  # `refresh` has run before the compiled region
        if not self.cached:
            with torch.autocast(device_type=next(module.parameters(recurse=False)).device.type, enabled=False):
                return compute().to(dtype)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters(recurse=False))
        key = state_key(module)
        if self.leaf is None or self.key != key or self.leaf.dtype != dtype or (trains and self.graph is None):
            self._compute(next(module.parameters(recurse=False)).device.type, compute, dtype, trains)
            self.key = key
        assert self.leaf is not None
        return self.leaf

    def _compute(self, device: str, compute: Callable[[], Tensor], dtype: torch.dtype, trains: bool) -> None:
        # Under gradient checkpointing hooks count what a forward saves; this graph is made in the first forward alone.
        unseen = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _same)
        with torch.autocast(device_type=device, enabled=False), torch.set_grad_enabled(trains), unseen:
            value = compute()
        self.graph = value if trains else None
        self.leaf = value.detach().to(dtype)
        if trains:
            self.leaf.requires_grad_()
            self.leaf.register_post_accumulate_grad_hook(partial(_hand_on, value))


def _same(saved: Tensor) -> Tensor:
    """Unpacking. Packing detaches: a node that kept its own output, graph and all, would never be freed."""
    return saved


def _hand_on(graph: Tensor, leaf: Tensor) -> None:
    """Pass the gradient that a backward pass left in `leaf` on to the parameters behind `graph`."""
    assert leaf.grad is not None
    graph.backward(leaf.grad.to(graph.dtype), retain_graph=True)
    leaf.grad = None
