"""A run's output folder: what is in it, which checkpoint to resume from, and how it is cleared."""

import itertools
import logging
import shutil
from pathlib import Path

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import prerequisites
from wrinklefree.training import checkpoint

log = logging.getLogger("wrinklefree")


# What a run writes into its folder. `--force` removes these and leaves everything else alone.
OUTPUTS = ["checkpoints", "best", "final", "packed", "shipped", "plots", "training_log.csv", "results.json"]


def resume_point(config: Config, force: bool) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run. Nothing is written or removed.

    Raises UserError if the output folder already holds a run, unless
    - `training.resume_from` is set,
    - `force` is given, or
    - this run starts from the model of that run.
    """
    out = Path(config.output_dir)
    _check_folder(out)
    if config.training.resume_from is not None:
        folder = checkpoint.find_checkpoint(config.training.resume_from, out)
        log.info("resuming from %s", folder)
        return folder
    if outputs(out) and not force and not _starts_within(config):
        raise UserError(
            f"{out} already holds a run: go on with training.resume_from=latest, choose another output_dir=..., "
            f"or start over with --force"
        )
    return None


def _check_folder(out: Path) -> None:
    """Raises UserError if `out` cannot be a folder, because it or one above it is a file."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise UserError(f"output_dir={out}: {existing} is a file, and a run needs a folder: choose another output_dir")


def make_run_folder(config: Config) -> None:
    """Make the output folder and remove what an earlier run wrote into it.

    Call this only after every check has passed, because it deletes files. If this run starts from the model of the
    earlier run, that run is moved to `earlier_1/` (or the next free number) instead of deleted.
    """
    out = Path(config.output_dir)
    if _starts_within(config):
        kept = next(path for n in itertools.count(1) if not (path := out / f"earlier_{n}").exists())
        kept.mkdir()
        for path in outputs(out):
            path.rename(kept / path.name)
        log.info("%s: the run that this one starts from is now in %s", out, kept)
    for path in outputs(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _starts_within(config: Config) -> bool:
    """Whether this run starts from a model that lies in its own output folder."""
    start = prerequisites.starting_folder(config)
    held = [path.resolve() for path in outputs(Path(config.output_dir))]
    return start is not None and any(path in (start.resolve(), *start.resolve().parents) for path in held)


def outputs(out: Path) -> list[Path]:
    """The files and folders in `out` that a run has written."""
    return [out / name for name in OUTPUTS if (out / name).exists()]
