"""Communication between the processes of one run: a single one, or several that torchrun started.

With one process every function here returns at once and changes nothing. Tensors on a GPU go through nccl, tensors on
a CPU through gloo, in one process group.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process: its number `rank`, the number of processes `size`, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = World(0, 1, torch.device("cpu"))


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions to multiply bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def own_device(local_rank: int = 0) -> torch.device:
    """The device of a process: a GPU of its own if there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, so that a clock counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def join_world() -> World:
    """Join the processes that torchrun started. Without torchrun, the world is this process alone."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = own_device(local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # The others wait while the main process writes text or rebuilds blocks. If it dies, torchrun ends them.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank:  # only the main process logs
        logging.getLogger("wrinklefree").setLevel(logging.ERROR)
    return World(rank, size, device)


def leave_world() -> None:
    """Close the connections that `join_world` opened, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_gradient(parameter: Tensor) -> None:
    """Replace a gradient by its sum over all processes. A process without a gradient adds zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    dist.all_reduce(parameter.grad)


def sum_over_processes(values: Mapping[str, Tensor], world: World) -> dict[str, float]:
    """Sum each number over all processes, in one message. Every process must pass the same names in the same order."""
    stacked = torch.stack([value.double() for value in values.values()])
    if world.size > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))


def any_of(here: bool, world: World) -> bool:
    """Whether `here` is true on any process."""
    flag = torch.tensor(int(here))
    if world.size > 1:
        dist.all_reduce(flag)
    return bool(flag)


def gather(value: Any, world: World) -> list[Any]:
    """Collect the `value` of every process, ordered by rank. Every process gets the list."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def barrier(world: World) -> None:
    """Wait until every process has called this."""
    any_of(False, world)  # through gloo: nccl's own barrier times out while one process writes a large file
