"""Curves of runs: loss and learning rate over steps, one PNG for any number of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.tracking import read_rows

Series = tuple[list[int], list[float]]

# Steps of training loss that one plotted point averages, as a share of the logged ones.
_SMOOTHING = 0.02


def plot_runs(csvs: list[Path], out: Path) -> None:
    """Draw train loss (smoothed; raw behind it where one run is shown), eval loss and learning rate into `out`.

    A run is named by its folder. Raises UserError for a log that is missing, has no rows or other columns.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = dict(zip(_names(csvs), [_read(path) for path in csvs], strict=True))
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained"
    )
    for i, (name, rows) in enumerate(runs.items()):
        _draw(top, bottom, name, rows, color=f"C{i % 10}", raw=len(runs) == 1)
    top.set_ylabel("loss (nats per token)")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    top.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, format="png")
    pyplot.close(figure)


def _draw(top: Any, bottom: Any, name: str, rows: list[dict[str, str]], color: str, raw: bool) -> None:
    """One run: two or three lines in the loss axes, one below."""
    steps, losses = series(rows, "train_loss")
    if raw:
        top.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
    top.plot(steps, smooth(losses, round(len(losses) * _SMOOTHING)), color=color, label=f"{name}, train")
    evaluated = series(rows, "eval_loss")
    if evaluated[0]:
        top.plot(*evaluated, "o", color=color, markersize=5, markeredgecolor="white", label=f"{name}, eval")
    bottom.plot(*series(rows, "lr"), color=color)


def series(rows: list[dict[str, str]], column: str) -> Series:
    """Steps and values of the rows where `column` is filled."""
    filled = [row for row in rows if row[column]]
    return [int(row["step"]) for row in filled], [float(row[column]) for row in filled]


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean over `reach` values on each side, fewer on both sides alike near the ends; same length."""
    return [_mean(values, i, min(reach, i, len(values) - 1 - i)) for i in range(len(values))]


def _mean(values: Sequence[float], center: int, reach: int) -> float:
    return sum(values[center - reach : center + reach + 1]) / (2 * reach + 1)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run folder holds training_log.csv")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: no logged steps in it")
    missing = [column for column in ("step", "train_loss", "eval_loss", "lr") if column not in rows[0]]
    if missing:
        raise UserError(f"{path}: not a training log, it has no column {', '.join(missing)}")
    return rows


def _names(csvs: list[Path]) -> list[str]:
    """The folders' names; with the parent's in front where two runs share one."""
    folders = [path.resolve().parent for path in csvs]
    short = [folder.name for folder in folders]
    return [str(f) if short.count(f.name) > 1 else f.name for f in folders]
