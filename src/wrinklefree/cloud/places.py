"""Clouds, GPUs and scales: the rows of places.yaml. A new cloud is a new row."""

import datetime
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import did_you_mean

TABLE = Path(__file__).with_name("places.yaml")

# What SkyPilot 0.14.1 knows besides the clouds of the table. Of these no sizes and no prices are known here.
OTHERS = (
    "azure", "cudo", "do", "fluidstack", "hyperbolic", "ibm", "mithril", "oci", "paperspace", "primeintellect", "scp",
    "seeweb", "shadeform", "slurm", "ssh", "vast", "verda", "vsphere", "yotta",
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """One GPU: bytes of memory, operations a second in bf16 and fp32, bytes a second from memory and to other GPUs."""

    memory: float
    flops: float
    flops32: float
    bandwidth: float
    link: float


@dataclass(frozen=True)
class Cloud:
    """A place that rents GPUs. `counts` says how many of them one machine may have; empty means unknown."""

    name: str
    gpu: str = "H100"
    counts: tuple[int, ...] = ()
    price: float | None = None  # US dollars for a GPU and hour
    spot: float | None = None
    read: datetime.date | None = None  # the day on which the prices were read
    network: float = 12.5e9  # bytes a second between machines, for each GPU; 100 Gbit/s if nothing is known
    can_spot: bool = True
    nodes: int | None = None  # the most machines that one job may have; None is no limit


@dataclass(frozen=True)
class Scale:
    """A size of a training: GPUs of one machine, and for a single stage how its batch of 64 sequences is cut."""

    gpus: int
    batch_size: int
    accumulation: int

    def settings(self) -> list[str]:
        """The overrides that cut a batch as this scale does."""
        return [
            f"training.batch_size={self.batch_size}",
            f"training.gradient_accumulation_steps={self.accumulation}",
        ]


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def clouds() -> dict[str, Cloud]:
    """The clouds of the table, by name."""
    return {name: Cloud(name, **{**row, "counts": tuple(row["counts"])}) for name, row in _table()["clouds"].items()}


def gpus() -> dict[str, Gpu]:
    """The GPUs of the table, by name."""
    return {name: Gpu(**row) for name, row in _table()["gpus"].items()}


def scales() -> dict[str, Scale]:
    """The scales of the table, by name, from small to large."""
    return {name: Scale(**row) for name, row in _table()["scales"].items()}


def find_cloud(name: str) -> Cloud:
    """Return the cloud called `name`. Raises UserError if neither the table nor SkyPilot knows it.

    A region may follow the name, as in `nebius/eu-north1`.
    """
    known, plain = clouds(), name.partition("/")[0]
    if plain in known:
        return known[plain]
    if plain in OTHERS:
        return Cloud(plain)
    names = [*known, *OTHERS]
    raise UserError(f"--cloud {name}: unknown{did_you_mean(plain, names)}; there are {', '.join(names)}")


def check_size(cloud: Cloud, gpus: int, nodes: int, spot: bool) -> None:
    """Raise UserError if `cloud` has no machine with so many GPUs, not so many machines, or no spot machines."""
    if cloud.counts and gpus not in cloud.counts:
        fitting = [f"{name} ({row.gpus})" for name, row in scales().items() if row.gpus in cloud.counts]
        raise UserError(
            f"--cloud {cloud.name}: has no machine with {gpus} GPUs; its scales: {', '.join(fitting)}; "
            f"gcp and runpod have all scales"
        )
    if cloud.nodes is not None and nodes > cloud.nodes:
        raise UserError(
            f"--cloud {cloud.name}: a job has at most {cloud.nodes} machine, not {nodes}: leave out --nodes"
        )
    if spot and not cloud.can_spot:
        raise UserError(f"--cloud {cloud.name}: has no spot machines: leave out --spot")
