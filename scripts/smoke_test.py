"""Check that everything works, with a training of a few steps on text that needs no download.

    python scripts/smoke_test.py --model smollm2_135m --mode w2 --steps 10

Prints `ALL TESTS PASSED!` and exits with 0, or says what failed and exits with 1.
"""

import csv
import math
import sys
from pathlib import Path

import typer
from _flags import Flags

from wrinklefree.cli import call

# Small enough for a laptop. Every step is logged, because each one is checked.
SETTINGS = [
    "data=stdlib",
    "training.batch_size=2",
    "training.max_seq_length=128",
    "training.eval_tokens=4096",
    "training.final_eval_tokens=4096",
    "training.log_interval=1",
]


def main() -> int:
    parser = Flags(description=__doc__)
    parser.add_argument("--model", "-m", default="tiny", help="a config's name, a local folder or a hub id")
    parser.add_argument("--mode", choices=["w1", "w2"], default="w2")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    out = Path("outputs") / f"smoke_test_{Path(args.model).name}_{args.mode}"
    flags = [f"model={args.model}", f"training=fairy2_{args.mode}", f"training.max_steps={args.steps}"]
    try:
        call("train", [*flags, *SETTINGS, f"output_dir={out}"], dry_run=False, force=True, scale=None)
    except typer.Exit:
        print("FAILED: the training stopped")
        return 1
    return check_losses(out / "training_log.csv", args.steps)


def check_losses(log: Path, steps: int) -> int:
    """Print the result and return the exit code: 0 if the log has `steps` finite losses, else 1."""
    with log.open(newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} over {len(losses)} steps")
    if len(losses) != steps or not all(math.isfinite(loss) for loss in losses):
        print(f"FAILED: expected {steps} finite losses in {log}")
        return 1
    if losses[-1] > losses[0]:
        print("note: the loss did not fall, but a few steps say little")
    print("ALL TESTS PASSED!")
    return 0


if __name__ == "__main__":
    sys.exit(main())
