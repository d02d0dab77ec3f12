"""Train lookup tables with latent weights (V1) on a KD cache: the scales, the weights or both.

python scripts/train_anemll_qat.py --kd-cache-dir caches/alpaca --output-dir runs/v1 --train-weights --train-scales
python scripts/train_anemll_qat.py --model-id tiny --kd-cache-dir caches/tiny --output-dir runs/v1 --max-steps 200
"""

from pathlib import Path

import _anemll

TABLE = [
    ("kd_cache_dir", "distillation.cache"),
    ("max_steps", "training.max_steps"),
    ("lr", "training.lr"),
    ("scale_lr", "training.optimizer.scale_lr"),
    ("batch_size", "training.batch_size"),
    ("temperature", "distillation.temperature"),
    ("hard_top1_weight", "distillation.hard_top1"),
    ("hard_full_weight", "distillation.hard_full"),
    ("group_size", "method.group_size"),
    ("eval_steps", "training.eval_interval"),
    ("logging_steps", "training.log_interval"),
]


def main() -> None:
    parser = _anemll.parser(__doc__)
    add = parser.add_argument
    add("--init-state", type=Path, help="start from a run, a checkpoint folder or a .pt file")
    add("--kd-cache-dir", required=True)
    add("--output-dir", type=Path, default=Path("runs/anemll_qat"))
    add("--lut-size", type=int, default=4, choices=[4, 8, 16], help="table entries in the MLP")
    add("--scale-rank", type=int, default=32)
    add("--attn-lut-size", type=int, default=16, choices=[4, 8, 16])
    add("--attn-scale-rank", type=int, default=8)
    add("--group-size", type=int, default=32)
    add("--train-weights", action="store_true")
    add("--train-scales", action="store_true", help="without these two flags both are trained")
    add("--max-steps", type=int, default=1000)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-5, help="learning rate of the weights")
    add("--scale-lr", type=float, default=1e-3)
    add("--temperature", type=float, default=2.0)
    add("--hard-top1-weight", type=float, default=0.0)
    add("--hard-full-weight", type=float, default=0.0005)
    add("--logging-steps", type=int, default=50)
    add("--eval-steps", type=int, default=200)
    add("settings", nargs="*", metavar="KEY=VALUE", help="any further setting of `wf train`")
    args = parser.parse_args()
    train = "both" if args.train_weights == args.train_scales else "weights" if args.train_weights else "scales"
    sizes = (args.lut_size.bit_length() - 1, args.scale_rank, args.attn_lut_size.bit_length() - 1, args.attn_scale_rank)
    overrides = ["training=anemll_q2a4", "training.objective=cached_kd", *_anemll.settings(args, TABLE)]
    overrides += [f"method.train={train}", "training.keep_best=true"]
    paths = {"model_id": args.model_id, "checkpoint": args.init_state, "output": args.output_dir}
    _anemll.tool("train", **paths, sizes=sizes, overrides=[*overrides, *args.settings], force=args.force)


if __name__ == "__main__":
    main()
