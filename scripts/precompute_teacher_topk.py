"""Write a KD cache with the flags of the ANEMLL guide. This calls `wf cache`.

python scripts/precompute_teacher_topk.py --teacher_model_name_or_path Qwen/Qwen3-0.6B --output_dir caches/alpaca \\
    --dataset_name tatsu-lab/alpaca --dataset_format alpaca_chat --enable_thinking both --topk 64 --rand_neg 128
"""

import argparse
import os
import sys
from pathlib import Path

from _flags import Flags

from wrinklefree.cli import main


def flags() -> argparse.ArgumentParser:
    """A parser of the guide's flags."""
    parser = Flags(description=__doc__)
    add = parser.add_argument
    add("--teacher_model_name_or_path", default="Qwen/Qwen3-0.6B", help="hub id, folder or a config's name")
    add("--dataset_name", required=True, help="hub id, local file or folder, or stdlib")
    add("--dataset_config_name", help="the hub dataset's configuration")
    add("--dataset_split", default="train")
    add(
        "--dataset_format",
        default="plain",
        choices=["plain", "alpaca", "alpaca_chat", "openhermes", "sharegpt", "dolly"],
    )
    add("--dataset_text_field", default="text", help="the column of plain text")
    add("--enable_thinking", default="false", choices=["false", "true", "both", "none", "all"])
    add("--streaming", action="store_true", help="no effect: hub datasets are always streamed")
    add("--shuffle_buffer", type=int, default=0, help="documents shuffled together; 0 keeps their order")
    add("--max_length", type=int, default=64, help="tokens per sequence")
    add("--topk", type=int, default=32)
    add("--rand_neg", type=int, default=0)
    add("--num_sequences", type=int, default=20000, help="to train on; another twentieth, at most 512, is held out")
    add("--batch_size", type=int, default=1)
    add("--shard_size", type=int, default=1024, help="sequences per file")
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="precision of the teacher")
    add("--output_dir", required=True)
    add("--resume", action="store_true", help="no effect: an unfinished cache always resumes")
    add("--overwrite", action="store_true", help="replace an existing cache")
    add("--cache_dir", help="folder for hub files")
    add("--hf_token", help="for gated models")
    add("--local_files_only", action="store_true", help="do not ask the hub")
    add("--resume_download", action="store_true", help="no effect: downloads always resume")
    for name in ("--wandb_project", "--wandb_run_name", "--wandb_entity"):
        add(name, help="refused: a cache has no curve to log")
    return parser


def parse() -> argparse.Namespace:
    """Parse the command line. Flags that cannot work end the script with a message."""
    parser = flags()
    args = parser.parse_args()
    if args.wandb_project or args.wandb_run_name or args.wandb_entity:
        parser.error("--wandb_*: a cache has no curve to log; leave it out (manifest.json has the figures)")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite: choose one")
    return args


def environment(args: argparse.Namespace) -> None:
    """Set the environment variables that libraries read when they are imported."""
    if args.cache_dir:
        os.environ |= {"HF_HUB_CACHE": args.cache_dir, "HF_DATASETS_CACHE": args.cache_dir}
    if args.hf_token:
        os.environ["HF_TOKEN"] = args.hf_token
    if args.local_files_only:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def check_device(device: str) -> None:
    """End the script if `--device cuda` is given and there is no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: no GPU here; leave it out, or give --device cpu", file=sys.stderr)
        sys.exit(2)


def data(args: argparse.Namespace) -> list[str]:
    """The settings of `wf cache` for the dataset flags."""
    format = {"alpaca": "alpaca_chat"}.get(args.dataset_format, args.dataset_format)
    values = {"format": (format, "plain"), "enable_thinking": (args.enable_thinking, "false")}
    values["text_column"] = (args.dataset_text_field, "text")
    settings = [f"data.{key}={value}" for key, (value, default) in values.items() if value != default]
    settings.append(f"data.shuffle_buffer={max(1, args.shuffle_buffer)}")
    if args.dataset_name == "stdlib":
        return ["data=stdlib", *settings]
    if Path(args.dataset_name).exists():
        return ["data=local", f"data.path={args.dataset_name}", *settings]
    settings += [f"data.subset={args.dataset_config_name}"] if args.dataset_config_name else []
    return ["data=hub", f"data.path={args.dataset_name}", f"data.split={args.dataset_split}", *settings]


def command(args: argparse.Namespace) -> list[str]:
    """The arguments of `wf` that do what the flags say."""
    sizes = {
        "--length": args.max_length,
        "--topk": args.topk,
        "--rand-neg": args.rand_neg,
        "--sequences": args.num_sequences,
        "--heldout": min(512, max(1, args.num_sequences // 20)),
        "--shard-size": args.shard_size,
    }
    words = ["cache", "-m", args.teacher_model_name_or_path, "--out", args.output_dir]
    words += [str(word) for pair in sizes.items() for word in pair] + ["--force"] * args.overwrite
    words += [f"seed={args.seed}", f"training.batch_size={args.batch_size}"]
    return [*words, f"training.precision={args.dtype}", *data(args)]


if __name__ == "__main__":
    args = parse()
    environment(args)
    check_device(args.device)
    main(command(args))
