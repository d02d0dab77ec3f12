"""Services that show runs beside one another: Weights & Biases, and Trackio, which needs no account.

A run's numbers go there as they go to `training_log.csv`, by the same settings. Each service is an extra.
"""

import contextlib
import importlib
import io
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import yaml

from wrinklefree.config.schema import WandbConfig
from wrinklefree.core.errors import UserError

log = logging.getLogger("wrinklefree")

WANDB_ID = "wandb_run_id"  # a file with the id of the W&B run, which a resumed training continues


class Service(Protocol):
    """What is used of a service's run."""

    def log(self, data: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


def check_service(name: str, what: str = "training.logging.wandb.enabled=true") -> None:
    """Raises UserError if the package of a service is not installed, which `what` needs."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs the {name} package: pip install 'wrinklefree[{name}]'") from error


def start_service(out_dir: Path, config: WandbConfig, settings: str, start_step: int) -> Service:
    """Start a run of the service for this folder. A resumed training goes on with its run.

    `settings` is the resolved config as YAML. Raises UserError if the service is not installed.
    """
    check_service(config.service)
    start = {"wandb": _start_wandb, "trackio": _start_trackio}[config.service]
    return start(out_dir, config, yaml.safe_load(settings), start_step)


def _start_wandb(out_dir: Path, config: WandbConfig, settings: dict[str, Any], start_step: int) -> Service:
    import wandb

    run_id = out_dir / WANDB_ID
    offline = not {"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys()
    run: Any = wandb.init(
        project=config.project,
        name=config.name or out_dir.name,
        tags=config.tags,
        config=settings,
        dir=str(out_dir),
        mode="offline" if offline else None,
        id=run_id.read_text().strip() if start_step and run_id.exists() else None,
        resume="allow",
        settings=wandb.Settings(silent=True),
    )
    run_id.write_text(run.id + "\n")
    if offline:
        log.info(
            "W&B: no WANDB_API_KEY, so the run is recorded under %s; upload it with `wandb sync`", out_dir / "wandb"
        )
    service: Service = run
    return service


def _start_trackio(out_dir: Path, config: WandbConfig, settings: dict[str, Any], start_step: int) -> Service:
    import trackio

    with contextlib.redirect_stdout(io.StringIO()):  # its banner would stand in the progress bar
        run: Any = trackio.init(
            project=config.project,
            name=config.name or out_dir.name,
            group=config.tags[0] if config.tags else None,
            config=settings,
            resume="allow" if start_step else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    log.info("Trackio: run %s; see it with `trackio show --project %s`", run.name, config.project)
    return QuietTrackio(run)


class QuietTrackio:
    """A run of Trackio that does not print."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, data: dict[str, float], step: int) -> None:
        self.run.log(data, step=step)

    def finish(self) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # not run.finish(): the package would finish that run again at the end, and print
