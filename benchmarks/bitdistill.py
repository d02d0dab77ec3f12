"""Measure BitDistill: what each stage contributes on a task, language modelling, step cost and file size.

    python -m benchmarks.bitdistill [--quick] [--json] [--parts ablation,lm,story,cost] [--story FOLDER] [--seeds 0,1,2]

ablation  `-m tiny` on `stdlib_kind`: accuracy with its spread over seeds, and the share of the gap between `direct` and
          `fp` that BitDistill closes. The arms are those of the paper:
            fp              full precision, fine-tuned
            direct          ternary with BitNet's quantizer, fine-tuned directly
            direct_learned  ternary with our quantizer, which learns its scales, fine-tuned directly
            stages_1_3      SubLN, then distillation
            bitdistill      SubLN, continued pretraining, then distillation
lm        `-m tiny`, ternary with int8 activations, after KD on text: perplexity over that of full precision, KL, and
          file size with embeddings. The control is the full-precision model after the same steps.
story     KL to the original after 250 steps of 12 x 128 tokens sampled from it, with floating-point activations.
cost      Time and memory of one training step, over those of the unquantized model.

Finished runs are kept under --out and not repeated. Ratios come first in the JSON.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality
from wrinklefree.config.compose import load_config
from wrinklefree.models.load import load_model
from wrinklefree.runs import launch, prerequisites, report

Figures = dict[str, Any]

PLAIN = ["training=stage2_pretrain", "training.start_from=[]", "method.norm_mode=none"]
ROW = ["method.granularity=row", "method.scale_mode=learned"]
PAPER = ["method.granularity=tensor", "method.scale_mode=absmean"]
STORY = [*PLAIN, "method.activation_bits=null", "training.lr=8e-3", "training.optimizer.scale_lr=1e-2"]
STORY += ["training.scheduler.decay_ratio=0.92", "training.gradient_accumulation_steps=1", "training.freeze_names=[]"]

ARMS = ("fp", "direct", "direct_learned", "stages_1_3", "bitdistill")
DIRECT = ["training.start_from=[]", "distillation=none", "method.norm_mode=none"]


def ablation(seeds: list[int], out: Path, limits: list[str]) -> Figures:
    """The accuracies of all arms, and the share of the gap that BitDistill closes.

    All arms of a seed see the same examples for the same number of steps. Continued pretraining runs once for all.
    """
    pretrained = stage("stage2_pretrain", out / "shared", [*limits, "training.start_from=[]"])
    accuracy: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in seeds:
        for name, run in arms(out / f"seed{seed}", pretrained, [*limits, f"seed={seed}"]).items():
            accuracy[name].append(report.read_figures(run / "results.json")["accuracy"]["trained"]["value"])
    mean = {name: statistics.mean(values) for name, values in accuracy.items()}
    gap = mean["fp"] - mean["direct"]
    figures: Figures = {"gap_recovered": (mean["bitdistill"] - mean["direct"]) / gap}
    figures |= {"gap_recovered_without_stage_2": (mean["stages_1_3"] - mean["direct"]) / gap}
    figures |= {f"accuracy_{name}": mean[name] for name in ARMS}
    for name, values in accuracy.items():
        figures[f"accuracy_{name}_stdev"] = statistics.stdev(values) if len(values) > 1 else 0.0
        figures[f"accuracy_{name}_seeds"] = values
    return figures


def arms(root: Path, pretrained: Path, common: list[str]) -> dict[str, Path]:
    """Train all arms of one seed, and return the run folder of each."""
    stage("stage1_subln", root, common)
    two = [f"training.start_from=[{pretrained / 'final'}]", f"output_dir={root / 'stages_1_2_3'}"]
    return {
        "fp": stage("stage0_sft", root, common),
        "direct": stage("stage3_distill", root, [*common, *DIRECT, *PAPER, "experiment=direct"]),
        "direct_learned": stage("stage3_distill", root, [*common, *DIRECT, "experiment=direct_learned"]),
        "stages_1_3": stage("stage3_distill", root, [*common, "training.start_from=[stage1_subln]"]),
        "bitdistill": stage("stage3_distill", root, [*common, *two]),
    }


def stage(name: str, root: Path, settings: list[str]) -> Path:
    """Run one stage unless it is done, and return its folder."""
    overrides = ["model=tiny", f"training={name}", f"output_root={root}", "training.pack=false"]
    overrides += ["training.final_eval_tokens=16384", "training.eval_examples=768", *settings]
    run = Path(load_config(overrides).output_dir)
    if not prerequisites.is_done(run):
        launch.run_stage(overrides, force=True)
    return run


def lm(steps: int, out: Path) -> Figures:
    """The figures of a ternary model with int8 activations, and of the full-precision control."""
    length = [f"training.max_steps={steps}", "training.final_eval_tokens=1000000", "training.eval_interval=250"]
    runs = {"ternary": [*PLAIN, *ROW, "training.lr=1e-3"], "control": ["training=full_precision"]}
    results = {name: quality.run(["model=tiny", *o, *length], out / f"lm_{name}_{steps}") for name, o in runs.items()}
    best = results["ternary"]
    figures: Figures = {"ppl_ratio_tiny": quality.ratio(best), "kl_tiny": best["trained"]["kl"]}
    figures |= {"ppl_ratio_control": quality.ratio(results["control"])}
    figures |= {"file_over_bf16": best["packed_bytes"] / best["original_bytes"], "file_bytes": best["packed_bytes"]}
    return figures | {f"lm_{name}": quality.summary(result) for name, result in results.items()}


def story(folder: Path, steps: int, seeds: list[int]) -> Figures:
    """Mean final KL over the seeds, for our quantizer and the paper's (one absmean scale per tensor)."""
    teacher, tokenizer = load_model(folder, dtype=torch.float32)
    teacher.requires_grad_(False)
    heldout = quality.sampled(teacher, batches=4, rows=12, length=256, seed=10_000)
    data = {seed: quality.sampled(teacher, steps, rows=12, length=128, seed=seed) for seed in seeds}
    figures: Figures = {}
    for name, quantizer in {"kl_story": ROW, "kl_story_paper": PAPER}.items():
        settings = [*STORY, *quantizer]
        runs = [quality.story_run(folder, settings, teacher, tokenizer, data[s], heldout, s) for s in seeds]
        figures[name] = statistics.mean(run.kl for run in runs)
        figures[f"{name}_seeds"] = [run.kl for run in runs]
        figures[f"{name}_bits"] = runs[0].bits
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and one seed, in about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--parts", default="ablation,lm,cost", help="comma-separated, of ablation, lm, story and cost")
    parser.add_argument("--seeds", default="0,1,2", help="for ablation and story, comma-separated")
    parser.add_argument("--steps", type=int, default=2000, help="training steps in lm")
    parser.add_argument("--story", type=Path, help="folder with a small pretrained model, for story")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_bitdistill"), help="folder for the runs")
    quality.print_figures(parser.parse_args(), measure)


def measure(args: argparse.Namespace) -> Figures:
    parts = args.parts.split(",") + (["story"] if args.story and "story" not in args.parts else [])
    seeds = [0] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    out = args.out / ("quick" if args.quick else "full")
    figures: Figures = {}
    if "ablation" in parts:
        figures |= ablation(seeds, out, ["training.max_steps=3", "training.eval_examples=30"] if args.quick else [])
    if "lm" in parts:
        figures |= lm(3 if args.quick else args.steps, out)
    if "story" in parts:
        if args.story is None:
            sys.exit("part story needs --story FOLDER")
        figures |= story(args.story, 20 if args.quick else 250, seeds)
    if "cost" in parts:
        figures |= quality.cost(3 if args.quick else 15, "stage2_pretrain")
    return figures


if __name__ == "__main__":
    main()
