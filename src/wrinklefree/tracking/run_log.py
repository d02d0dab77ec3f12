"""Report on a run while it trains: a progress bar, `training_log.csv`, and a service if one is enabled.

The main process has one `Tracker`. It takes numbers by name, and each name is a column of the CSV.
"""

import csv
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from typing_extensions import Self

from wrinklefree.config.schema import WandbConfig
from wrinklefree.core.files import file_aside
from wrinklefree.tracking.progress import Bar, Clock, Lines
from wrinklefree.tracking.services import start_service
from wrinklefree.tracking.terminal import short_number

CSV_NAME = "training_log.csv"

COLUMNS = ("step", "train_loss", "eval_loss", "lr", "elapsed_sec", "grad_norm", "tokens", "tokens_per_sec")


class Tracker:
    """Progress bar, CSV and service of one run. As a context manager it restores the terminal on an exception."""

    def __init__(
        self, out_dir: Path, total_steps: int, wandb: WandbConfig, settings: str = "", start_step: int = 0
    ) -> None:
        """Continue the log in `out_dir` after `start_step`, or start a new one if that is 0.

        `settings` is the resolved config as YAML, for the service. Raises UserError if that is not installed.
        """
        out_dir.mkdir(parents=True, exist_ok=True)
        self.service = start_service(out_dir, wandb, settings, start_step) if wandb.enabled else None
        self.csv = CsvLog(out_dir / CSV_NAME, COLUMNS, start_step)
        self.bar: Bar | Lines = Bar(total_steps, start_step) if sys.stdout.isatty() else Lines(total_steps)
        self.clock = Clock(total_steps, start_step)
        self.began = time.monotonic() - self.csv.elapsed

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`. `elapsed_sec` is added; in a resumed run it continues from the last row.

        A name with a slash (`quant_error/model.layers.0.mlp.up_proj`) goes to the service only.
        """
        row = {"step": step, "elapsed_sec": time.monotonic() - self.began, **values}
        # Names with a slash stand for one layer each: as columns of the CSV there would be hundreds.
        self.csv.write({name: value for name, value in row.items() if "/" not in name})
        if self.service is not None:
            self.service.log({name: value for name, value in row.items() if name != "step"}, step=step)

    def update(self, step: int, loss: float, lr: float, tokens_per_sec: float) -> None:
        """Show on the progress bar that `step` optimizer steps are done."""
        rate = f"loss {loss:.3f}  lr {lr:.1e}  {short_number(tokens_per_sec)} tok/s"
        self.bar.show(step, f"{rate}  ETA {self.clock.remaining(step)}")

    def set_total(self, total_steps: int) -> None:
        """The training will end after another number of steps than it was to."""
        self.bar.set_total(total_steps)
        self.clock.total_steps = total_steps

    def close(self) -> None:
        """Stop the progress bar and finish the logs."""
        self.bar.close()
        self.csv.close()
        if self.service is not None:
            self.service.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Silent(Tracker):
    """A tracker that does nothing, for all processes of a distributed run but the main one."""

    def __init__(self) -> None:
        """Nothing to open."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The main process logs."""

    def update(self, step: int, loss: float, lr: float, tokens_per_sec: float) -> None:
        """The main process shows progress."""

    def set_total(self, total_steps: int) -> None:
        """The main process shows progress."""

    def close(self) -> None:
        """Nothing to close."""


class CsvLog:
    """A CSV file with one row per logged step. Each row is flushed to disk when it is written."""

    def __init__(self, path: Path, columns: Iterable[str], start_step: int) -> None:
        """Open a log for appending. The rows of an earlier log are kept up to `start_step`; if that is 0, none is."""
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
    """The complete rows of a log, up to `last_step`. A row that a crash cut short is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if _is_whole(row)]
    return [row for row in rows if last_step is None or int(row["step"]) <= last_step]


def _is_whole(row: Mapping[Any, Any]) -> bool:
    """Whether the row has exactly one cell per column, and a step."""
    # `csv.DictReader` uses None as the value of a missing cell, and as the key of surplus cells.
    return None not in row and None not in row.values() and row.get("step", "").isdigit()


def _rewrite(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Replace a log atomically: a crash leaves the old one intact."""
    with file_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.8g}"
