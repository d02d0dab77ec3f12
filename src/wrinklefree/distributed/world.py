"""Processes: one, or several started by torchrun, each with its own share of the data.

What they say to each other: sums, objects, agreements. With one process all of it is free and changes nothing. Tensors
on a GPU go through nccl, those on a CPU through gloo, in one and the same group.
"""

import logging
import os
from collections.abc import Mapping
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


ALONE = World(0, 1, torch.device("cpu"))


def join_world() -> World:
    """Join the processes that torchrun started, or be the only one."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank:  # the main process does the talking
        logging.getLogger("wrinklefree").setLevel(logging.ERROR)
    return World(rank, size, device)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_gradient(parameter: Tensor) -> None:
    """Replace a gradient by its sum over all processes; one that got none has zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    dist.all_reduce(parameter.grad)


def sum_over_processes(values: Mapping[str, Tensor], world: World) -> dict[str, float]:
    """The sum of each number over all processes, in one message; all of them bring the same names."""
    stacked = torch.stack([value.double() for value in values.values()])
    if world.size > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))


def any_of(here: bool, world: World) -> bool:
    """Whether it is so on any process."""
    flag = torch.tensor(int(here))
    if world.size > 1:
        dist.all_reduce(flag)
    return bool(flag)


def gather(value: Any, world: World) -> list[Any]:
    """`value` of every process, by rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def barrier(world: World) -> None:
    any_of(False, world)  # on the CPU: nccl's own barrier has a shorter patience than the writing of a large file takes
