"""`wf runs`: list the runs in a folder, from the files that each has written, and the jobs that run elsewhere."""

import json
import time
from pathlib import Path

import yaml

from wrinklefree.cloud import job
from wrinklefree.core.errors import UserError
from wrinklefree.core.lock import is_locked
from wrinklefree.runs.report import RESULTS
from wrinklefree.tracking.run_log import CSV_NAME, read_rows
from wrinklefree.tracking.terminal import print_table

NEWEST = 10  # jobs that are listed


RUNS, JOBS = ["run", "method", "steps", "loss", "eval", "date", "status"], ["job", "where", "launched", "status"]


def run(folder: Path, as_json: bool = False) -> None:
    """Print a table of the run folders in `folder` and one of jobs, newest first. Raises UserError if there is none."""
    logs = sorted(folder.glob(f"*/{CSV_NAME}"), key=lambda path: path.stat().st_mtime, reverse=True)
    launched = job.jobs()[:NEWEST]
    if not logs and not launched:
        raise UserError(f"{folder}: no runs here (a run is a folder with {CSV_NAME})")
    rows = [_row(path) for path in logs]
    others = [[one.name, one.cloud, job.age(one), _state(one)] for one in launched]
    if as_json:
        found = {"runs": [_named(RUNS, row) for row in rows], "jobs": [_named(JOBS, row) for row in others]}
        print(json.dumps(found))
        return
    if rows:
        print_table(RUNS, rows)
    if others:
        print_table(JOBS, others)


def _state(one: job.Job) -> str:
    """Whether a job of this machine runs. What happens elsewhere is not asked for."""
    if one.engine != "background":
        return "-"
    return "running" if is_locked(one.folder) else "ended"


def _named(names: list[str], row: list[str]) -> dict[str, str]:
    return dict(zip(names, row, strict=True))


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
        _status(out),
    ]


def _last(rows: list[dict[str, str]], column: str) -> str:
    """The last number in a column, which may be empty in some rows; an empty text if there is none."""
    return next((f"{float(row[column]):.3f}" for row in reversed(rows) if row.get(column)), "")


def _status(out: Path) -> str:
    """A running process holds the folder's lock; results are written last."""
    if is_locked(out):
        return "running"
    return "done" if (out / RESULTS).is_file() else "stopped"


def _method(out: Path) -> str:
    """The method's name in the newest config that the run has written; an empty text if there is no config yet."""
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
