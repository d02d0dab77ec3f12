"""Plot the losses of one or more runs, from their folders or from training_log.csv files.

python scripts/plot_loss.py --run_dir runs/v2_output --save loss.png
python scripts/plot_loss.py outputs/anemll_tiny_a_v1 outputs/anemll_tiny_a_v2 --save both.png
"""

from pathlib import Path

import _anemll
from _flags import Flags

from wrinklefree import cli


def main() -> None:
    parser = Flags(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders or CSV files")
    parser.add_argument("--run_dir", "--run-dir", type=Path, help="one run folder")
    parser.add_argument("--save", type=Path, help="PNG to write; default: plots/loss.png in the first run")
    args = parser.parse_args()
    runs = [*args.runs, *([args.run_dir] if args.run_dir else [])]
    if not runs:
        parser.error("name a run folder or a training_log.csv")
    _anemll.run(lambda: cli.call("plot", runs, args.save))


if __name__ == "__main__":
    main()
