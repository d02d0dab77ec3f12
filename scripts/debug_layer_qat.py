"""Look at the layers of a model as lookup tables: errors of the weights, gradients.

python scripts/debug_layer_qat.py --model-id tiny --list-layers
python scripts/debug_layer_qat.py --model-id tiny --layer 3 --test-grad
python scripts/debug_layer_qat.py --model-id tiny --checkpoint outputs/anemll_tiny_a_v1 --list-layers
"""

from pathlib import Path

import _anemll

from qat_lora import tools


def main() -> None:
    parser = _anemll.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a trained model; default: the pretrained one, fitted now")
    parser.add_argument("--lut-size", type=int, default=16, choices=[4, 8, 16])
    parser.add_argument("--scale-rank", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--list-layers", action="store_true", help="all layers; so it is without --layer")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--test-grad", action="store_true", help="norm of the gradient of a sum over random inputs")
    args = parser.parse_args()
    settings = {"model_id": args.model_id, "checkpoint": args.checkpoint, "bits": args.lut_size.bit_length() - 1}
    settings |= {"rank": args.scale_rank, "group_size": args.group_size, "grad": args.test_grad}
    _anemll.run(lambda: tools.debug_layer(**settings, number=None if args.list_layers else args.layer))


if __name__ == "__main__":
    main()
