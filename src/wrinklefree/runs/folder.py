"""The folder of a run: what it holds, where it goes on, how it is made anew."""

import itertools
import logging
import shutil
from pathlib import Path

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import prerequisites
from wrinklefree.training import checkpoint, storage

log = logging.getLogger("wrinklefree")


# What a run leaves in its folder; `--force` removes these and nothing else.
OUTPUTS = ["checkpoints", "best", "final", "packed", "shipped", "plots", "training_log.csv", "results.json"]


def resume_point(config: Config, force: bool) -> Path | None:
    """The checkpoint to resume from, if any; nothing is written or removed before `clear`.

    Raises UserError when the folder already holds a run, neither `training.resume_from` nor `force` is given, and this
    one does not start from it.
    """
    out = Path(config.output_dir)
    if config.training.resume_from is not None:
        found = checkpoint.find_checkpoint(config.training.resume_from, out, storage.fetch)
        log.info("resuming from %s", found)
        return found
    if outputs(out) and not force and not _starts_within(config):
        raise UserError(
            f"{out} already holds a run: go on with training.resume_from=latest, choose another output_dir=..., "
            f"or start over with --force"
        )
    return None


def make_run_folder(config: Config) -> None:
    """Make the run's folder, without what an earlier run left there: once nothing can be wrong with this one.

    A run that this one starts from is kept, in `earlier_1/` and so on.
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
    """Whether the model to start from belongs to the run that the output folder holds."""
    start = prerequisites.starting_folder(config)
    held = [path.resolve() for path in outputs(Path(config.output_dir))]
    return start is not None and any(path in (start.resolve(), *start.resolve().parents) for path in held)


def outputs(out: Path) -> list[Path]:
    return [out / name for name in OUTPUTS if (out / name).exists()]
