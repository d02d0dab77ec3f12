"""Run a training stage, after the stages that it needs, in this process or in several."""

import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from wrinklefree.config.check import flatten
from wrinklefree.config.compose import load_config, read_config
from wrinklefree.config.schema import Config
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.core.signals import handling
from wrinklefree.distributed.nodes import this_node
from wrinklefree.runs import folder, mirror, prerequisites, remote_paths
from wrinklefree.runs.budget import STEP_SIZE, CommandBudget, command_budget
from wrinklefree.runs.stage import train_stage
from wrinklefree.training import checkpoint

log = logging.getLogger("wrinklefree")

SAVING_SECONDS = 600  # how long torchrun waits for its processes to save after it was told to stop

# Settings that change where and how a stage runs, but not the model that it makes.
INCIDENTAL = (
    "auto_prereq",
    "model.auto_minutes",
    "model.auto_tokens",
    "model.trust_remote_code",
    "training.budget_minutes",
    "training.budget_share",
    "training.max_minutes",
    "training.resume_from",
    "training.upload_to",
    "training.logging",
    "distributed",
    "data.max_passes",
    "data.allow_changes",
    "data.bad_rows",
)


def run_stage(
    overrides: list[str],
    *,
    force: bool = False,
    processes: int | None = None,
    budget: CommandBudget | None = None,
    later: Sequence[float] = (),
) -> None:
    """Train one stage with the settings in `overrides`. With `auto_prereq=true`, first train the stages it needs.

    `processes` is the number of processes that torchrun starts. None means one process, or one per GPU with FSDP. A
    process that torchrun has started ignores it. The stage and those that it needs share `budget` with the stages that
    the command runs after them, whose shares are `later`.

    Raises UserError for anything that the user can fix.
    """
    overrides = remote_paths.fetched(overrides)
    config = load_config(overrides)
    if config.thinking is not None:
        verb = prerequisites.VERBS.get(config.training.stage, "trm")
        raise UserError(f"training={config.training.stage}: a stage of LLM-TRM: run it with `wf {verb}`")
    mirror.bring_back(config)
    if mirror.resumes_latest(config) and prerequisites.is_done(Path(config.output_dir)) and not force:
        log.info("%s: done, in %s", config.training.stage, config.output_dir)
        mirror.send_missing(config)
        return
    overrides = _without_latest(overrides, config)
    config = load_config(overrides)
    needed = needed_stages(config)
    for number, stage in enumerate(needed):
        log.info("%s needs %s: running it first", config.training.stage, stage)
        others = needed[number + 1 :]
        shares = [] if budget is None else [*shares_of(budget, config, overrides, others).values(), *later]
        run_once(_needed(config, stage), False, processes, budget, shares)
    minutes = [] if budget is None else budget.settings(overrides, config, later)
    if minutes:
        overrides = [*overrides, *minutes]
        config = load_config(overrides)
    number = count_processes(config, processes)
    if number > 1 or (this_node().count > 1 and "RANK" not in os.environ):
        torchrun("train", number, overrides, force)
    else:
        train_stage(config, force)
    if "RANK" not in os.environ:  # a process of torchrun is not the whole run
        mirror.send(config)


def _without_latest(overrides: list[str], config: Config) -> list[str]:
    """The overrides of a run that may be new: with a store, `resume_from=latest` goes on if there is a checkpoint.

    Without a store it stays, and a run without a checkpoint is an error.
    """
    resume = config.training.resume_from
    if config.training.upload_to is None or not mirror.resumes_latest(config) or mirror.begun(config):
        return overrides
    assert resume is not None
    other = ",".join(name for name in resume.split(",") if name != "latest")
    log.info("%s: no checkpoint here or in the store yet: %s", config.output_dir, other or "a new run")
    return [*overrides, setting("training.resume_from", other) if other else "training.resume_from=null"]


def needed_stages(config: Config) -> list[str]:
    """The stages that run before this one, because it needs them, they are missing, and `auto_prereq` allows it."""
    return prerequisites.missing(config) if config.auto_prereq else []


def _needed(config: Config, stage: str) -> list[str]:
    """The overrides of a stage that this one needs. In a store it lies beside this one."""
    url = config.training.upload_to
    beside = [] if url is None else [_upload_to(url.rstrip("/").rpartition("/")[0], stage)]
    resume = ["training.resume_from=latest"] if beside and mirror.resumes_latest(config) else []
    return [*prerequisites.prerequisite(config, stage), "auto_prereq=true", *beside, *resume]


def shares_of(budget: CommandBudget, config: Config, overrides: list[str], needed: Sequence[str]) -> dict[str, float]:
    """The shares of a budget by the stages' names: of the stages `needed` for a stage, and of this stage itself."""
    before = {stage: _needed(config, stage) for stage in needed}
    shares = {stage: budget.share(settings, load_config(settings)) for stage, settings in before.items()}
    return shares | {config.training.stage: budget.share(overrides, config)}


def run_chain(chain: Sequence[list[str]], force: bool, processes: int | None, budget: str | None) -> list[Config]:
    """Run stages one after the other, each by its overrides, and return their configs.

    `budget` is what `--budget` says. Raises UserError as `run_once` does.
    """
    chain = [_in_own_place(remote_paths.fetched(overrides)) for overrides in chain]
    configs = [load_config(overrides) for overrides in chain]
    minutes = command_budget(budget, configs[-1])
    shares = dict[str, float]()
    if minutes is not None:
        for overrides, config in zip(chain, configs, strict=True):
            done = prerequisites.is_done(Path(config.output_dir)) and not force
            shares[config.training.stage] = 0.0 if done else minutes.share(overrides, config)
        minutes.say(shares)
    finished = []
    for number, overrides in enumerate(chain):
        finished.append(run_once(overrides, force, processes, minutes, [*shares.values()][number + 1 :]))
    return finished


def _in_own_place(overrides: list[str]) -> list[str]:
    """The overrides of one of several stages, whose checkpoints go to a folder of their own in the store."""
    config = load_config(overrides)
    url = config.training.upload_to
    return overrides if url is None else [*overrides, _upload_to(url, config.training.stage)]


def _upload_to(url: str, stage: str) -> str:
    return setting("training.upload_to", mirror.stage_url(url, stage))


def run_once(
    overrides: list[str],
    force: bool,
    processes: int | None,
    budget: CommandBudget | None = None,
    later: Sequence[float] = (),
) -> Config:
    """Run a stage and return its config. Resume it if it was interrupted, and skip it if it is done.

    A stage that was interrupted before it had a checkpoint starts over. `force` runs a finished one again. `budget` and
    `later` are as for `run_stage`.

    Raises UserError if a finished stage was made with other settings.
    """
    config = load_config(overrides)
    out = Path(config.output_dir)
    folder.mend(out)
    if not force:
        mirror.bring_back(config)
    if prerequisites.is_done(out) and not force:
        _check_settings(config, out, apart=() if budget is None else STEP_SIZE)
        log.info("%s: done, in %s", config.training.stage, out)
        mirror.send_missing(config)
        return config
    log.info("== %s", config.training.stage)
    begun = mirror.begun(config)
    resume = [] if force or not begun else ["training.resume_from=latest"]
    # The model of a stage without steps has no checkpoint, and is made again at once.
    again = not resume and (config.training.max_steps == 0 or not (out / "final").exists())
    settings = [*overrides, *resume]
    run_stage(settings, force=force or again, processes=processes, budget=budget, later=later)
    return config


def _check_settings(config: Config, out: Path, apart: tuple[str, ...]) -> None:
    """Raise UserError if the finished stage in `out` was made with other settings than `config`, `apart` from some."""
    before = dict(flatten(dataclasses.asdict(read_config(out / "final" / checkpoint.CONFIG))))
    now = dict(flatten(dataclasses.asdict(config)))
    for key, value in now.items():
        if key.startswith((*INCIDENTAL, *apart)) or value == "auto" or before[key] == value:
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
    command = [sys.executable, "-m", "wrinklefree.distributed.workers", *this_node().torchrun_options()]
    command += [f"--nproc_per_node={processes}"]
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
