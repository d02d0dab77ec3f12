"""The plot of a sweep: how good a compressor of each size is."""

from pathlib import Path
from typing import Any

Row = dict[str, Any]

CURVES = {"cosine_similarity": "cosine", "r2": "R², centred"}


def plot_sweep(rows: list[Row], out: Path) -> None:
    """Draw cosine and R^2, and below them the KL, over D' into `out`. A row is a compressor's `results.json`.

    PCA has dashed lines of its own if the compressors are something else.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 7), height_ratios=[3, 2])
    figure.set_layout_engine("constrained")
    sizes = [row["d_compressed"] for row in rows]
    other = any(row["kl"] != row["pca"]["kl"] for row in rows)
    for color, (name, label) in zip(("C0", "C2"), CURVES.items(), strict=True):
        upper.plot(sizes, [row[name] for row in rows], "o-", color=color, label=label)
        if other:
            upper.plot(sizes, [row["pca"][name] for row in rows], "--", color=color, label=f"{label}, PCA")
    upper.plot(sizes, [row["mean_only_cosine"] for row in rows], ":", color="C0", label="cosine of the mean alone")
    lower.plot(sizes, [row["kl"] for row in rows], "o-", color="C3", label="KL")
    if other:
        lower.plot(sizes, [row["pca"]["kl"] for row in rows], "--", color="C3", label="KL, PCA")
        lower.legend()
    upper.set_ylabel("held-out states")
    upper.legend()
    lower.set_ylabel("KL of the next word (nats)")
    lower.set_xlabel(f"D', of {rows[0]['hidden_size']} dimensions")
    lower.set_xscale("log", base=2)
    lower.set_xticks(sizes, [str(size) for size in sizes])
    lower.xaxis.set_minor_locator(NullLocator())
    if min(row["kl"] for row in rows) > 0:
        lower.set_yscale("log")
        lower.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        lower.yaxis.set_minor_locator(NullLocator())
        lower.yaxis.set_major_formatter("{x:g}")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, format="png")
    pyplot.close(figure)
