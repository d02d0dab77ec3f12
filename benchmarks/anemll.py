"""Measure ANEMLL: initialization, training curves, step cost, and training on a KD cache.

    python -m benchmarks.anemll [--quick] [--json] [--parts init,curves,cost,cache] [--story FOLDER] [--out FOLDER]

init    Perplexity and KL of q2a4 before training. Upstream starts from an SVD of group maxima and evenly spaced tables;
        ours is least squares weighted by the inputs. Measured on `-m tiny`, and on the model in --story with tokens
        sampled from it.
curves  Held-out loss by steps of `-m tiny` on one KD cache, in one plot: q2a4 from scratch (frozen codes, or weights
        and scales), v1 to v2, 4 bits to 2. Ratios are the final loss over the loss of upstream's initialization.
cost    Time of a training step at rank 32, over that of the unquantized model.
cache   Cached KD against online KD, for Fairy2i w2 on `-m tiny` with itself as teacher, on one thread: CPU seconds per
        step, measured alternately, and held-out KL to the teacher after equal steps on equal text.

Finished runs are kept under --out and not repeated. Ratios come first in the JSON.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality
from wrinklefree.commands import cache
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.evaluate.perplexity import Quality
from wrinklefree.evaluate.perplexity import measure as measure_quality
from wrinklefree.runs import launch, report
from wrinklefree.runs.setup import open_run
from wrinklefree.runs.stage import calibration, choose_objective, choose_teacher, prepare_student
from wrinklefree.tracking.plotting import plot_runs
from wrinklefree.training import optim

Figures = dict[str, Any]

TINY = ["model=tiny", "training=fairy2_w2", "distillation=logits"]


SVD = ["method.init=svd", "method.learn_table=false"]
UPSTREAM = "upstream"


def init(story: Path | None, quick: bool) -> Figures:
    """Perplexity and KL of q2a4 with both initializations, and the ratio of perplexities, ours over upstream's."""
    figures: Figures = {}
    for name, model in {"story": story, "tiny": "tiny"}.items():
        if model is None:
            continue
        ways = {UPSTREAM: SVD, "ours": []}
        results = {way: untrained_quality(str(model), more, quick) for way, more in ways.items()}
        figures[f"init_ppl_ratio_{name}"] = results["ours"].ppl / results[UPSTREAM].ppl
        for way, quality_ in results.items():
            figures |= {f"init_ppl_{name}_{way}": quality_.ppl, f"init_kl_{name}_{way}": quality_.kl}
    return figures


def untrained_quality(model: str, settings: list[str], quick: bool) -> Quality:
    """Perplexity of a model as q2a4 before training, and its KL to the full-precision model."""
    config = load_config([f"model={model}", "training=anemll_q2a4", *settings])
    run = open_run(config, force=True)
    original = run.model
    if model == "tiny":
        seen = list(calibration(config, run.tokenizer))
        heldout = run.heldout(4096 if quick else 65536)
    else:
        seen = quality.sampled(original, batches=4, rows=12, length=128, seed=0)
        heldout = quality.sampled(original, batches=1 if quick else 8, rows=12, length=256, seed=10_000)
    student = prepare_student(config, original, seen)
    return measure_quality(student.eval(), heldout, original)


# For each run: its settings, and the run whose model it starts from.
CURVES: dict[str, tuple[list[str], str | None]] = {
    "scratch_v2_upstream": (["training=anemll_v2", *SVD, "training.optimizer.scale_lr=3e-3"], None),
    "scratch_v2": (["training=anemll_v2", "training.optimizer.scale_lr=3e-3"], None),
    "scratch_v1": (["training=anemll_q2a4"], None),
    "v1_to_v2": (["training=anemll_v2"], "scratch_v1"),
    "q4": (["training=anemll_q4a4"], None),
    "q4_to_q2_kmeans": (["training=anemll_q2a4", "method.requantize=kmeans"], "q4"),
    "q4_to_q2": (["training=anemll_q2a4"], "q4"),
}


def curves(out: Path, steps: int) -> Figures:
    """Run all of CURVES and plot them. Returns the held-out KL to the original before and after training."""
    folder = out / "cache"
    if not (folder / "manifest.json").exists():
        sizes: dict[str, Any] = {"topk": 64, "negatives": 0, "num_heldout": 128, "shard_size": 1024}
        cache.run(folder, length=128, num_train=min(8000, 16 * steps), **sizes)
    losses: dict[str, list[float]] = {}
    for name, (settings, start) in CURVES.items():
        overrides = ["model=tiny", *settings, "training.objective=cached_kd", f"distillation.cache={folder}"]
        overrides += [f"training.max_steps={steps}", f"training.eval_interval={max(1, steps // 12)}"]
        overrides += ["training.final_eval_tokens=65536"]
        if start is not None:
            overrides.append(f"training.start_from=[{out / start}]")
        result = run_results(overrides, out / name)
        losses[name] = [result["one_shot"]["kl"], result["trained"]["kl"]]
    plot_runs([out / name / "training_log.csv" for name in CURVES], out / "curves.png")
    first, last = ({name: values[i] for name, values in losses.items()} for i in (0, -1))
    figures: Figures = {
        "loss_ratio_scratch": min(last["scratch_v2"], last["scratch_v1"]) / first["scratch_v2_upstream"],
        "loss_ratio_v1_to_v2": last["v1_to_v2"] / first["v1_to_v2"],
        "loss_ratio_q4_to_q2": last["q4_to_q2"] / first["q4_to_q2_kmeans"],
    }
    return figures | {f"loss_{name}": values for name, values in losses.items()}


def cached_vs_online(out: Path, steps: int, timed: int, topk: int = 32) -> Figures:
    """Speed and KL of `steps` training steps on a cache, over those of steps with a running teacher."""
    settings = [*TINY, f"training.max_steps={steps}"]
    online = load_config([*settings, f"output_dir={out / 'online'}"])
    folder = out / f"cache_{steps}_{topk}"
    sizes: dict[str, Any] = {"topk": topk, "negatives": 0, "num_heldout": 64, "shard_size": 1024}
    started = time.process_time()
    if not (folder / "manifest.json").exists():
        cache.run(folder, length=None, num_train=steps * online.training.batch_size, **sizes)
    writing = time.process_time() - started
    more = ["training.objective=cached_kd", f"distillation.cache={folder}"]
    cached = load_config([*settings, *more, f"output_dir={out / 'cached'}"])
    speed = step_seconds(online, cached, timed)
    arms = {"online": settings, "cached": [*settings, *more]}
    results = {name: run_results(overrides, out / name) for name, overrides in arms.items()}
    kl = {name: result["trained"]["kl"] for name, result in results.items()}
    return {
        "cached_vs_online_speed": speed["online"] / speed["cached"],
        "cached_vs_online_kl": kl["cached"] / kl["online"],
        **{f"seconds_per_step_{name}": value for name, value in speed.items()},
        **{f"kl_{name}": value for name, value in kl.items()},
        "cache_bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "cache_cpu_seconds": writing,
        "cached_vs_online_steps": steps,
    }


def step_seconds(online: Config, cached: Config, timed: int) -> dict[str, float]:
    """Median CPU seconds of a training step for both configs, measured alternately on the same student."""
    runs = {name: open_run(config, force=True) for name, config in (("online", online), ("cached", cached))}
    plan, original = runs["online"].plan, runs["online"].model
    student = prepare_student(online, original)
    o = online.training.optimizer
    optimizers = optim.build(
        student,
        name=o.name,
        lr=1e-6,
        betas=o.betas,
        weight_decay=o.weight_decay,
        muon_lr=o.muon_lr,
        scale_lr=o.scale_lr,
    )
    arms = {}
    for name, run in runs.items():
        objective = choose_objective(run.config, student, choose_teacher(run.config, original, run.tokenizer))
        arms[name] = run.stream(), objective
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(timed + 1):
        for name, (stream, objective) in arms.items():
            started = time.process_time()
            batch = next(stream)
            with plan.autocast(student.device):
                loss, _ = next(objective(batch))
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def run_results(settings: list[str], run: Path) -> Figures:
    """The results of the run in the folder `run`, which is trained first if it does not exist."""
    if not (run / "results.json").exists():
        launch.run_stage([*settings, "training.pack=false", f"output_dir={run}"], force=True)
    return report.read_figures(run / "results.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, in about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--parts", default="init,curves,cost,cache", help="comma-separated")
    parser.add_argument("--steps", type=int, default=400, help="training steps in curves and cache")
    parser.add_argument("--story", type=Path, help="folder with a small pretrained model, for init")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_anemll"), help="folder for the runs")
    quality.print_figures(parser.parse_args(), measure)


def measure(args: argparse.Namespace) -> Figures:
    """The figures of all chosen parts."""
    torch.set_num_threads(1)
    steps = 3 if args.quick else args.steps
    out = args.out / f"{steps}_steps"
    parts = args.parts.split(",")
    figures: Figures = {}
    if "init" in parts:
        figures |= init(args.story, args.quick)
    if "curves" in parts:
        figures |= curves(out / "curves", steps)
    if "cost" in parts:
        cost = quality.cost(3 if args.quick else 15, "anemll_q2a4")
        figures |= {"step_time_ratio_r32": cost["step_time_ratio"], "step_memory_ratio_r32": cost["step_memory_ratio"]}
    if "cache" in parts:
        figures |= cached_vs_online(out / "cache", steps, 3 if args.quick else 20)
    return figures


if __name__ == "__main__":
    main()
