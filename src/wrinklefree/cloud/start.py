"""Start a training somewhere else: check everything, say what it will take, then hand it to an engine."""

import dataclasses
import importlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from wrinklefree.cloud import estimate, here, job, places, summary, task, thinker, wheel
from wrinklefree.cloud.estimate import Estimate
from wrinklefree.cloud.job import Job, Request
from wrinklefree.cloud.places import Cloud
from wrinklefree.cloud.processes import for_scale
from wrinklefree.cloud.summary import Rented
from wrinklefree.cloud.task import Task
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.text import without_bucket
from wrinklefree.runs import dry_run as preview
from wrinklefree.runs import launch, preflight
from wrinklefree.runs.budget import parse_minutes
from wrinklefree.training import storage

log = logging.getLogger("wrinklefree")

# Programs and packages on a rented machine, besides what a run writes, and the least that is asked for.
PROGRAMS_GB, LEAST_GB = 40, 100

SETTINGS_THERE = ("training.upload_to", "training.resume_from")


def engine(name: str) -> ModuleType:
    """The module in cloud/engines that runs jobs of this kind."""
    return importlib.import_module(f"wrinklefree.cloud.engines.{name}")


def run_chain(
    chain: Sequence[list[str]],
    elsewhere: dict[str, Any] | None,
    *,
    dry_run: bool,
    force: bool,
    scale: str | None,
    processes: int | None,
    budget: str | None,
) -> list[Config]:
    """Train the stages of one command, whose overrides are in `chain`: here, or `elsewhere`, as `start` does.

    Returns the configs of the stages that have run here. With `dry_run`, or elsewhere, these are none.
    """
    if elsewhere is not None:
        start(chain, elsewhere, dry_run, budget)
        return []
    if dry_run:
        preview.show_chain([load_config(overrides) for overrides in chain])
        return []
    return launch.run_chain(chain, force, for_scale(scale, processes), budget)


def start(chain: Sequence[list[str]], request: dict[str, Any], dry_run: bool, budget: str | None = None) -> None:
    """Start `wf WORDS` somewhere else, whose stages have the overrides in `chain`.

    `request` has the fields of `Request`. `budget` is the time of the whole command, such as `2h`. With `dry_run`,
    print the task and the estimate and start nothing. Raises UserError for all that can be known to be wrong before
    anything is spent.
    """
    asked, minutes = Request(**request), None if budget is None else parse_minutes(budget)
    configs = [load_config(overrides) for overrides in chain]
    if asked.cloud is None:
        start_here(asked, configs)
    else:
        here.refuse_what_stays(chain, configs)
        start_there(asked, configs, dry_run, minutes)


def start_here(asked: Request, configs: Sequence[Config]) -> None:
    """Start the command behind the terminal."""
    folders = [str(Path(config.output_dir).absolute()) for config in configs]
    made = Job(job.new_name(asked.verb, configs[-1]), asked.verb, "background", "this machine", time.time())
    number = engine("background").launch(made, asked.words)
    job.save(dataclasses.replace(made, id=number, folders=folders))
    _say_next(made.name, "runs in the background")


def start_there(asked: Request, configs: list[Config], dry_run: bool, minutes: float | None) -> None:
    """Launch the command on rented machines."""
    assert asked.cloud is not None
    cloud = places.find_cloud(asked.cloud)
    gpus = 1 if asked.scale is None else places.scales()[asked.scale].gpus
    places.check_size(cloud, gpus, asked.nodes, asked.spot)
    if asked.verb == "trm" and gpus * asked.nodes > 1:
        raise UserError("wf trm trains in one process: --scale dev or small, and no --nodes")
    made = Job(
        job.new_name(asked.verb, configs[-1]),
        asked.verb,
        "hub" if cloud.name == "hf" else "sky",
        cloud.name,
        time.time(),
    )
    to = place_of(asked, configs[-1])
    plan = Task(
        name=made.name,
        infra=asked.cloud,
        gpu=cloud.gpu,
        gpus=gpus,
        nodes=asked.nodes,
        spot=asked.spot,
        disk_gb=LEAST_GB,
        words=words_there(asked, configs[-1], to),
        bucket=task.split_bucket(to),
        package=str(made.folder / wheel.wheel_name()) if wheel.is_checkout() else wheel.released(),
        constraints=_constraints(),
    )
    model = estimate.skeleton(configs[-1])
    if model is not None:
        needed = max(preflight.checkpoint_bytes(config, int(model.num_parameters())) for config in configs)
        plan = dataclasses.replace(plan, disk_gb=max(LEAST_GB, PROGRAMS_GB + int(needed * len(configs) / 1e9)))
    stages = [] if model is None else estimates(configs, model, cloud, gpus, asked.nodes)
    print(task.task_yaml(plan) if made.engine == "sky" else engine("hub").describe(plan), end="")
    print()
    summary.show(configs, stages, model, Rented(cloud, gpus, asked.nodes, asked.spot), minutes)
    if dry_run:
        log.info("dry run: nothing was launched, nothing was written")
        return
    _launch(made, plan, to, asked, configs)


def show_estimate(config: Config, rented: Rented) -> None:
    """Print what one stage takes on such machines."""
    model = estimate.skeleton(config)
    stages = [] if model is None else estimates([config], model, rented.cloud, rented.gpus, rented.nodes)
    summary.show([config], stages, model, rented, None)


def estimates(configs: list[Config], model: Any, cloud: Cloud, gpus: int, nodes: int) -> list[Estimate]:
    """What each stage takes; one of LLM-TRM takes one GPU."""
    return [
        estimate.estimate(config, model, cloud, gpus, nodes)
        if config.thinking is None
        else thinker.estimate_thinker(config, model, cloud)
        for config in configs
    ]


def _launch(made: Job, plan: Task, to: str, asked: Request, configs: list[Config]) -> None:
    """Check the engine and the store, build the package, and launch."""
    runner = engine(made.engine)
    runner.check()
    storage.check_writable(to)
    if storage.names(to) and not _resumes(configs):
        raise UserError(
            f"{without_bucket(to)}: holds a run already: go on with training.resume_from=latest, or choose another "
            f"place with training.upload_to=..."
        )
    made.folder.mkdir(parents=True, exist_ok=True)
    if wheel.is_checkout():
        log.info("building a wheel of %s", wheel.CHECKOUT.name)
        wheel.build(made.folder)
    (made.folder / job.TASK).write_text(task.task_yaml(plan), encoding="utf-8")
    job.save(made)  # before the launch: a job that was begun can be cancelled, whatever happens next
    number = runner.launch(made, plan, asked.detach)
    job.save(dataclasses.replace(made, id=number))
    _say_next(made.name, f"launched on {made.cloud}")


def _say_next(name: str, what: str) -> None:
    print(f"{name}: {what}")
    print(f"next: wf logs {name} -f    wf cancel {name}    wf runs")


def _resumes(configs: list[Config]) -> bool:
    return any(config.training.resume_from is not None for config in configs)


def place_of(asked: Request, config: Config) -> str:
    """The address that checkpoints go to: training.upload_to, or BUCKET/VERB/MODEL.

    Raises UserError if there is no bucket, because a rented machine loses its disk.
    """
    if config.training.upload_to is not None:
        task.store_of(config.training.upload_to)
        return config.training.upload_to.rstrip("/")
    if asked.bucket is None:
        raise UserError(
            "--cloud: a rented machine loses its disk: say where checkpoints go with --bucket gs://NAME (or s3://NAME) "
            f"or {task.BUCKET}"
        )
    task.store_of(asked.bucket)
    return f"{asked.bucket.rstrip('/')}/{asked.verb}/{config.model.name}"


def words_there(asked: Request, config: Config, to: str) -> list[str]:
    """The words behind `wf` on a rented machine. The run goes on from what is in the store, if there is anything."""
    words = [word for word in asked.words if not word.startswith(SETTINGS_THERE)]
    begun = config.training.resume_from
    resume = "latest" if begun in (None, "latest") else f"latest,{begun}"
    words += [f"training.upload_to={to}", f"training.resume_from={resume}"]
    given = [word.partition("=")[0] for word in words]
    if "WANDB_API_KEY" in task.set_here(task.ALWAYS) and "training.logging.wandb.enabled" not in given:
        words.append("training.logging.wandb.enabled=true")
    return words


def _constraints() -> str | None:
    """The versions that the tests ran with, if this is a checkout."""
    path = wheel.CHECKOUT / "constraints.txt"
    return str(path) if wheel.is_checkout() and path.is_file() else None
