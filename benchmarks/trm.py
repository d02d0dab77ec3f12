"""LLM-TRM on mod7_chains: the accuracy and the speed of thinking in latent vectors, compared with words.

    python -m benchmarks.trm [--quick] [--json] [--parts chain,grpo,pca,quantized] [--seeds 0,1,2] [--out FOLDER]

chain      For each seed, train a language model from scratch, its compressor, the network and the adapter. Then compare
           all ways to think on the same held-out problems. Needs no download, and takes minutes per seed.
grpo       Start with an adapter that has seen a single pair, and measure it before and after reinforcement learning.
pca        Compare PCA on a tenth of a text, and on all of it, with ten epochs of AdamW: held-out errors for several
           widths.
quantized  Run the chain with the first seed's language model, quantized to ternary weights and to Fairy2i's 2 bits.

In the JSON, means over the seeds come first and the figures of each seed follow. Finished stages are kept in FOLDER and
not run again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality
from wrinklefree.commands import pretrain
from wrinklefree.config.compose import load_config
from wrinklefree.data import stdlib
from wrinklefree.models.find import resolve_pretrained
from wrinklefree.models.load import load_model
from wrinklefree.runs import launch, prerequisites
from wrinklefree.thinking import compare, compressor, pairs_stage, stages

Figures = dict[str, Any]

STAGES = {
    "trm_compressor": compressor.make_compressor,
    "trm_pairs": pairs_stage.make_pairs,
    "trm_recursion": stages.train_network,
    "trm_injection": stages.train_adapter,
    "trm_grpo": stages.reinforce,
    "trm_eval": compare.compare_ways,
}

# An adapter that is fitted to a single pair and not trained further, so that reinforcement learning can improve it.
WEAK = ["thinking.injection.fitted_pairs=1", "training.max_steps=0"]
QUANTIZED = {"fairy2_w2": ["training=fairy2_w2"], "ternary": ["training=stage2_pretrain", "training.start_from=[]"]}
QUANTIZED_STEPS = 600
WIDTHS = [16, 32, 64]


def chain(seed: int, out: Path, more: list[str], quick: bool) -> Figures:
    """Run all stages with one seed, and return the figures of all ways to think."""
    given = ["model=chains", f"output_root={out}", f"seed={seed}", *more]
    short = ["training.max_steps=3", "training.eval_examples=20"] if quick else []
    pretrain_model(given, out, short[:1])
    for stage in ("trm_compressor", "trm_pairs", "trm_recursion", "trm_injection", "trm_eval"):
        run_stage(stage, given, out / f"chains_{stage}", quick)
    return read_results(out / "chains_trm_eval")


def pretrain_model(given: list[str], out: Path, more: list[str]) -> None:
    """Train the language model from scratch, unless it exists."""
    if not prerequisites.is_done(out / "pretrain_chains"):
        pretrain.run([*given, *more], force=True)


def run_stage(stage: str, given: list[str], out: Path, quick: bool, more: list[str] | None = None) -> None:
    """Run one stage, unless it is done."""
    if (out / "results.json").exists() or (out / "manifest.json").exists():
        return
    short = {
        "trm_compressor": ["thinking.moment_tokens=20000"],
        "trm_pairs": [
            "thinking.pairs.num_problems=200",
            "thinking.pairs.num_heldout=40",
            "thinking.pairs.keep_wrong=true",
        ],
        "trm_eval": ["training.eval_examples=20", "thinking.pairs.num_heldout=40"],
    }.get(stage, ["training.max_steps=3", "training.eval_examples=20"])
    overrides = [f"training={stage}", *given, *(more or []), *(short if quick else [])]
    STAGES[stage](load_config(overrides), force=True)


def read_results(folder: Path) -> Figures:
    """The figures in the `results.json` of a stage."""
    figures: Figures = json.loads((folder / "results.json").read_text())
    return figures


def chains(seeds: list[int], out: Path, quick: bool) -> Figures:
    """Run the chain for all seeds. Returns mean accuracies and the mean ratio of median latencies."""
    results = [chain(seed, out / f"seed_{seed}", [], quick) for seed in seeds]
    ways = [figures["ways"] for figures in results]
    names = {"accuracy_think": "words", "accuracy_nothink": "nothing", "accuracy_injected": "latent"}
    names |= {"accuracy_shuffled": "shuffled", "accuracy_pause": "pause", "accuracy_oracle": "oracle"}
    figures: Figures = {name: statistics.mean(w[way]["accuracy"] for w in ways) for name, way in names.items()}
    figures["accuracy_readout"] = statistics.mean(f["readout"] for f in results)
    figures["latent_speedup"] = statistics.mean(w["words"]["p50"] / w["latent"]["p50"] for w in ways)
    kept = ("accuracy", "tokens", "p50", "p95", "p_value")
    figures["by_seed"] = {
        seed: {"readout": f["readout"], **{way: {k: v[k] for k in kept} for way, v in f["ways"].items()}}
        for seed, f in zip(seeds, results, strict=True)
    }
    return figures


def reinforced(seeds: list[int], out: Path, quick: bool) -> Figures:
    """The held-out accuracy of a weak adapter before and after GRPO: the mean gain, and both for each seed."""
    gains = {}
    for seed in seeds:
        folder = out / f"seed_{seed}"
        given = ["model=chains", f"output_root={folder}", f"seed={seed}"]
        weak, strong = folder / "weak_injection", folder / "weak_grpo"
        run_stage("trm_injection", given, weak, quick, [*WEAK, f"output_dir={weak}"])
        run_stage("trm_grpo", given, strong, quick, [f"training.start_from=[{weak}]", f"output_dir={strong}"])
        gains[seed] = [read_results(f)["eval_accuracy"] for f in (weak, strong)]
    return {
        "grpo_gain": statistics.mean(after - before for before, after in gains.values()),
        "grpo_from_to": gains,
    }


def pca(out: Path, quick: bool) -> Figures:
    """The ratio of PCA's held-out error to that of AdamW after ten epochs, the worst over all widths.

    PCA reads a tenth of the text, which is 1/100 of AdamW's tokens. In a second run it reads all of the text once.
    """
    epoch = 2_000 if quick else 128_000
    folder = out / f"pca_{epoch}"
    given = ["model=tiny", "training=trm_compressor", "training.batch_size=4", "data=local", *texts(folder, epoch)]
    ways = {
        "pca": [f"thinking.moment_tokens={epoch // 10}"],
        "pca_epoch": [f"thinking.moment_tokens={epoch}"],
        "adamw": ["thinking.init=orthogonal", f"training.max_steps={10 * epoch // (4 * 256)}"],
    }
    errors: dict[str, dict[str, float]] = {}
    for name, more in ways.items():
        place = folder / name
        if not (place / "sweep.json").exists():
            compressor.sweep_compressors(load_config([*given, *more, f"output_dir={place}"]), WIDTHS, force=True)
        errors[name] = {path.name: read_results(path)["mse"] for path in sorted(place.glob("d*")) if path.is_dir()}
    ratios = {
        name: {width: errors[name][width] / errors["adamw"][width] for width in errors[name]}
        for name in ("pca", "pca_epoch")
    }
    return {
        "pca_mse_ratio": max(ratios["pca"].values()),
        "pca_forward_ratio": 1 / 100,
        "pca_epoch_mse_ratio": max(ratios["pca_epoch"].values()),
        "pca_mse_ratios": ratios,
    }


def texts(folder: Path, tokens: int) -> list[str]:
    """Write two files with `tokens` tokens of the standard library, one of them held out.

    Returns the settings that choose these files.
    """
    _, tokenizer = load_model(resolve_pretrained("builtin:tiny"))
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for split in ("train", "heldout"):
        path, count = folder / f"{split}.jsonl", 0
        with path.open("w", encoding="utf-8") as file:
            for text in stdlib.documents(split):
                count += len(tokenizer(text).input_ids)
                file.write(json.dumps({"text": text}) + "\n")
                if count > tokens:
                    break
        paths.append(path)
    return [f"data.path={paths[0]}", f"data.heldout_path={paths[1]}"]


def quantized(out: Path, quick: bool) -> Figures:
    """The accuracies of the chain with quantized language models."""
    figures: Figures = {}
    root = out / "seed_0"
    for name, overrides in QUANTIZED.items():
        made = root / f"lm_{name}"
        steps = 3 if quick else QUANTIZED_STEPS
        if not prerequisites.is_done(made):
            settings = ["training.batch_size=4", "training.lr=1e-3", f"training.max_steps={steps}"]
            settings += ["training.max_seq_length=auto", "training.gradient_accumulation_steps=1"]
            settings += ["training.pack=false"]
            places = [f"output_root={root}", f"output_dir={made}", "data=downstream", "task=mod7_chains"]
            launch.run_stage(["model=chains", *overrides, *settings, *places], force=True)
        given = ["model=chains", f"model.pretrained={made}", f"experiment={name}", f"output_root={root}"]
        for stage in ("trm_compressor", "trm_pairs", "trm_recursion", "trm_injection", "trm_eval"):
            run_stage(stage, given, root / f"{name}_{stage}", quick)
        found = read_results(root / f"{name}_trm_eval")["ways"]
        figures[f"quantized_{name}"] = {
            way: found[way]["accuracy"] for way in ("words", "nothing", "latent", "shuffled")
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and one seed, in about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--parts", default="chain,grpo,pca,quantized", help="comma-separated; grpo and quantized need chain"
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_trm"), help="the folder of finished stages")
    quality.print_figures(parser.parse_args(), parts)


def parts(args: argparse.Namespace) -> Figures:
    """The figures of all chosen parts."""
    torch.set_num_threads(1)
    chosen = args.parts.split(",")
    seeds = [0] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    out = args.out / ("quick" if args.quick else "full")
    figures: Figures = {}
    if "chain" in chosen:
        figures |= chains(seeds, out, args.quick)
    if "grpo" in chosen:
        figures |= reinforced(seeds, out, args.quick)
    if "pca" in chosen:
        figures |= pca(out, args.quick)
    if "quantized" in chosen:
        figures |= quantized(out, args.quick)
    return figures


if __name__ == "__main__":
    main()
