"""LLM-TRM, phase 1: make a compressor of a language model's hidden states, with the flags of the training guide.

  python -m src.train.phase1_compressor --stage 1a
  python -m src.train.phase1_compressor --stage 1b
  python -m src.train.phase1_compressor --sweep
  python -m src.train.phase1_compressor --model_name tiny data=stdlib       offline, on a CPU

By default (--init pca) nothing is trained: one pass over num_samples sequences gives the weights of least squared
error, which training can only approach. --init orthogonal trains random weights as in the guide: num_epochs x
num_samples sequences, AdamW, cosine schedule.

To use several GPUs, start it with accelerate launch or with torchrun --nproc_per_node=N. To use several CPU processes,
start it with torchrun. `wf trm compressor` does the same work, and each of its settings can follow the flags as
KEY=VALUE.
"""

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from wrinklefree import cli
from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import written_aside
from wrinklefree.models.find import at_hand, model_folder
from wrinklefree.training import checkpoint

log = logging.getLogger("wrinklefree")

MODEL = "HuggingFaceTB/SmolLM3-3B"
SWEEP = [64, 128, 256, 512, 1024]
LENGTH, EPOCHS, LR = 512, 10, 1e-3
ACCUMULATION = 4  # the number in the original code; the guide has no flag for it
MOMENT_TOKENS = 1_000_000  # most tokens for PCA if its weights are only compared with the trained ones

# The training text of each stage: educational web pages for 1a, SmolLM3's own thoughts for 1b.
TEXT = {
    "1a": ["data=fineweb_edu"],
    "1b": [
        "data=hub",
        "data.path=HuggingFaceTB/smoltalk2",
        "data.subset=SFT",
        "data.split=OpenThoughts3_1.2M_think",
    ],
}


def parser() -> argparse.ArgumentParser:
    """A parser of the guide's flags, with KEY=VALUE settings after them."""
    made = argparse.ArgumentParser(
        prog="python -m src.train.phase1_compressor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model_name", default=MODEL, help=f"a config's name, a local folder or a hub id (default {MODEL})")
    add("--stage", choices=list(TEXT), default="1a", help="1a: text; 1b: thoughts, after stage 1a (default 1a)")
    add("--d_compressed", type=int, default=256, help="compressed size D' (default 256)")
    add("--batch_size", type=int, default=8, help="sequences per process (default 8)")
    add(
        "--num_epochs",
        type=int,
        help=f"training passes (default: {EPOCHS} with --init orthogonal or --objective kl; otherwise 0, because "
        "PCA or fisher solve for the weights)",
    )
    add("--learning_rate", type=float, help=f"learning rate of AdamW (default {LR})")
    add("--num_samples", type=int, default=50000, help="sequences per pass; PCA needs far fewer (default 50000)")
    add("--max_seq_length", type=int, help=f"tokens per sequence (default {LENGTH}, or the model's context)")
    add("--output_dir", type=Path, default=Path("./checkpoints/phase1"), help="(default ./checkpoints/phase1)")
    add("--seed", type=int, default=42, help="(default 42)")
    add("--use_wandb", action="store_true", default=None, help="log to W&B (the default, if the package is installed)")
    add("--no_wandb", dest="use_wandb", action="store_false", help="do not log to W&B")
    add("--wandb_project", default="llm-trm-phase1", help="(default llm-trm-phase1)")
    add("--wandb_run_name", help="(default: made of D', batch size, learning rate and stage)")
    add("--sweep", action="store_true", help="make a compressor for every D' in --sweep_d_values")
    add("--sweep_d_values", nargs="+", default=SWEEP, metavar="D'", help="(default 64 128 256 512 1024)")
    add("--init", choices=["pca", "orthogonal"], default="pca", help="initial weights (default pca)")
    add("--objective", choices=["mse", "kl", "fisher"], default="mse", help="what to minimize (default mse)")
    add("--num_workers", type=int, help=argparse.SUPPRESS)
    add("--force", action="store_true", help="replace what is in the output folder")
    add("--dry-run", action="store_true", help="print the settings and stop")
    add("settings", nargs="*", metavar="KEY=VALUE", help="any setting of `wf trm compressor`")
    return made


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Settings may stand anywhere, even after the numbers of a sweep."""
    flags = parser()
    args = flags.parse_intermixed_args(words)
    words = [str(word) for word in args.sweep_d_values]
    args.settings += [word for word in words if "=" in word]
    numbers = [word for word in words if "=" not in word]
    if not all(number.isdigit() for number in numbers):
        flags.error(f"argument --sweep_d_values: numbers, not {' '.join(numbers)}")
    args.sweep_d_values = [int(number) for number in numbers]
    return args


def resolve(args: argparse.Namespace) -> Config:
    """The config of the run. Raises UserError for flags that would have no effect."""
    if args.num_workers is not None:
        raise UserError(
            "--num_workers: leave it out: the training process reads its text itself, faster than the model needs it"
        )
    if args.sweep and args.stage == "1b":
        raise UserError("--sweep: works only in stage 1a; then run --stage 1b with the chosen --d_compressed")
    config = load_config([*overrides(args), *args.settings])
    if not given(args, "training.max_steps"):
        config.training.max_steps = steps(args, config)
    if config.training.max_steps and args.init == "pca":
        config.training.keep_best = True  # PCA is near the optimum, so training may make it worse
    if not config.training.max_steps and args.learning_rate is not None:
        log.info("--learning_rate: has no effect, because nothing is trained; --num_epochs N trains after PCA")
    if args.stage == "1b":
        config.training.start_from = [str(args.output_dir / "stage1a_final")]
    return config


def given(args: argparse.Namespace, key: str) -> bool:
    """Whether the user gave the setting `key` as KEY=VALUE."""
    return any(setting.partition("=")[0] == key for setting in args.settings)


def overrides(args: argparse.Namespace) -> list[str]:
    """The flags as settings of `wf trm compressor`."""
    lr, length = args.learning_rate or LR, args.max_seq_length or longest(args.model_name)
    solved = args.init == "pca" or args.objective == "fisher"
    tokens = args.num_samples * length
    kind = "sweep" if args.sweep else f"d{args.d_compressed}_bs{args.batch_size}_lr{lr:g}"
    values = {
        "seed": args.seed,
        "output_dir": args.output_dir if args.sweep else args.output_dir / f"stage{args.stage}",
        "thinking.d_compressed": args.d_compressed,
        "thinking.init": args.init,
        "thinking.objective": args.objective,
        "thinking.moment_tokens": tokens if solved else min(tokens, MOMENT_TOKENS),
        "training.batch_size": args.batch_size,
        "training.gradient_accumulation_steps": ACCUMULATION,
        "training.max_seq_length": length,
        "training.lr": lr,
        "training.save_total_limit": 1000,
        "training.logging.wandb.enabled": str(wandb_wanted(args)).lower(),
        "training.logging.wandb.project": args.wandb_project,
        "training.logging.wandb.name": args.wandb_run_name or f"{kind}_{args.stage}",
    }
    text = [] if given(args, "data") else TEXT[args.stage]
    flags = [f"{key}={value}" for key, value in values.items()]
    return ["training=trm_compressor", f"model={args.model_name}", *text, *flags]


def wandb_wanted(args: argparse.Namespace) -> bool:
    """Whether to log to W&B. Without a flag, it is used if the package is installed."""
    if args.use_wandb is None and importlib.util.find_spec("wandb") is None:
        log.info("W&B is off: the package is not installed (pip install 'wrinklefree[wandb]'); --no_wandb hides this")
        return False
    return args.use_wandb is not False


def longest(model: str) -> int:
    """The default sequence length: the guide's, or the model's context if it is shorter."""
    folder = at_hand(load_config([f"model={model}"]).model.pretrained)
    file = None if folder is None else model_folder(folder) / "config.json"
    if file is None or not file.is_file():
        return LENGTH
    positions = json.loads(file.read_text()).get("max_position_embeddings", LENGTH)
    return min(LENGTH, int(positions))


def steps(args: argparse.Namespace, config: Config) -> int:
    """The number of optimizer steps in all epochs. In one step, every process reads its own batches."""
    solved = args.init == "pca" and args.objective != "kl"
    epochs = args.num_epochs if args.num_epochs is not None else 0 if solved else EPOCHS
    t, processes = config.training, int(os.environ.get("WORLD_SIZE", "1"))
    sequences = t.batch_size * t.gradient_accumulation_steps * processes
    return max(1, epochs * args.num_samples // sequences) if epochs else 0


def carry_out(args: argparse.Namespace) -> None:
    """Make the compressors that the flags ask for. Raises UserError for anything that the user can fix."""
    config = resolve(args)
    if args.dry_run:
        from wrinklefree.cloud import places, start, summary

        print(config_yaml(config))
        start.show_estimate(config, summary.Rented(places.find_cloud(cli.DEFAULT_CLOUD), 1, 1, False))
        log.info("dry run: nothing was trained or written")
        return
    check(args)
    from wrinklefree.thinking.compressor import make_compressor, sweep_compressors

    if args.sweep:
        sweep_compressors(config, args.sweep_d_values, args.force)
        folders = {Path(f): Path(f) for f in args.output_dir.glob("d[0-9]*") if int(f.name[1:]) in args.sweep_d_values}
    else:
        make_compressor(config, args.force)
        folders = {Path(config.output_dir): args.output_dir}
    if os.environ.get("RANK", "0") == "0":
        for run, out in folders.items():
            print(f"wrote {out}/: {', '.join(publish(run, out, args.stage))}")


def check(args: argparse.Namespace) -> None:
    """Check that the run can work. Raises UserError if it cannot, and logs a note about an unexpected launch."""
    start = args.output_dir / "stage1a_final"
    if args.stage == "1b" and not (start / checkpoint.CONFIG).is_file():
        raise UserError(
            f"{start}: does not exist, but stage 1b starts from it: first run "
            f"`python -m src.train.phase1_compressor --stage 1a --output_dir {args.output_dir}`"
        )
    if args.use_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--use_wandb: needs the wandb package: pip install 'wrinklefree[wandb]'")
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if launched and os.environ.get("WORLD_SIZE", "1") == "1":
        log.info(
            "accelerate launch started only one process, as it does on a CPU; for several, use "
            "torchrun --nproc_per_node=N -m src.train.phase1_compressor ..."
        )


def publish(run: Path, out: Path, stage: str) -> Iterator[str]:
    """Copy the checkpoints in the folder `run` to the names that the guide uses, and yield these names."""
    copies = {folder: f"stage{stage}_step{folder.name[5:]}" for folder in checkpoint.step_folders(run / "checkpoints")}
    for folder, name in {**copies, run / "final": f"stage{stage}_final"}.items():
        with written_aside(out / name) as aside:
            shutil.copytree(folder, aside, dirs_exist_ok=True)
        yield name


def main() -> None:
    args = arguments()
    try:
        cli.reported(lambda: carry_out(args))
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


if __name__ == "__main__":
    main()
