"""What a run tells the model cards of its exports."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import coverage
from wrinklefree.export.card import NO_TRAINING, Card
from wrinklefree.export.origin import origin_of
from wrinklefree.models.find import at_hand, model_folder
from wrinklefree.models.gguf import is_gguf
from wrinklefree.runs import again
from wrinklefree.runs.report import RESULTS, Results, read_results, training_rows
from wrinklefree.tracking.run_log import CSV_NAME, read_rows
from wrinklefree.training import best, checkpoint


def card_of_run(config: Config, model: nn.Module, results: Results) -> Card:
    """The card of what a finished run has trained."""
    quality = results.markdown() if results.full_precision else ""
    return _card(config, model, training_rows(results.training) or NO_TRAINING, quality)


def card_of(folder: Path, config: Config, model: nn.Module) -> Card:
    """The card of the model in `folder`: with the measured figures, if it is what a finished run left."""
    figures = folder.parent / RESULTS
    if folder.name == "final" and figures.exists():
        return card_of_run(config, model, read_results(figures))
    # A checkpoint is not the model that was measured.
    if checkpoint.is_step(folder.name):
        so_far = rows_so_far(config, folder.parent.parent / CSV_NAME, checkpoint.step_of(folder))
        return _card(config, model, so_far, "", f"/checkpoints/{folder.name}")
    so_far = rows_so_far(config, folder.parent / CSV_NAME, best.step_in(folder))
    return _card(config, model, so_far, "", f"/{folder.name}")


def _card(config: Config, model: nn.Module, training: Mapping[str, str], quality: str, inside: str = "") -> Card:
    """`inside` is where in the folder of its run the model lies, such as `/checkpoints/step_100`."""
    name = config.model.pretrained
    origin = origin_of(name, base_folder(name))
    run = again.run_folder(config) + inside
    return Card(config, origin, coverage(model), again.command(config), run, training, quality)


def rows_so_far(config: Config, log: Path, step: int | None) -> dict[str, str]:
    """Rows on the training up to `step`, as its log tells it. Without a log, only what the settings say."""
    length, rate = config.training.max_seq_length, {"learning rate": f"{config.training.lr}"}
    rows = [row for row in read_rows(log, step) if row["train_loss"]] if log.is_file() else []
    if not rows:
        return {"training": "a checkpoint without its log: tokens are not known", **rate}
    last = rows[-1]
    done = int(last["step"]) if step is None else step  # not every step is in the log
    tokens = int(last["tokens"]) // int(last["step"]) * done
    peak, schedule = max(float(row["lr"]) for row in rows), config.training.scheduler.name
    return {
        "training": f"a checkpoint, after {done:,} steps, {tokens:,} tokens in rows of {length}",
        "learning rate": f"up to {peak:.2g}, schedule {schedule}",
    }


def base_folder(pretrained: str) -> Path | None:
    """The folder with the files of a base model, if they are on this machine. The hub is not asked."""
    path = Path(pretrained).expanduser()
    if is_gguf(path):  # `at_hand` would write it out as a folder
        return None
    try:
        found = at_hand(pretrained)
    except UserError:  # it has gone since the training
        return None
    return None if found is None else model_folder(found)
