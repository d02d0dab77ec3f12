"""`wf runs`: the runs in a folder, read from what each has written."""

import time
from pathlib import Path

import yaml

from wrinklefree.core.errors import UserError
from wrinklefree.tracking.run_log import CSV_NAME, read_rows
from wrinklefree.tracking.terminal import print_table

# A log that was written to within this many seconds belongs to a run that is alive.
_ALIVE = 120


def run(folder: Path) -> None:
    """Print a table of every run folder in `folder`, newest first. Raises UserError where there is none."""
    logs = sorted(folder.glob(f"*/{CSV_NAME}"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not logs:
        raise UserError(f"{folder}: no runs here (a run is a folder with {CSV_NAME})")
    print_table(["run", "method", "steps", "loss", "eval", "date", "status"], [_row(path) for path in logs])


def _row(log: Path) -> list[str]:
    rows, out = read_rows(log), log.parent
    written = log.stat().st_mtime
    return [
        out.name,
        _method(out),
        rows[-1]["step"] if rows else "0",
        _last(rows, "train_loss"),
        _last(rows, "eval_loss"),
        time.strftime("%m-%d %H:%M", time.localtime(written)),
        _status(out, written),
    ]


def _last(rows: list[dict[str, str]], column: str) -> str:
    """The last figure of a column that is filled now and then."""
    return next((f"{float(row[column]):.3f}" for row in reversed(rows) if row.get(column)), "")


def _status(out: Path, written: float) -> str:
    if (out / "final").is_dir():
        return "done"
    return "running" if time.time() - written < _ALIVE else "stopped"


def _method(out: Path) -> str:
    """The method's name in the newest resolved config that the run has written, where there is one yet."""
    configs = [
        *out.glob("wrinklefree.yaml"),
        *out.glob("*/wrinklefree.yaml"),
        *out.glob("checkpoints/*/wrinklefree.yaml"),
    ]
    if not configs:
        return ""
    values = yaml.safe_load(max(configs, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8"))
    method = values["method"]
    return "none" if method is None else str(method["name"])
