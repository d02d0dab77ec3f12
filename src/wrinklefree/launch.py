"""Runs a stage: what has to come before it, in this process or in several."""

import logging
import os
import signal
import subprocess
import sys

import torch

from wrinklefree import config as configs
from wrinklefree import pipeline, stages
from wrinklefree.config import Config
from wrinklefree.core.errors import UserError

log = logging.getLogger("wrinklefree")

SAVING_SECONDS = 1800


def run(overrides: list[str], *, force: bool = False, processes: int | None = None) -> None:
    """Train as the overrides say, with `auto_prereq` after the stages that are missing.

    `processes` are started by torchrun, unless this is one that it has started. None is one, or one for each GPU where
    parameters are to be sharded.

    Raises UserError for anything the user can mend.
    """
    config = configs.load(overrides)
    if config.auto_prereq:
        for stage in stages.missing(config):
            log.info("%s needs %s: running it first", config.training.stage, stage)
            run([*stages.prerequisite(config, stage), "auto_prereq=true"], processes=processes)
    number = count_processes(config, processes)
    if number > 1:
        torchrun("train", number, overrides, force)
    else:
        pipeline.train(config, force)


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
    command = [sys.executable, "-m", "wrinklefree.workers", "--standalone", f"--nproc_per_node={processes}"]
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
