"""Runs a stage: what has to come before it, in this process or in several."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from wrinklefree.config.compose import load_config, read_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import prerequisites
from wrinklefree.runs.stage import train_stage
from wrinklefree.training import checkpoint

log = logging.getLogger("wrinklefree")

SAVING_SECONDS = 1800

# Settings that say where and how a stage ran, not what it made.
INCIDENTAL = ("auto_prereq", "training.resume_from", "training.upload_to", "training.logging", "distributed")


def run_stage(overrides: list[str], *, force: bool = False, processes: int | None = None) -> None:
    """Train as the overrides say, with `auto_prereq` after the stages that are missing.

    `processes` are started by torchrun, unless this is one that it has started. None is one, or one for each GPU where
    parameters are to be sharded.

    Raises UserError for anything the user can mend.
    """
    config = load_config(overrides)
    if config.thinking is not None:
        raise UserError(f"training={config.training.stage}: a stage of LLM-TRM, which `wf trm` runs")
    if config.auto_prereq:
        for stage in prerequisites.missing(config):
            log.info("%s needs %s: running it first", config.training.stage, stage)
            run_stage([*prerequisites.prerequisite(config, stage), "auto_prereq=true"], processes=processes)
    number = count_processes(config, processes)
    if number > 1:
        torchrun("train", number, overrides, force)
    else:
        train_stage(config, force)


def run_once(overrides: list[str], force: bool, processes: int | None) -> Config:
    """Run a stage, go on with it, or skip what is done; its config. Raises UserError where it was made otherwise."""
    config = load_config(overrides)
    out = Path(config.output_dir)
    if prerequisites.is_done(out) and not force:
        _check_same(config, out)
        log.info("%s: done, in %s", config.training.stage, out)
        return config
    log.info("== %s", config.training.stage)
    resume = [] if force or not checkpoint.step_folders(out / "checkpoints") else ["training.resume_from=latest"]
    run_stage([*overrides, *resume], force=force, processes=processes)
    return config


def _check_same(config: Config, out: Path) -> None:
    """Raises UserError where the stage was run with other settings."""
    before = dict(_flat(dataclasses.asdict(read_config(out / "final" / checkpoint.CONFIG))))
    now = dict(_flat(dataclasses.asdict(config)))
    for key, value in now.items():
        if key.startswith(INCIDENTAL) or value == "auto" or before[key] == value:
            continue
        raise UserError(
            f"{out}: was made with {key}={before[key]}, now it is {value}: choose another place with output_root=..., "
            f"or start over with --force"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def count_processes(config: Config, asked: int | None) -> int:
    """How many processes to start; 1 is this one. Raises UserError where there are fewer GPUs than asked for."""
    if "RANK" in os.environ:
        return 1
    gpus = torch.cuda.device_count()
    if asked is not None and gpus and asked > gpus:
        raise UserError(f"--nproc {asked}: each process needs a GPU of its own, this machine has {gpus}")
    return asked or (max(1, gpus) if config.distributed.strategy == "fsdp" else 1)


def torchrun(verb: str, processes: int, overrides: list[str], force: bool) -> None:
    """Start this very training in several processes. Raises UserError when one fails."""
    command = [sys.executable, "-m", "wrinklefree.distributed.workers", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "wrinklefree.cli", verb, *overrides, *(["--force"] if force else [])]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    # torchrun hands Ctrl-C on to its processes, which finish the step and save; it would kill them half a minute later.
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS)}
    before = signal.signal(signal.SIGINT, lambda number, frame: None)  # this one waits for them
    try:
        failed = subprocess.run(command, check=False, env=threads | patience | os.environ).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if failed:
        raise UserError("a training process failed; its message is above")
