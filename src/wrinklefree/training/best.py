"""Keeps the best model so far. Each checkpoint has its step, so a resumed run finds the best model of that time.

    best/            the model with the lowest held-out loss, and `progress.json` with its step
    .best_before/    the one before it, until a checkpoint knows of the new one
    checkpoints/step_N/best/    that of a checkpoint which is uploaded: another machine has nothing else to go on from

A killed run resumes from its newest checkpoint, which may know the older of the two.
"""

import logging
import math
import os
import shutil
from pathlib import Path

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json, written_aside
from wrinklefree.distributed.world import gather
from wrinklefree.training import checkpoint
from wrinklefree.training.state import TrainingState

log = logging.getLogger("wrinklefree")

BEST, BEFORE = "best", ".best_before"


def keep(run: TrainingState, loss: float) -> None:
    """Save the model as the best so far. Every process has to call this."""
    best, before = run.out / BEST, run.out / BEFORE
    if run.world.is_main and best.is_dir() and step_in(best) == run.saved_best_step:
        shutil.rmtree(before, ignore_errors=True)
        best.rename(before)
    run.best_step = run.step
    run.save(BEST, progress={"step": run.step, "eval_loss": loss})


def checkpoint_saved(run: TrainingState) -> None:
    """A checkpoint now knows of the best model, so the one before it can go."""
    run.saved_best_step = run.best_step
    if run.world.is_main:
        shutil.rmtree(run.out / BEFORE, ignore_errors=True)


def add_to(run: TrainingState, folder: Path) -> None:
    """Put the best model into a checkpoint folder, unless it is that checkpoint. Files are linked where that works."""
    best = run.out / BEST
    if run.best_step in (None, run.step) or step_in(best) != run.best_step:
        return
    with written_aside(folder / BEST) as aside:
        shutil.copytree(best, aside, dirs_exist_ok=True, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def resume(run: TrainingState, resumed_from: Path) -> None:
    """Put back the best model that the checkpoint knows of. Every process has to call this.

    If it is gone, because the run goes back to an early checkpoint, the best model is looked for anew.
    """
    run.saved_best_step = run.best_step
    if not run.training.keep_best or run.best_step is None:
        return
    found = gather(_put_back(run, resumed_from) if run.world.is_main else None, run.world)[0]
    if not found:
        log.info("the best model so far, of step %d, is gone: from here on it is looked for anew", run.best_step)
        run.best_loss, run.best_step, run.saved_best_step, run.stale = math.inf, None, None, 0


def _put_back(run: TrainingState, resumed_from: Path) -> bool:
    """Whether `best/` is now the model of `run.best_step`. Raises UserError if its checkpoint cannot be copied."""
    best, before = run.out / BEST, run.out / BEFORE
    if step_in(best) == run.best_step:
        return True
    shutil.rmtree(best, ignore_errors=True)
    if step_in(before) == run.best_step:
        before.rename(best)
        return True
    if step_in(resumed_from / BEST) == run.best_step:
        with written_aside(best) as aside:
            shutil.copytree(resumed_from / BEST, aside, dirs_exist_ok=True, copy_function=_link)
        return True
    saved = resumed_from.parent / f"step_{run.best_step}"
    if not (saved / checkpoint.WEIGHTS).is_file():
        return False
    with written_aside(best) as aside:
        try:
            shutil.copytree(saved, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("state"))
        except shutil.Error as error:  # it lists (from, to, reason) of each file
            path, _, reason = error.args[0][0]
            raise UserError(f"{path}: cannot be copied to {best}: {reason}") from error
        checkpoint.write_progress(aside, {"step": checkpoint.step_of(saved), "eval_loss": run.best_loss})
    return True


def step_in(folder: Path) -> int | None:
    """The step of the model in a folder; None if there is none, or it was saved by version 0.1."""
    file = folder / checkpoint.PROGRESS
    if not file.is_file():
        return None
    step: int = read_json(file)["step"]
    return step
