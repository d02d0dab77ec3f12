"""Processes: one, or several started by torchrun, each with its own share of the data.

Data parallel: every process holds the whole model; gradients are averaged once per optimizer step, after the last
micro-batch. Works with nccl on GPUs and gloo on CPUs.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, on which device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> World:
    """Join the processes that torchrun started, or be the only one."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Replace every gradient by its mean over all processes."""
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world.size


def mean(value: Tensor, world: World) -> Tensor:
    """The mean of a scalar over all processes."""
    if world.size > 1:
        dist.all_reduce(value)
        value /= world.size
    return value


def gather(value: Any, world: World) -> list[Any]:
    """`value` of every process, by rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
