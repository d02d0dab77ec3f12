"""Snap a trained model to fp16, in which the Neural Engine computes; compare it, and write it for ANEMLL's converters.

python scripts/snap_and_test_v2.py --checkpoint runs/v2_from_v1/best_state_dict.pt --fp16 \\
    --output runs/export/model_fp16.pt
"""

from pathlib import Path

import _anemll


def main() -> None:
    parser = _anemll.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run, a checkpoint folder or a .pt file")
    parser.add_argument("--output", type=Path, help="write the snapped model to this .pt file or folder")
    parser.add_argument("--fp16", "--ane", action="store_true", help="round every step to fp16 in the comparison")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--debug", action="store_true", help="print every layer instead of the worst one")
    _anemll.add_sizes(parser)
    args = parser.parse_args()
    settings = {"checkpoint": args.checkpoint, "output": args.output, "model_id": args.model_id, "force": args.force}
    settings |= {"sizes": _anemll.sizes(args), "fp16": args.fp16, "device": args.device, "debug": args.debug}
    _anemll.tool("snap", **settings)


if __name__ == "__main__":
    main()
