"""Where the parameters of a model lie: whole on every process, or sharded over all of them (FSDP2).

Sharded, each process keeps its share of every parameter, gradient and optimizer moment. A decoder layer is gathered
when its forward or backward pass begins and let go when that ends, so that one layer at a time is whole:

    Root                    gathers what is outside of the layers: embedding, final norm, head (tied ones once)
      causal LM
        decoder layer 0     gathers itself
        decoder layer 1     ...

Objectives read `head.weight` themselves, outside of any module's forward. So a `Root` does not run the model; it runs a
function, `root(function)`, and inside of it these parameters are plain whole tensors. `Sharded.with_whole_parameters`
does that for the student and its teacher together: whatever touches a placed model belongs into it.

Masters stay fp32 and are gathered in fp32 (no `param_dtype`): a quantizer works out its scales and codes from the whole
weight, and bf16 weights have other codes. The matrix products run in bf16 by autocast, as on one device.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistributedConfig
from wrinklefree.core import surgery
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, quant_layers
from wrinklefree.distributed.world import World, sum_gradient

log = logging.getLogger("wrinklefree")

T = TypeVar("T")
Parameters = Iterable[nn.Parameter]


class Whole:
    """Every process has all of the model, and its own share of the batches."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def build_device(self) -> torch.device:
        """Where a model is put together before it is placed."""
        return self.world.device

    def place(self, model: PreTrainedModel) -> None:
        """Move a model to where it will be used. Its parameters must have their final shapes."""
        model.to(self.world.device)

    def with_whole_parameters(self, function: Callable[[], T]) -> T:
        """`function()`, which may use the placed models. Every process has to call it."""
        return function()

    def only(self, *models: nn.Module | None) -> "Whole":
        """The same for these models alone."""
        return self

    def finish_gradients(self, parameters: Parameters, factor: float) -> None:
        """Replace every gradient by its sum over all processes times `factor`."""
        for parameter in parameters:
            if self.world.size > 1:
                sum_gradient(parameter)
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


class Root(nn.Module):
    """Holds a model, and runs functions while what is outside of its decoder layers is whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.trains = any(p.requires_grad for p in model.parameters())

    def forward(self, function: Callable[[], T]) -> T:
        return function()

    def around(self, function: Callable[[], T]) -> T:
        """`function()`, in which this model is used."""
        if self.trains:
            return self(function)  # the loss is in what it returns: FSDP prepares the backward pass from there
        results: list[T] = []
        self(lambda: results.append(function()))  # hidden from FSDP: no backward pass comes to a frozen model
        return results[0]


class Sharded(Whole):
    """Every process has a share of each parameter, gradient and optimizer moment."""

    def __init__(self, config: DistributedConfig, world: World) -> None:
        super().__init__(world)
        self.config = config
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        self.roots: list[Root] = []

    @property
    def build_device(self) -> torch.device:
        """The CPU: only shares of the layers come to the device."""
        return torch.device("cpu")

    def place(self, model: PreTrainedModel) -> None:
        """Shard a model in place, layer by layer. Raises UserError where a parameter cannot be split."""
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                raise UserError(f"{name}: a single number cannot be sharded; choose distributed=single_gpu")
        for quantized in quant_layers(model).values():
            quantized.effective.cached = False
        layers = [self._shard(layer, self.config.reshard_after_forward) for layer in surgery.decoder_layers(model)]
        _prefetch(layers, self.config.prefetch)
        root = Root(model)
        self._shard(root, True)  # after an evaluation, too, every parameter is a share again
        self.roots.append(root)

    def _shard(self, module: nn.Module, reshard_after_forward: bool) -> FSDPModule:
        pinned = self.world.device.type == "cuda"
        return fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32),
            offload_policy=CPUOffloadPolicy(pin_memory=pinned) if self.config.cpu_offload else OffloadPolicy(),
        )

    def with_whole_parameters(self, function: Callable[[], T]) -> T:
        """`function()`, with the parameters outside of the decoder layers whole, the layers' own in their forward."""
        for root in self.roots:
            function = partial(root.around, function)
        return function()

    def only(self, *models: nn.Module | None) -> "Sharded":
        """The same for these models alone: the others are not gathered."""
        some = copy.copy(self)
        some.roots = [root for root in self.roots if root.model in models]
        return some

    def finish_gradients(self, parameters: Parameters, factor: float) -> None:
        """FSDP has left means over the processes."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor * self.world.size)


def choose_placement(chosen: DistributedConfig, compiled: bool, world: World) -> Whole:
    """How models are placed; a single process has nobody to share with, and says so.

    Raises UserError for settings that do not go together.
    """
    if chosen.strategy == "replicate":
        if chosen != DistributedConfig():
            raise UserError("distributed: reshard_after_forward, prefetch and cpu_offload have no effect without fsdp")
        return Whole(world)
    if world.size == 1:
        log.info("one process: nothing to shard, the whole model is on %s", world.device)
        return Whole(world)
    if compiled:
        raise UserError("training.compile=true: not with sharded parameters; leave it out, or distributed=single_gpu")
    return Sharded(chosen, world)


def _prefetch(layers: list[FSDPModule], ahead: int) -> None:
    """Have each layer gather the next `ahead` ones while it computes; 0 leaves it to torch, which looks one ahead."""
    if not ahead:
        return
    for i, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(0, i - ahead) : i][::-1])


def whole_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Every quantized layer by fqn, whole while it is looked at. Every process has to run through it."""
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    owner = {id(module): unit for unit in units for module in unit.modules()}
    for unit, group in groupby(quant_layers(model).items(), key=lambda item: owner.get(id(item[1]))):
        with _gathered(unit):
            yield from group


@contextmanager
def _gathered(unit: FSDPModule | None) -> Iterator[None]:
    if unit is not None:
        unit.unshard()
    yield
    if unit is not None:
        unit.reshard()


def whole_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The state dict on the main process with every tensor whole, on the CPU where it was sharded; empty elsewhere.

    Tied weights stay one tensor. Every process has to call it.
    """
    done: dict[int, Tensor] = {}
    names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    state = {}
    for name, tensor in model.state_dict().items():
        key = names.get(name, id(tensor))
        if key not in done:
            done[key] = _whole(tensor, world)
        state[name] = done[key]
    return state if world.is_main else {}


def _whole(tensor: Tensor, world: World) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if world.is_main else whole.new_empty(0)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, whole on every process, sharded as `parameter` is, where it has that shape."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    share = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    placed = torch.empty_like(parameter, dtype=value.dtype)
    local(placed).copy_(share)  # the parameter may be offloaded to another device than its mesh's
    return placed


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor: itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_scalar(value: Tensor) -> float:
    """A number that was worked out from shares."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()
