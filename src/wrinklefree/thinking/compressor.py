"""Phase 1: a compressor of hidden states, in closed form, by training, or by both; and a sweep over D'.

One pass over text gives the second moments of the states (`thinking/gathering.py`), and the moments give the best
compressor of every size. Training starts from this compressor or from random weights; the objective kl needs it.

Stage 1b starts from a finished stage 1a. It mixes the moments of its own text, which are thoughts, with those of stage
1a, and solves again. With random weights (thinking.init=orthogonal) it trains those of stage 1a further.
"""

import dataclasses
import logging
from pathlib import Path

from torch import nn

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import prerequisites
from wrinklefree.runs.folder import resume_point
from wrinklefree.thinking import gathering, loading, results
from wrinklefree.thinking.bench import Bench, Made, open_bench
from wrinklefree.thinking.gathering import Gathered
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.reconstruction import TRAINED_METRICS, Figures, Reconstruction

log = logging.getLogger("wrinklefree")


def make_compressor(config: Config, force: bool) -> Path:
    """Make one compressor, and return its folder `final/`. Raises UserError for anything that the user can mend."""
    start = prerequisites.starting_folder(config)
    bench = open_bench(config, force)
    with bench.run:
        return _make_one(bench, start, force)


def _make_one(bench: Bench, start: Path | None, force: bool) -> Path:
    config, thinker = bench.run.config, bench.thinker()
    earlier = None if start is None else _earlier(start, config, thinker)
    bench.run.begin()
    found = _gather(bench, force)
    seen = int(found.moments.count)
    if earlier is not None:
        found = earlier.mixed(found, loading.settings_of(config).thought_share)
    made = _make(bench, thinker, found, anew=earlier is None)
    if bench.run.is_main:
        results.report(bench, made, found, seen)
    gathering.forget(bench.run.out, bench.run.world)
    return made.final


def _gather(bench: Bench, force: bool) -> Gathered:
    """Run the pass over the text, or go on with it; with `force`, from its beginning."""
    if force:
        gathering.forget(bench.run.out, bench.run.world)
    return bench.gather()


def sweep_compressors(config: Config, values: list[int], force: bool) -> Path:
    """Make a compressor of each size in `values` from one pass, in folders d64/, d128/, ...; their common folder.

    Sizes wider than the model's states are left out, with a line that says so. Raises UserError if none is left.
    """
    if config.training.start_from or config.training.resume_from is not None:
        raise UserError("a sweep starts from nothing: leave out training.start_from and training.resume_from")
    whole = open_bench(config, force)
    sizes = _fitting(values, whole.width)
    benches = [whole.sized(_sized(config, size)) for size in sizes]
    for bench in benches if whole.run.is_main else ():
        resume_point(bench.run.config, force)
    with whole.run:
        return _sweep(whole, benches, force)


def _sweep(whole: Bench, benches: list[Bench], force: bool) -> Path:
    for bench in (whole, *benches):
        bench.run.begin()
    found = _gather(whole, force)
    made = [_make(bench, bench.thinker(), found) for bench in benches]
    if whole.run.is_main:
        results.report_sweep(whole, made, found)
    gathering.forget(whole.run.out, whole.run.world)
    return whole.run.out


def _fitting(values: list[int], width: int) -> list[int]:
    """The sizes that are no wider than the states, in order. Raises UserError if there is none."""
    for value in sorted(set(values)):
        if value > width:
            log.info("D'=%d left out: the model's hidden states have %d entries", value, width)
    fitting = sorted({value for value in values if 0 < value <= width})
    if not fitting:
        raise UserError(f"sweep: no size between 1 and {width}, which the model's hidden states have")
    return fitting


def _sized(config: Config, size: int) -> Config:
    """The config of one compressor of a sweep: its D', and a folder and a W&B run of its own."""
    training, wandb = config.training, config.training.logging.wandb
    logging_ = dataclasses.replace(
        training.logging, wandb=dataclasses.replace(wandb, name=f"{wandb.name or 'sweep'}_d{size}")
    )
    return dataclasses.replace(
        config,
        output_dir=f"{config.output_dir}/d{size}",
        thinking=dataclasses.replace(loading.settings_of(config), d_compressed=size),
        training=dataclasses.replace(training, logging=logging_),
    )


def _earlier(path: Path, config: Config, thinker: LatentThinker) -> Gathered:
    """What stage 1a gathered; its weights are copied into `thinker`. Raises UserError if the two do not fit."""
    before, its = loading.load_thinker(path)
    mine, other = thinker.config, before.config
    for key, name in {"width": "hidden size", "d_compressed": "thinking.d_compressed"}.items():
        if vars(mine)[key] != vars(other)[key]:
            raise UserError(f"{path}: {name} {vars(other)[key]}, this run has {vars(mine)[key]}: they have to be equal")
    wanted, given = loading.settings_of(config).objective, loading.settings_of(its).objective
    if (wanted == "fisher") != (given == "fisher"):
        raise UserError(
            f"{path}: made with thinking.objective={given}, this run has {wanted}: run stage 1a with {wanted}"
        )
    thinker.compressor.load_state_dict(before.compressor.state_dict())
    return gathering.read_gathered(loading.thinker_folder(path))


def _make(bench: Bench, thinker: LatentThinker, found: Gathered, anew: bool = True) -> Made:
    """Set the weights as `thinking.init` says, train them if there are steps, and save everything."""
    settings, steps = loading.settings_of(bench.run.config), bench.run.plan.max_steps
    if settings.init == "pca":
        found.solve(settings.objective).put(thinker.compressor)
        if settings.objective == "kl" and not steps:
            log.info("objective kl has no closed form: without training.max_steps this is PCA, the optimum of mse")
    elif anew and not steps:
        log.warning("thinking.init=orthogonal without training.max_steps: the compressor stays random")
    objective = Reconstruction(thinker.compressor, bench.decoder, settings.objective, found.mean_metric)

    def evaluate(model: nn.Module) -> Figures:
        figures = objective.measure(bench.watched, {"": thinker.compressor})[0][""]
        shown = {f"eval_{name}": value for name, value in figures.items()}
        # Batches give a curve of each, under its plain name. Without a step, these are the only figures.
        return shown if steps else shown | {name: figures[name] for name in TRAINED_METRICS}

    final = bench.run.fit(thinker, objective, stream=bench.stream(), evaluate=evaluate)
    if bench.run.is_main:
        found.save(final)
    return Made(bench.run.config, thinker, objective, final)
