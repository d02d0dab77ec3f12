"""The figures of a compressor, or of a sweep: measured on held-out text, printed, kept."""

from pathlib import Path
from typing import Any

from wrinklefree.config.schema import Config
from wrinklefree.core.files import write_json
from wrinklefree.runs import prerequisites
from wrinklefree.runs.report import RESULTS
from wrinklefree.thinking import loading
from wrinklefree.thinking.bench import Bench, Made
from wrinklefree.thinking.curves import plot_sweep
from wrinklefree.thinking.gathering import Code, Gathered
from wrinklefree.thinking.network import DimensionCompressor
from wrinklefree.thinking.reconstruction import Figures
from wrinklefree.tracking.terminal import print_table

PCA = "pca"  # the tied optimum of the squared error: every run is compared with it
# The figures of the table, and what they are called in it.
SHOWN = {
    "mse": "mse",
    "cosine_similarity": "cosine similarity",
    "mean_only_cosine": "cosine of the mean alone",
    "relative_error": "relative error",
    "variance_ratio": "variance ratio",
    "r2": "R^2, centred",
    "kl": "KL of the next word, nats",
    "top1_agreement": "top-1 agreement",
}


def _measure(bench: Bench, made: list[Made], found: Gathered) -> tuple[list[dict[str, Figures]], int]:
    """The figures of each compressor and of PCA of its size, from one pass over held-out text; the number of states."""
    compressors = {}
    for one in made:
        compressors[f"{len(one.thinker.compressor.weight)} {PCA}"] = _pca(found.pca, one.thinker.compressor)
        compressors[f"{len(one.thinker.compressor.weight)} {_kind(one.config)}"] = one.thinker.compressor
    with bench.autocast():
        figures, count = made[0].objective.measure(bench.judged, compressors)
    by_size: dict[str, dict[str, Figures]] = {}
    for key, values in figures.items():
        size, kind = key.split()
        by_size.setdefault(size, {})[kind] = {name: value for name, value in values.items() if name != "loss"}
    return list(by_size.values()), count


def _pca(code: Code, like: DimensionCompressor) -> DimensionCompressor:
    """The tied compressor of this code, as large as `like`."""
    compressed, width = like.weight.shape
    return code.put(DimensionCompressor(width, compressed)).to(like.weight.device)


def _kind(config: Config) -> str:
    """The name of a compressor in the table, beside that of PCA."""
    settings = loading.settings_of(config)
    if config.training.max_steps:
        return "trained"
    return "random" if settings.init == "orthogonal" else "fisher" if settings.objective == "fisher" else PCA


def _facts(made: Made, found: Gathered, figures: dict[str, Figures]) -> dict[str, Any]:
    """What `results.json` says of a compressor: its own figures at the top level, those of PCA under a key."""
    settings, shape = loading.settings_of(made.config), made.thinker.config
    return {
        "hidden_size": shape.width,
        "d_compressed": shape.d_compressed,
        "compression_ratio": shape.width / shape.d_compressed,
        "parameters": sum(p.numel() for p in made.thinker.compressor.parameters()),
        "init": settings.init,
        "objective": settings.objective,
        **figures[_kind(made.config)],
        PCA: figures[PCA],
        "pca_mse_of_the_text_it_was_solved_from": found.pca.mse(found.moments, shape.d_compressed),
    }


def _forward_tokens(bench: Bench, gathered: int, measured: int, runs: int) -> dict[str, int]:
    """How many tokens the language model read for what."""
    plan = bench.run.plan
    return {"moments": gathered, "training": runs * plan.max_steps * plan.tokens_per_step, "heldout": measured}


def report(bench: Bench, made: Made, found: Gathered, seen: int) -> None:
    """Measure, print and keep the figures of one compressor, for which this run gathered `seen` states."""
    (figures,), measured = _measure(bench, [made], found)
    out, facts = Path(made.config.output_dir), _facts(made, found, figures)
    used = _forward_tokens(bench, seen, measured, 1)
    write_json(out / RESULTS, {**facts, "forward_tokens": used})
    title = f"D'={facts['d_compressed']} of {facts['hidden_size']}, held-out text"
    print_table(
        [title, *figures], [[label, *(_number(f[name]) for f in figures.values())] for name, label in SHOWN.items()]
    )
    print(f"\nwrote {out}/: final/ (thinker), results.json, training_log.csv")
    print(f"next: {prerequisites.command(made.config, 'trm_pairs')}")


def report_sweep(bench: Bench, made: list[Made], found: Gathered) -> None:
    """Measure, print, plot and keep the figures of all compressors."""
    config, out = bench.run.config, bench.run.out
    figures, measured = _measure(bench, made, found)
    rows = [_facts(one, found, of) for one, of in zip(made, figures, strict=True)]
    for one, row in zip(made, rows, strict=True):
        write_json(Path(one.config.output_dir) / RESULTS, row)
    used = _forward_tokens(bench, int(found.moments.count), measured, len(made))
    write_json(out / "sweep.json", {"forward_tokens": used, "rows": rows})
    plot_sweep(rows, out / "plots" / "sweep.png")
    print_table(
        ["D'", "ratio", "compressor", "cosine", "rel. error", "R^2", "KL", "top-1"],
        [
            [
                *(str(row["d_compressed"]), f"{row['compression_ratio']:.3g}x", kind),
                *(_number(f[name]) for name in ("cosine_similarity", "relative_error", "r2", "kl", "top1_agreement")),
            ]
            for row, of in zip(rows, figures, strict=True)
            for kind, f in of.items()
        ],
    )
    folders = ", ".join(f"d{row['d_compressed']}/" for row in rows)
    print(f"\nwrote {out}/: {folders}, sweep.json, plots/sweep.png")
    width = f"thinking.d_compressed={rows[-1]['d_compressed']}"
    print(f"next, with the width that you choose: {prerequisites.command(config, 'trm_compressor', width)}")


def _number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"
