"""Prints estimates for a person to decide by: each figure, and how it comes about."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from wrinklefree.cloud import places
from wrinklefree.cloud.estimate import EFFICIENCY, Estimate, fits, fitting_scale, money
from wrinklefree.cloud.places import Cloud
from wrinklefree.config.schema import Config
from wrinklefree.tracking.terminal import print_table, short_number, short_size, spoken_time


@dataclass(frozen=True)
class Rented:
    """What a training would run on."""

    cloud: Cloud
    gpus: int  # of each machine
    nodes: int
    spot: bool


def show(
    configs: Sequence[Config],
    stages: Sequence[Estimate],
    model: PreTrainedModel | None,
    rented: Rented,
    minutes: float | None,
) -> None:
    """Print the estimate of a command, and a warning if the model does not fit.

    `minutes` is what the whole command may take, if the user has said it.
    """
    name = configs[-1].model.pretrained
    if model is None:
        print(f"no estimate: the shape of {name} is not on this machine; with its config.json here, give -m FOLDER")
        return
    if not stages:
        print("no estimate: a stage of LLM-TRM takes as long as its model answers")
        return
    cloud = rented.cloud
    machines = f"{rented.nodes} x " if rented.nodes > 1 else ""
    where = f"{cloud.name}, {machines}{rented.gpus} x {cloud.gpu}{', spot' if rented.spot else ''}"
    print(f"estimate for {name} ({stages[0].parameters:,} parameters) on {where}:\n")
    for stage in stages:
        _show_stage(stage, cloud)
    _show_money(stages, rented, minutes)
    gpu = places.gpus()[cloud.gpu]
    for config, stage in zip(configs, stages, strict=True):
        if not fits(stage, gpu):
            scale = fitting_scale(config, model, cloud)
            other = f"it fits with --scale {scale} distributed=fsdp_multi"
            sizes = f"{short_size(stage.peak)} of each GPU, which has {short_size(gpu.memory)}"
            better = "no scale of this cloud has room" if scale is None else other
            print(f"warning: {stage.stage} takes {sizes}: {better}")


def figures(
    config: Config, stages: Sequence[Estimate], model: PreTrainedModel | None, rented: Rented
) -> dict[str, Any]:
    """What `show` prints, as plain values: bytes, hours and US dollars. What is not known is None, stages are none."""
    cloud, gpu = rented.cloud, places.gpus()[rented.cloud.gpu]
    spent = money(stages, cloud, rented.gpus * rented.nodes, rented.spot) if stages else None
    return {
        "model": config.model.pretrained,
        "parameters": None if model is None else int(model.num_parameters()),
        "cloud": cloud.name,
        "gpu": {"name": cloud.gpu, "memory": gpu.memory, "number": rented.gpus},
        "nodes": rented.nodes,
        "spot": rented.spot,
        "price": cloud.spot if rented.spot else cloud.price,  # of a GPU for an hour
        "prices_read": str(cloud.read),
        "cost": None if spent is None else list(spent),
        "stages": [{**asdict(stage), "peak": stage.peak, "fits": fits(stage, gpu)} for stage in stages],
    }


def _show_stage(stage: Estimate, cloud: Cloud) -> None:
    flops = places.gpus()[cloud.gpu].flops
    low, high = stage.hours
    limit = "" if stage.minutes is None else "; the stage's minutes end it"
    rows = [
        ["tokens", short_number(stage.tokens), f"{stage.steps:,} steps x {stage.tokens_per_step:,} tokens"],
        [
            "hours",
            _span(low, high),
            f"tokens x {stage.flops_per_token:.2g} operations / (GPUs x {flops:.3g} a second x "
            f"{EFFICIENCY[1]:.0%} to {EFFICIENCY[0]:.0%}){limit}",
        ],
        ["memory of a GPU", short_size(stage.peak), _parts(stage)],
        ["links", short_size(stage.traffic), "that leave a GPU in each step"],
        ["efficiency", f"{stage.efficiency:.0%}", "computing time / (computing + link time), nothing overlapped"],
    ]
    print_table([stage.stage, "", "how it comes about"], rows)
    print()


def _parts(stage: Estimate) -> str:
    return " + ".join(f"{name} {short_size(size)}" for name, size in stage.memory.items() if size)


def _span(low: float, high: float) -> str:
    ends = [spoken_time(3600 * hours) for hours in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _show_money(stages: Sequence[Estimate], rented: Rented, minutes: float | None) -> None:
    cloud, gpus, spot = rented.cloud, rented.gpus * rented.nodes, rented.spot
    price = cloud.spot if spot else cloud.price
    spent = money(stages, cloud, gpus, spot)
    if price is None or spent is None:
        print(f"cost: the price of {'a spot' if spot else 'a'} {cloud.gpu} at {cloud.name} is not known here\n")
        return
    if minutes is not None:
        spent = (min(spent[0], minutes / 60 * gpus * price), minutes / 60 * gpus * price)
    low, high = (f"${figure:,.2f}" if figure < 10 else f"${figure:,.0f}" for figure in spent)
    total = low if low == high else f"{low} to {high}"
    print(
        f"cost: {total} = hours x {gpus} GPUs x ${price:.2f} (prices read on {cloud.read}; not loading and packing)\n"
    )
