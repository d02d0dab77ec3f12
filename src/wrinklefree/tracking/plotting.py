"""Plot the logs of one or more runs into one PNG: loss, KL to the teacher and learning rate over the steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.tracking.run_log import read_rows

Series = tuple[list[int], list[float]]

# A plotted point of the training loss averages this share of the logged steps on each side.
_SMOOTHING = 0.02


def plot_runs(csvs: list[Path], out: Path) -> None:
    """Plot the training logs `csvs` into the PNG `out`. A run is labelled with the name of its folder.

    - Training curves are smoothed. For a single run, the raw curve is drawn behind.
    - Evaluations are points, which are joined if there are more than three runs.
    - If a log has both cross entropy and distillation loss, the loss panel shows the cross entropy.
    - If a log has a KL to the teacher, it gets a panel of its own.

    Raises UserError if a log is missing, has no rows, or lacks a column.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = dict(zip(_names(csvs), [_read(path) for path in csvs], strict=True))
    panels = {"loss (nats per token)": 3, "learning rate": 1}
    if any(_logged(rows, "train_kl") for rows in runs.values()):
        panels = {"loss (nats per token)": 3, "KL to the teacher": 2, "learning rate": 1}
    figure, axes = pyplot.subplots(
        len(panels), 1, sharex=True, figsize=(8, 1.5 * sum(panels.values())), height_ratios=[*panels.values()]
    )
    figure.set_layout_engine("constrained")
    for i, (name, rows) in enumerate(runs.items()):
        _draw(axes, name, rows, color=f"C{i % 10}", raw=len(runs) == 1, mark="o-" if len(runs) > 3 else "o")
    for axis, label in zip(axes, panels, strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small" if len(runs) > 3 else None, ncols=2 if len(runs) > 3 else 1)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, format="png")
    pyplot.close(figure)


def _draw(axes: Sequence[Any], name: str, rows: list[dict[str, str]], color: str, raw: bool, mark: str) -> None:
    """Draw one run: loss and evaluations into the first axes, KL into the second, learning rate into the last."""
    style = {"color": color, "markeredgecolor": "white", "linewidth": 0.8}
    column = "train_ce" if _logged(rows, "train_ce") else "train_loss"
    _curve(axes[0], series(rows, column), raw, color=color, label=f"{name}, train")
    evaluated = "eval_ce" if _logged(rows, "eval_ce") else "eval_loss"
    if _logged(rows, evaluated):
        axes[0].plot(*series(rows, evaluated), mark, label=f"{name}, eval", **style)
    if _logged(rows, "train_kl"):
        _curve(axes[1], series(rows, "train_kl"), raw, color=color)
    if _logged(rows, "eval_kl"):
        axes[1].plot(*series(rows, "eval_kl"), mark, **style)
    axes[-1].plot(*series(rows, "lr"), color=color)


def _curve(axis: Any, points: Series, raw: bool, **style: Any) -> None:
    steps, values = points
    if raw:
        axis.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
    marker = "." if len(steps) < 3 else None  # a line of one point is invisible
    axis.plot(steps, smooth(values, round(len(values) * _SMOOTHING)), marker=marker, **style)


def _logged(rows: list[dict[str, str]], column: str) -> bool:
    return any(row.get(column) for row in rows)


def series(rows: list[dict[str, str]], column: str) -> Series:
    """The steps and values of the rows in which `column` is filled."""
    filled = [row for row in rows if row[column]]
    return [int(row["step"]) for row in filled], [float(row[column]) for row in filled]


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Moving average with `reach` values on each side; the result has the same length.

    Near the ends, fewer values are averaged, as many on one side as on the other.
    """
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
        raise UserError(f"{path}: not a training log: it has no column {', '.join(missing)}")
    return rows


def _names(csvs: list[Path]) -> list[str]:
    """A label for each run: the name of its folder, or the whole path if two folders have the same name."""
    folders = [path.resolve().parent for path in csvs]
    short = [folder.name for folder in folders]
    return [str(f) if short.count(f.name) > 1 else f.name for f in folders]
