"""Place a model's parameters: whole on every process (`Whole`), or sharded over all of them with FSDP2 (`Sharded`).

With `Sharded`, each process keeps a share of every parameter, gradient and optimizer moment. A decoder layer is
gathered when its forward or backward pass begins and freed when it ends, so only one layer at a time is whole:

    Root                    gathers the parameters outside the layers: embedding, final norm, head (tied ones once)
      causal LM
        decoder layer 0     gathers itself
        decoder layer 1     ...

Code that uses a placed model must run inside `with_whole_parameters`.
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
    """Every process has the whole model, and its own share of the batches."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def build_device(self) -> torch.device:
        """The device on which to build a model before it is placed."""
        return self.world.device

    def place(self, model: PreTrainedModel) -> None:
        """Move a model to the device of this process. Its parameters must have their final shapes."""
        model.to(self.world.device)

    def with_whole_parameters(self, function: Callable[[], T]) -> T:
        """Call `function`, which may use the placed models, and return its result. Every process must call this."""
        return function()

    def only(self, *models: nn.Module | None) -> "Whole":
        """A placement whose `with_whole_parameters` gathers only these models. Here nothing has to be gathered."""
        return self

    def finish_gradients(self, parameters: Parameters, factor: float) -> None:
        """Replace every gradient by `factor` times its sum over all processes."""
        for parameter in parameters:
            if self.world.size > 1:
                sum_gradient(parameter)
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


class Root(nn.Module):
    """Calls functions while the parameters outside the model's decoder layers are gathered.

    It calls a function and not the model, because objectives read `head.weight` outside of any module's forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.trains = any(p.requires_grad for p in model.parameters())

    def forward(self, function: Callable[[], T]) -> T:
        return function()

    def around(self, function: Callable[[], T]) -> T:
        """Call `function`, which uses this model, with the parameters outside its layers whole. Returns its result."""
        if self.trains:
            return self(function)  # FSDP finds the loss in the result and prepares the backward pass
        results: list[T] = []
        self(lambda: results.append(function()))  # a frozen model has no backward pass, so hide the result from FSDP
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
        """The CPU, because the whole model may not fit on the device."""
        return torch.device("cpu")

    def place(self, model: PreTrainedModel) -> None:
        """Shard a model in place, layer by layer. Raises UserError if a parameter is a single number."""
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                raise UserError(f"{name}: a single number cannot be sharded; choose distributed=single_gpu")
        for quantized in quant_layers(model).values():
            quantized.effective.cached = False
        layers = [self._shard(layer, self.config.reshard_after_forward) for layer in surgery.decoder_layers(model)]
        _prefetch(layers, self.config.prefetch)
        root = Root(model)
        self._shard(root, True)  # resharding after the forward pass also frees the parameters after an evaluation
        self.roots.append(root)

    def _shard(self, module: nn.Module, reshard_after_forward: bool) -> FSDPModule:
        pinned = self.world.device.type == "cuda"
        # No `param_dtype`: weights are gathered in fp32, because a quantizer computes scales and codes from the whole
        # weight, and a bf16 weight has other codes. Matrix products run in bf16 by autocast, as on one device.
        return fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32),
            offload_policy=CPUOffloadPolicy(pin_memory=pinned) if self.config.cpu_offload else OffloadPolicy(),
        )

    def with_whole_parameters(self, function: Callable[[], T]) -> T:
        """Call `function` and return its result. Every process must call this.

        Inside, the parameters outside the decoder layers are whole tensors. A layer's own are whole while it runs.
        """
        for root in self.roots:
            function = partial(root.around, function)
        return function()

    def only(self, *models: nn.Module | None) -> "Sharded":
        """A placement whose `with_whole_parameters` gathers only these models."""
        some = copy.copy(self)
        some.roots = [root for root in self.roots if root.model in models]
        return some

    def finish_gradients(self, parameters: Parameters, factor: float) -> None:
        """Replace every gradient by `factor` times its sum over all processes."""
        for parameter in parameters:  # FSDP has left the mean over the processes
            if parameter.grad is not None:
                parameter.grad.mul_(factor * self.world.size)


def choose_placement(chosen: DistributedConfig, compiled: bool, world: World) -> Whole:
    """Choose how models are placed. A single process always has the whole model, and logs so if it asked for fsdp.

    Raises UserError if a setting needs fsdp, or if `training.compile` is combined with it.
    """
    if chosen.strategy == "replicate":
        if chosen != DistributedConfig():
            raise UserError("distributed: reshard_after_forward, prefetch and cpu_offload have no effect without fsdp")
        return Whole(world)
    if world.size == 1:
        log.info("one process: nothing to shard, the whole model is on %s", world.device)
        return Whole(world)
    if compiled:
        raise UserError("training.compile=true: does not work with fsdp; leave it out, or set distributed=single_gpu")
    return Sharded(chosen, world)


def _prefetch(layers: list[FSDPModule], ahead: int) -> None:
    """Let each layer gather the next `ahead` layers while it computes. 0 leaves it to torch: one ahead."""
    if not ahead:
        return
    for i, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(0, i - ahead) : i][::-1])


def whole_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Yield (fqn, layer) for every quantized layer, gathered while the caller looks at it.

    Every process must run through the whole iterator.
    """
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    owner = {id(module): unit for unit in units for module in unit.modules()}
    for unit, group in groupby(quant_layers(model).items(), key=lambda item: owner.get(id(item[1]))):
        with _gathered(unit):
            yield from group


@contextmanager
def _gathered(unit: FSDPModule | None) -> Iterator[None]:
    """Gather the parameters of `unit` for the block. None does nothing."""
    if unit is not None:
        unit.unshard()
    yield
    if unit is not None:
        unit.reshard()


def whole_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The model's state dict with every tensor whole. It is empty on all processes but the main one.

    Tensors that were sharded are on the CPU. Tied weights stay one tensor. Every process must call this.
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
    """Shard `value`, which every process has whole, as `parameter` is sharded.

    It is returned as it is if `parameter` is not sharded, `value` is sharded already, or their shapes differ.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    share = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    placed = torch.empty_like(parameter, dtype=value.dtype)
    local(placed).copy_(share)  # an offloaded parameter is on another device than its mesh
    return placed


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_scalar(value: Tensor) -> float:
    """The value of a tensor with one element, which may have been computed from sharded tensors."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()
