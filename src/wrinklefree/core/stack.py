"""Experts whose weights are one tensor [E, out, in] or [E, in, out]: each becomes a layer of its own."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LINEAR, MATMUL = (F.linear,), (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)
BATCHED = (torch.bmm, torch.Tensor.bmm)


class Stack(nn.ModuleList):
    """Stands in for the tensor. `F.linear(x, stack[e])` or `x @ stack[e]` calls layer number e, `bmm(x, stack)` all."""

    @property
    def shape(self) -> tuple[int]:
        """The number of experts. Models ask the tensor for nothing else."""
        return (len(self),)

    def __getitem__(self, index: Any) -> Any:
        return Expert(self._modules[str(int(index))])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in BATCHED or kwargs:
            raise TypeError(f"the weights of experts are multiplied with, nothing else: {func}")
        x, experts = args
        return torch.stack([layer(each) for layer, each in zip(experts._modules.values(), x, strict=True)])


class Expert:
    """Stands for one matrix of a stack."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in LINEAR + MATMUL or kwargs:
            raise TypeError(f"an expert's weight is multiplied with, nothing else: {func}")
        x, expert, *bias = args
        out = expert.layer(x)
        return out + bias[0] if bias and bias[0] is not None else out


def open_stacks(model: Any, stacks: dict[str, int]) -> None:
    """Replace each parameter by a stack of so many layers, which are put in later. Experts then run one by one."""
    for fqn, number in stacks.items():
        parent, _, name = fqn.rpartition(".")
        module = model.get_submodule(parent)
        del module._parameters[name]
        setattr(module, name, Stack(nn.Identity() for _ in range(number)))
    if stacks:
        model.set_experts_implementation("eager")


def masters(model: nn.Module) -> dict[str, list[str]]:
    """The tensors that the model had before its stacks were opened: each with the names of the experts' masters."""
    return {
        fqn: [f"{fqn}.{number}.weight" for number in range(len(module))]
        for fqn, module in model.named_modules()
        if isinstance(module, Stack)
    }


def as_one(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in which the masters of experts are one tensor again, as plain transformers reads it."""
    state = dict(state)
    for fqn, names in masters(model).items():
        if names[0] in state:
            state[fqn] = torch.stack([state.pop(name) for name in names])
    return state
