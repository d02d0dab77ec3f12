"""A cache for a layer's quantized weight, which is computed once per optimizer step.

Weights change only if the optimizer steps. The first forward pass after a change computes `decode(encode(W))`. All
micro-batches, the second forward pass of gradient checkpointing, evaluation and generation then share the result.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Key = tuple[tuple[int, int, torch.dtype, torch.device, bool], ...]


def state_key(module: nn.Module) -> Key:
    """A key that changes if a parameter of `module` is replaced, moved, cast, frozen or written in place.

    Parameters of submodules do not count. Writes through `parameter.data` are not seen, since PyTorch does not count
    them. Code that writes so can clear the cache by switching between `train()` and `eval()`.
    """
    return tuple(
        (p.data_ptr(), p._version, p.dtype, p.device, p.requires_grad) for p in module.parameters(recurse=False)
    )


class EffectiveWeight:
    """A cache of one tensor. `get` computes it again only after the module's parameters have changed."""

    def __init__(self) -> None:
        # A sharded layer is whole only during its own forward and backward pass, and a stored one is in memory only
        # then, so their weights must not be kept. The code that shards or stores a layer sets this to False: then every
        # forward pass quantizes again, inside its own graph.
        self.cached = True
        self.key: Key | None = None
        self.trains = False  # whether the value was computed for training
        self.leaf: Tensor | None = None  # the value in the compute dtype

    def __deepcopy__(self, memo: dict[int, object]) -> "EffectiveWeight":
        return EffectiveWeight()

    def __reduce__(self) -> tuple[type["EffectiveWeight"], tuple[()]]:
        return EffectiveWeight, ()

    def clear(self) -> None:
        self.key = self.leaf = None

    def get(self, module: nn.Module, compute: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        """Return `compute()` in `dtype`, cached until a parameter of `module` changes.

        The result takes a gradient if the module has a trained parameter and autograd is on.
        """
        if torch.compiler.is_compiling() and self.leaf is not None:
            return self.leaf  # `core.method.refresh` brought it up to date before the compiled region
        if not self.cached:
            with torch.autocast(device_type=next(module.parameters(recurse=False)).device.type, enabled=False):
                return compute().to(dtype)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters(recurse=False))
        key = state_key(module)
        if self.leaf is None or self.key != key or self.leaf.dtype != dtype or (trains and not self.trains):
            self._compute(next(module.parameters(recurse=False)).device.type, compute, dtype, trains)
            self.key = key
        assert self.leaf is not None
        return self.leaf

    def _compute(self, device: str, compute: Callable[[], Tensor], dtype: torch.dtype, trains: bool) -> None:
        # Gradient checkpointing counts the tensors that a forward pass saves, and the second pass must save as many.
        # This graph is made in the first pass only, so hooks of our own hide its tensors from the count.
        unseen = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _unpack)
        with torch.autocast(device_type=device, enabled=False), torch.set_grad_enabled(trains), unseen:
            value = compute()
        self.trains = trains
        self.leaf = value.detach().to(dtype)
        if value.requires_grad:
            # Every user of the cache backpropagates into this leaf. The hook passes each gradient on to the master
            # weight and the trained scales, so a training loop needs no code of ours.
            self.leaf.requires_grad_()
            self.leaf.register_post_accumulate_grad_hook(partial(_hand_on, get_gradient_edge(value)))


class MasterWeight(EffectiveWeight):
    """In the place of a cache: the master itself, not quantized."""

    def get(self, module: nn.Module, compute: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        return module.get_parameter("weight").to(dtype)


def _unpack(saved: Tensor) -> Tensor:
    """Undo packing, which detached the tensor: a node that keeps its own output alive is never freed."""
    return saved


def _hand_on(value: GradientEdge, leaf: Tensor) -> None:
    """Backpropagate the gradient in `leaf` from `value`, in fp32, to the parameters. Then clear it."""
    # An edge of the graph stands for the value, so that its fp32 copy need not be kept.
    assert leaf.grad is not None
    torch.autograd.backward([value], [leaf.grad.float()], retain_graph=True)
    leaf.grad = None
