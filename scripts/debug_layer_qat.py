"""Inspect the layers of a model as lookup tables: weight errors and gradients.

python scripts/debug_layer_qat.py --model-id tiny --list-layers
python scripts/debug_layer_qat.py --model-id tiny --layer 3 --test-grad
python scripts/debug_layer_qat.py --model-id tiny --layer 3 --test-train --cache caches/tiny
python scripts/debug_layer_qat.py --model-id tiny --checkpoint outputs/anemll_tiny_a_v1 --list-layers
"""

from pathlib import Path

import _anemll


def main() -> None:
    parser = _anemll.parser(__doc__, writes=False)
    parser.add_argument("--checkpoint", type=Path, help="a trained model; default: the pretrained model, quantized now")
    parser.add_argument("--lut-size", type=int, default=16, choices=[4, 8, 16])
    parser.add_argument("--scale-rank", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--list-layers", action="store_true", help="print all layers, the default without --layer")
    parser.add_argument("--layer", type=int, help="print one layer, by its number in the list")
    parser.add_argument("--test-grad", action="store_true", help="add the gradient norm of A for random inputs")
    parser.add_argument("--test-train", action="store_true", help="train only the scales of --layer, on --cache")
    parser.add_argument("--cache", type=Path, help="a KD cache")
    args = parser.parse_args()
    if args.test_train and (args.cache is None or args.layer is None or args.list_layers):
        parser.error("--test-train needs --layer and --cache")
    if args.cache is not None and not args.test_train:
        parser.error("--cache: works only with --test-train")
    settings = {"model_id": args.model_id, "checkpoint": args.checkpoint, "bits": args.lut_size.bit_length() - 1}
    settings |= {"rank": args.scale_rank, "group_size": args.group_size, "grad": args.test_grad, "cache": args.cache}
    _anemll.tool("debug_layer", **settings, number=None if args.list_layers else args.layer)


if __name__ == "__main__":
    main()
