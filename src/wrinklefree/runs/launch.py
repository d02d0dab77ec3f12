"""Run a training stage, after the stages that it needs, in this process or in several."""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from wrinklefree.config.check import flatten
from wrinklefree.config.compose import load_config, read_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.signals import handling
from wrinklefree.runs import folder, prerequisites
from wrinklefree.runs.stage import train_stage
from wrinklefree.training import checkpoint

log = logging.getLogger("wrinklefree")

SAVING_SECONDS = 600  # how long torchrun waits for its processes to save after it was told to stop

# Settings that change where and how a stage runs, but not the model that it makes.
INCIDENTAL = (
    "auto_prereq",
    "model.auto_tokens",
    "model.trust_remote_code",
    "training.resume_from",
    "training.upload_to",
    "training.logging",
    "distributed",
    "data.max_passes",
    "data.allow_changes",
    "data.bad_rows",
)


def run_stage(overrides: list[str], *, force: bool = False, processes: int | None = None) -> None:
    """Train one stage with the settings in `overrides`. With `auto_prereq=true`, first train the stages it needs.

    `processes` is the number of processes that torchrun starts. None means one process, or one per GPU with FSDP. A
    process that torchrun has started ignores it.

    Raises UserError for anything that the user can fix.
    """
    config = load_config(overrides)
    if config.thinking is not None:
        verb = prerequisites.VERBS.get(config.training.stage, "trm")
        raise UserError(f"training={config.training.stage}: a stage of LLM-TRM: run it with `wf {verb}`")
    if config.auto_prereq:
        for stage in prerequisites.missing(config):
            log.info("%s needs %s: running it first", config.training.stage, stage)
            run_once([*prerequisites.prerequisite(config, stage), "auto_prereq=true"], False, processes)
    number = count_processes(config, processes)
    if number > 1:
        torchrun("train", number, overrides, force)
    else:
        train_stage(config, force)


def run_once(overrides: list[str], force: bool, processes: int | None) -> Config:
    """Run a stage and return its config. Resume it if it was interrupted, and skip it if it is done.

    A stage that was interrupted before it had a checkpoint starts over. `force` runs a finished one again.

    Raises UserError if a finished stage was made with other settings.
    """
    config = load_config(overrides)
    out = Path(config.output_dir)
    folder.mend(out)
    if prerequisites.is_done(out) and not force:
        _check_settings(config, out)
        log.info("%s: done, in %s", config.training.stage, out)
        return config
    log.info("== %s", config.training.stage)
    begun = checkpoint.step_folders(out / "checkpoints") or (out / folder.BLOCKS).is_dir()
    resume = [] if force or not begun else ["training.resume_from=latest"]
    # The model of a stage without steps has no checkpoint, and is made again at once.
    again = not resume and (config.training.max_steps == 0 or not (out / "final").exists())
    run_stage([*overrides, *resume], force=force or again, processes=processes)
    return config


def _check_settings(config: Config, out: Path) -> None:
    """Raise UserError if the finished stage in `out` was made with other settings than `config`."""
    before = dict(flatten(dataclasses.asdict(read_config(out / "final" / checkpoint.CONFIG))))
    now = dict(flatten(dataclasses.asdict(config)))
    for key, value in now.items():
        if key.startswith(INCIDENTAL) or value == "auto" or before[key] == value:
            continue
        raise UserError(
            f"{out}: made with {key}={before[key]}, but now it is {value}: choose another place with output_root=..., "
            f"or start over with --force"
        )


def count_processes(config: Config, asked: int | None) -> int:
    """The number of processes to train in; 1 means that this process trains.

    `asked` is what `--nproc` says. Raises UserError if it is more than this machine has GPUs.
    """
    if "RANK" in os.environ:  # torchrun has started this process, so it must not start others
        return 1
    gpus = torch.cuda.device_count()
    if asked is not None and gpus and asked > gpus:
        raise UserError(f"--nproc {asked}: each process needs a GPU of its own, this machine has {gpus}")
    return asked or (max(1, gpus) if config.distributed.strategy == "fsdp" else 1)


def torchrun(verb: str, processes: int, overrides: list[str], force: bool) -> None:
    """Run `wf VERB` in several processes and wait for them. Raises UserError if one of them fails."""
    command = [sys.executable, "-m", "wrinklefree.distributed.workers", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "wrinklefree.cli", verb, *overrides, *(["--force"] if force else [])]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    # When it is told to stop, torchrun tells its processes, which finish the step and save a checkpoint. By default it
    # kills them after 30 seconds, which is too short to save a large model.
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS)}
    # In a session of its own, so that a signal to this terminal's processes reaches it once, from here.
    process = subprocess.Popen(command, env=threads | patience | os.environ, start_new_session=True)
    with handling(process.send_signal):  # this process stays until torchrun has ended
        failed = process.wait()
    if failed:
        raise UserError("a training process failed; its message is above")
