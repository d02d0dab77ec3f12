"""What a person sees of a run while it trains: a progress bar, `training_log.csv`, and W&B when asked.

One `Tracker` lives on the main process. Numbers come in by name: each name is a column of the CSV, save for one with a
slash (`quant_error/model.layers.0.mlp.up_proj`), of which there may be hundreds: those go to W&B alone.
"""

import csv
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import yaml
from typing_extensions import Self

from wrinklefree.config.schema import WandbConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside
from wrinklefree.tracking.progress import Bar, Clock, Lines
from wrinklefree.tracking.terminal import short_number

log = logging.getLogger("wrinklefree")


CSV_NAME = "training_log.csv"

COLUMNS = ("step", "train_loss", "eval_loss", "lr", "elapsed_sec", "grad_norm", "tokens", "tokens_per_sec")


class Tracker:
    """Progress, CSV and W&B of one run; use it as a context manager so that an exception leaves the terminal whole."""

    def __init__(
        self, out_dir: Path, total_steps: int, wandb: WandbConfig, settings: str = "", start_step: int = 0
    ) -> None:
        """Continue the log in `out_dir` after `start_step`, or begin it anew if that is 0.

        `settings` is the resolved config as YAML, for W&B.
        Raises UserError where W&B is asked for and not installed.
        """
        out_dir.mkdir(parents=True, exist_ok=True)
        self.wandb = _start_wandb(out_dir, wandb, settings, start_step) if wandb.enabled else None
        self.csv = CsvLog(out_dir / CSV_NAME, COLUMNS, start_step)
        self.bar: Bar | Lines = Bar(total_steps, start_step) if sys.stdout.isatty() else Lines(total_steps)
        self.clock = Clock(total_steps, start_step)
        self.began = time.monotonic() - self.csv.elapsed

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`; `elapsed_sec` is filled in and goes on counting where a resumed run left off."""
        row = {"step": step, "elapsed_sec": time.monotonic() - self.began, **values}
        self.csv.write({name: value for name, value in row.items() if "/" not in name})
        if self.wandb is not None:
            self.wandb.log({name: value for name, value in row.items() if name != "step"}, step=step)

    def update(self, step: int, loss: float, lr: float, tokens_per_sec: float) -> None:
        """Move the progress bar to `step` optimizer steps done."""
        rate = f"loss {loss:.3f}  lr {lr:.1e}  {short_number(tokens_per_sec)} tok/s"
        self.bar.show(step, f"{rate}  ETA {self.clock.remaining(step)}")

    def close(self) -> None:
        """Leave the last line of the bar standing, and finish the logs."""
        self.bar.close()
        self.csv.close()
        if self.wandb is not None:
            self.wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Silent(Tracker):
    """What the other processes of a distributed run hold: the main one does the talking."""

    def __init__(self) -> None:
        """Nothing to open."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The main process logs."""

    def update(self, step: int, loss: float, lr: float, tokens_per_sec: float) -> None:
        """The main process shows progress."""

    def close(self) -> None:
        """Nothing to close."""


class CsvLog:
    """A CSV file with one row per logged step, each on disk as soon as it is written."""

    def __init__(self, path: Path, columns: Iterable[str], start_step: int) -> None:
        """Keep the rows up to `start_step` of an earlier log, none where that is 0, and append after them."""
        self.path = path
        kept = read_rows(path, start_step) if start_step and path.exists() else []
        self.elapsed = float(kept[-1].get("elapsed_sec") or 0) if kept else 0.0
        self._open(list(dict.fromkeys([*columns, *(kept[0] if kept else ())])), kept)

    def _open(self, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
        _rewrite(self.path, columns, rows)
        self.columns = columns
        self.file: IO[str] = self.path.open("a", newline="", encoding="utf-8", buffering=1)
        self.writer = csv.DictWriter(self.file, columns, restval="", lineterminator="\n")

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row. A column without a value stays empty; a new name becomes the last column."""
        new = [name for name in row if name not in self.columns]
        if new:
            self.file.close()
            self._open([*self.columns, *new], read_rows(self.path))
        self.writer.writerow({name: _number(value) for name, value in row.items()})

    def close(self) -> None:
        self.file.close()


def read_rows(path: Path, last_step: int | None = None) -> list[dict[str, str]]:
    """The whole rows of a log, up to `last_step`; a row that a crash cut short is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if _is_whole(row)]
    return [row for row in rows if last_step is None or int(row["step"]) <= last_step]


def _is_whole(row: Mapping[Any, Any]) -> bool:
    """Whether every column has a cell, every cell a column (`csv` says None for a missing one), and a step is there."""
    return None not in row and None not in row.values() and row.get("step", "").isdigit()


def _rewrite(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Replace a log; a crash here leaves the old one whole."""
    with file_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.8g}"


class WandbRun(Protocol):
    """What is used of `wandb.Run`."""

    id: str

    def log(self, data: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


def _start_wandb(out_dir: Path, given: WandbConfig, settings: str, start_step: int) -> WandbRun:
    """Open the W&B run of this folder: the same one again after a resume, else a new one."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "training.logging.wandb.enabled=true needs the wandb package: pip install 'wrinklefree[wandb]'"
        ) from error
    run_id = out_dir / "wandb_run_id"
    offline = not {"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys()
    run: Any = wandb.init(
        project=given.project,
        name=given.name or out_dir.name,
        tags=given.tags,
        config=yaml.safe_load(settings),
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
    result: WandbRun = run
    return result
