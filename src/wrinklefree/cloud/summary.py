"""Prints estimates for a person to decide by: each figure, and how it comes about."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from wrinklefree.cloud import places
from wrinklefree.cloud.estimate import Estimate, fits, fitting_scale, money
from wrinklefree.cloud.places import Cloud
from wrinklefree.cloud.thinker import fitting_cut
from wrinklefree.config.schema import Config
from wrinklefree.tracking.terminal import print_hanging, print_table, short_number, short_size, spoken_time


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
        why = f"the shape of {name} is not on this machine; with its config.json here, give -m FOLDER"
        print_hanging("no estimate: ", why)
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
            sizes = f"{short_size(stage.peak)} of each GPU, which has {short_size(gpu.memory)}"
            print_hanging("warning: ", f"{stage.stage} takes {sizes}: {_advice(config, model, cloud)}")


def _advice(config: Config, model: PreTrainedModel, cloud: Cloud) -> str:
    """What makes a stage fit that does not."""
    if config.thinking is not None:
        cut = fitting_cut(config, model, cloud)
        return "the model is too large for a GPU" if cut is None else f"it fits with {' '.join(cut)}"
    scale = fitting_scale(config, model, cloud)
    return (
        "no scale of this cloud has room" if scale is None else f"it fits with --scale {scale} distributed=fsdp_multi"
    )


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
    low, high = stage.hours
    limit = "" if stage.minutes is None else "; the stage's minutes end it"
    rows = [
        ["tokens", short_number(stage.tokens), stage.tokens_from],
        ["time", _span(low, high), stage.hours_from + limit],
        ["memory of a GPU", short_size(stage.peak), _parts(stage)],
    ]
    if stage.traffic:
        rows += [
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
        print(f"cost: the price of {'a spot' if spot else 'an'} {cloud.gpu} at {cloud.name} is not known here\n")
        return
    if minutes is not None:
        spent = (min(spent[0], minutes / 60 * gpus * price), minutes / 60 * gpus * price)
    low, high = (f"${figure:,.2f}" if figure < 10 else f"${figure:,.0f}" for figure in spent)
    total = low if low == high else f"{low} to {high}"
    number = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    print_hanging(
        "cost: ",
        f"{total} = hours x {number} x ${price:.2f} (price read on {cloud.read}; loading, evaluating and packing come "
        f"on top)",
    )
    print()
