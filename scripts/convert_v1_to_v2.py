"""Convert a V1 checkpoint to V2: freeze its codes. The model's outputs stay the same; scales can be trained further.

python scripts/convert_v1_to_v2.py --v1-checkpoint runs/v1/best.pt --output runs/v2/v2_init.pt
"""

from pathlib import Path

import _anemll


def main() -> None:
    parser = _anemll.parser(__doc__)
    parser.add_argument("--v1-checkpoint", type=Path, required=True, help="a run, a checkpoint folder or a .pt file")
    parser.add_argument("--output", type=Path, required=True, help="a .pt file, or a folder")
    args = parser.parse_args()
    settings = {"checkpoint": args.v1_checkpoint, "output": args.output, "model_id": args.model_id, "force": args.force}
    _anemll.tool("v1_to_v2", **settings)


if __name__ == "__main__":
    main()
