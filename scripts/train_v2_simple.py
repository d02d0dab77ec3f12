"""Train lookup tables with frozen codes (V2) on a KD cache, starting from V1, V2 or the pretrained model.

    python scripts/train_v2_simple.py --from-scratch --cache-dir caches/alpaca --output-dir runs/v2_scratch
    python scripts/train_v2_simple.py --v1-checkpoint runs/v1/best.pt --cache-dir caches/alpaca
    python scripts/train_v2_simple.py --v2-checkpoint runs/v2_output/best_state_dict.pt --cache-dir caches/alpaca

To try it offline, use --model-id tiny and a cache of `wf cache -m tiny --out caches/tiny`.
"""

import argparse
from pathlib import Path

import _anemll

PRESETS = {"q2a4": (2, 32, 4, 8), "q4a4": (4, 4, 4, 4), "q4a4_r32": (4, 32, 4, 32), "q2a2": (2, 32, 2, 32)}

TABLE = [
    ("cache_dir", "distillation.cache"),
    ("max_steps", "training.max_steps"),
    ("lr", "training.lr"),
    ("lr", "training.optimizer.scale_lr"),
    ("batch_size", "training.batch_size"),
    ("accumulation_steps", "training.gradient_accumulation_steps"),
    ("clip_grad_norm", "training.gradient_clipping"),
    ("weight_decay", "training.optimizer.weight_decay"),
    ("min_lr_ratio", "training.scheduler.min_lr_ratio"),
    ("eval_steps", "training.eval_interval"),
    ("temperature", "distillation.temperature"),
    ("hard_top1", "distillation.hard_top1"),
    ("hard_full", "distillation.hard_full"),
    ("g_only", "method.g_only"),
    ("mlp_only", "method.mlp_only"),
    ("attn_only", "method.attn_only"),
    ("wandb", "training.logging.wandb.enabled"),
    ("wandb_project", "training.logging.wandb.project"),
    ("wandb_run", "training.logging.wandb.name"),
]


def flags() -> argparse.ArgumentParser:
    """A parser of the guide's flags, with KEY=VALUE settings after them."""
    parser = _anemll.parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--v1-checkpoint", type=Path, help="a run, a checkpoint folder or a .pt file")
    source.add_argument("--v2-checkpoint", type=Path, help="a run, a checkpoint folder or a .pt file")
    source.add_argument("--from-scratch", action="store_true")
    add("--config", choices=PRESETS, help="bits and ranks; default: the checkpoint's, or q2a4")
    add("--cache-dir", required=True)
    add("--output-dir", type=Path, default=Path("runs/v2_output"))
    add("--max-steps", type=int, default=1000)
    add("--lr", type=float, default=5e-5)
    add("--batch-size", type=int, default=8)
    add("--accumulation-steps", type=int, default=1)
    add("--save-steps", type=int, default=0, help="save every N steps; 0 saves only the best and the last")
    add("--eval-steps", type=int, default=100)
    add("--warmup-steps", type=int, default=100)
    add("--min-lr-ratio", type=float, default=0.1)
    add("--clip-grad-norm", type=float, default=1.0)
    add("--weight-decay", type=float, default=0.0)
    add("--temperature", type=float, default=2.0)
    add("--hard-top1", type=float, default=0.2)
    add("--hard-full", type=float, default=0.00005)
    add("--g-only", action="store_true", help="train only the magnitudes")
    add("--mlp-only", action="store_true")
    add("--attn-only", action="store_true")
    add("--ste-fp16", action="store_true", help="train through fp16 arithmetic, rank by rank; slow")
    add("--wandb", action="store_true")
    add("--wandb-project", default="qwen3-qat")
    add("--wandb-run")
    add("settings", nargs="*", metavar="KEY=VALUE", help="any further setting of `wf train`")
    return parser


def main() -> None:
    args = flags().parse_args()
    overrides = ["training=anemll_v2", "training.objective=cached_kd", *_anemll.settings(args, TABLE)]
    overrides += [
        "training.scheduler.name=cosine",
        "training.keep_best=true",
        f"method.ste_fp16={args.ste_fp16}".lower(),
    ]
    overrides.append(f"training.scheduler.warmup_ratio={min(0.9, args.warmup_steps / max(1, args.max_steps))}")
    overrides.append(f"training.save_interval={args.save_steps or max(1, args.max_steps)}")
    if args.save_steps:
        overrides.append("training.save_total_limit=1000")
    checkpoint = args.v1_checkpoint or args.v2_checkpoint
    paths = {"model_id": args.model_id, "checkpoint": checkpoint, "output": args.output_dir}
    sizes = PRESETS[args.config] if args.config else None
    _anemll.tool("train", **paths, sizes=sizes, overrides=[*overrides, *args.settings], force=args.force)


if __name__ == "__main__":
    main()
