"""A run's output folder: what is in it, which checkpoint to resume from, and how it is cleared."""

import itertools
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wrinklefree.config.check import flatten
from wrinklefree.config.compose import read_config
from wrinklefree.config.schema import Config
from wrinklefree.core import replaced
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json
from wrinklefree.core.lock import locked
from wrinklefree.runs import prerequisites
from wrinklefree.runs.report import RESULTS
from wrinklefree.tracking.run_log import CSV_NAME
from wrinklefree.training import best, checkpoint, uploads

log = logging.getLogger("wrinklefree")

# What a run writes into its folder. `--force` replaces these and leaves everything else alone.
BLOCKS = "blocks"  # what reconstruction made so far
PLAN = "plan.json"  # in it
TEXT_KINDS = tuple(f"data.self_{key}" for key in ("tokens", "length", "chat", "temperature", "top_p", "seed"))
MADE_OF_CHECKPOINTS = ["best", "final", "packed", "shipped", "plots", RESULTS, uploads.RECORD]
SAVED = ["best", "final", RESULTS]
OUTPUTS = ["checkpoints", BLOCKS, *MADE_OF_CHECKPOINTS, CSV_NAME]


def resume_point(config: Config, force: bool) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run.

    Nothing is written or removed, but if a run with `--force` was killed before it had saved anything, the run that it
    was to replace is put back.

    Raises UserError if another process trains in the output folder, or if the folder already holds a run, unless
    - `training.resume_from` is set,
    - `force` is given, or
    - this run starts from the model of that run.
    """
    out = Path(config.output_dir)
    _check_folder(out)
    mend(out)
    if config.training.resume_from is not None and not _between_blocks(config):
        folder = checkpoint.find_checkpoint(config.training.resume_from, out)
        log.info("resuming from %s", folder)
        return folder
    _refuse_held(config, force)
    return None


def _refuse_held(config: Config, force: bool) -> None:
    """Raises UserError if the output folder holds a run that is neither to be replaced nor started from."""
    out = Path(config.output_dir)
    if outputs(out) and not force and not starts_within(config) and not _between_blocks(config):
        offer = "go on with training.resume_from=latest, " if can_go_on(out) else ""
        raise UserError(f"{out} already holds a run: {offer}choose another output_dir=..., or start over with --force")


def can_go_on(out: Path) -> bool:
    """Whether the run in `out` has saved anything that `training.resume_from=latest` goes on from."""
    return bool(checkpoint.step_folders(out / "checkpoints")) or (out / BLOCKS).is_dir()


def _between_blocks(config: Config) -> bool:
    """Whether the run is to go on, and was interrupted while its blocks were rebuilt: it has no checkpoint yet."""
    out = Path(config.output_dir)
    has_steps = bool(checkpoint.step_folders(out / "checkpoints"))
    return config.training.resume_from == "latest" and (out / BLOCKS).is_dir() and not has_steps


def text_of(config: Config, resume: Path | None) -> str | None:
    """The file of own text that the run which goes on has learned from.

    None if this is a new run, if it is to have text of another kind, or if the file is gone.
    """
    if resume is not None:
        before = flatten({"data": asdict(read_config(resume / checkpoint.CONFIG).data)})
    elif _between_blocks(config) and (plan := Path(config.output_dir) / BLOCKS / PLAN).is_file():
        before = blocks_plan(plan)["settings"].items()
    else:
        return None
    earlier = dict(before)
    kind = {key: value for key, value in flatten({"data": asdict(config.data)}) if key.startswith(TEXT_KINDS)}
    path = earlier.get("data.path")
    same = all(earlier.get(key) == value for key, value in kind.items())
    return path if same and isinstance(path, str) and Path(path).is_file() else None


def blocks_plan(file: Path) -> dict[str, Any]:
    """Read the plan beside blocks: the `steps` of each, and the `settings` that make them what they are.

    Raises UserError if the file is broken.
    """
    plan = read_json(file)
    kinds = {"steps": int, "settings": dict}
    if not isinstance(plan, dict) or not all(isinstance(plan.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{file}: not the plan of a run; start over with --force")
    return plan


def _check_folder(out: Path) -> None:
    """Raises UserError if `out` cannot be a folder, because it or one above it is a file."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise UserError(f"output_dir={out}: {existing} is a file, and a run needs a folder: choose another output_dir")


def clear(config: Config) -> None:
    """Move what an earlier run wrote into the output folder out of the way.

    It is removed once the new run has saved a model. If the new run starts from the model of the earlier one, that goes
    to `earlier_1/` (or the next free number), and stays.
    """
    out = Path(config.output_dir)
    if not outputs(out) or _between_blocks(config):
        return
    if starts_within(config):
        log.info("%s: the run that this one starts from is now in %s", out, keep_earlier(out))
    else:
        replaced.set_aside(out, outputs(out))


def keep_earlier(out: Path) -> Path:
    """Move the run in `out` to `earlier_1/` in it, or the next free number, and return that folder."""
    return replaced.move(outputs(out), _unused(out, "earlier"))


@contextmanager
def writing(config: Config, resume: Path | None, force: bool) -> Iterator[None]:
    """Lock the output folder while the block runs. For a new run, make it ready; a resumed one calls `go_on` later.

    Raises UserError if another process trains there, or has trained there since `resume_point` looked.
    """
    out = Path(config.output_dir)
    with locked(out):
        put_back(out)
        if resume is None:
            _refuse_held(config, force)
            clear(config)
        try:
            yield
        finally:
            put_back(out)


def mend(out: Path) -> None:
    """Put the run in `out` back if one with `--force` was killed before it had saved anything.

    Raises UserError if another process trains there.
    """
    if out.is_dir():
        with locked(out):
            put_back(out)


def put_back(out: Path) -> None:
    """If the run in `out` was to be replaced, but the new one has saved no model and no results, put it back."""
    new = outputs(out)
    saved = any((out / name).exists() for name in SAVED) or bool(checkpoint.step_folders(out / "checkpoints"))
    if replaced.settle(out, new, saved):
        log.info("%s: the earlier run is there again, because no model of the new one was saved", out)


def go_on(out: Path, resume: Path) -> None:
    """Make the folder ready for a run that goes on from the checkpoint `resume`.

    Results are removed, for they are of the run as it was. Checkpoints that do not lead to `resume`, and what was made
    of them, are moved to `abandoned_1/` (or the next free number). So the newest is always of the branch that runs. The
    best model stays if it is of a step up to that of `resume`.
    """
    own = checkpoint.step_folders(out / "checkpoints")
    inside = resume.resolve().parent == (out / "checkpoints").resolve()
    abandoned = [path for path in own if not inside or checkpoint.step_of(path) > checkpoint.step_of(resume)]
    if abandoned:
        kept = _unused(out, "abandoned")
        replaced.move(abandoned, kept / "checkpoints")
        best_step = best.step_in(out / best.BEST)
        stays = inside and best_step is not None and best_step <= checkpoint.step_of(resume)
        for name in MADE_OF_CHECKPOINTS:
            if (out / name).exists() and not (name == best.BEST and stays):
                (out / name).rename(kept / name)
        if (out / CSV_NAME).is_file():
            shutil.copy2(out / CSV_NAME, kept)
        log.info("going back to %s: what came after it is now in %s", resume.name, kept)
    (out / RESULTS).unlink(missing_ok=True)


def _unused(out: Path, name: str) -> Path:
    return next(path for n in itertools.count(1) if not (path := out / f"{name}_{n}").exists())


def starts_within(config: Config) -> bool:
    """Whether this run starts from a model that lies in its own output folder."""
    start = prerequisites.starting_folder(config)
    held = [path.resolve() for path in outputs(Path(config.output_dir))]
    return start is not None and any(path in (start.resolve(), *start.resolve().parents) for path in held)


def outputs(out: Path) -> list[Path]:
    """The files and folders in `out` that a run has written."""
    return [out / name for name in OUTPUTS if (out / name).exists()]
