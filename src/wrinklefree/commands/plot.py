"""`wf plot`: plot loss and learning rate of one or more runs into one PNG."""

from pathlib import Path

from wrinklefree.tracking.plotting import plot_runs
from wrinklefree.tracking.run_log import CSV_NAME


def run(runs: list[Path], out: Path | None = None) -> None:
    """Plot run folders or CSV files into `out`, by default `plots/loss.png` of the first run."""
    csvs = [path / CSV_NAME if path.is_dir() else path for path in runs]
    target = out or csvs[0].parent / "plots" / "loss.png"
    plot_runs(csvs, target)
    print(f"wrote {target}")
