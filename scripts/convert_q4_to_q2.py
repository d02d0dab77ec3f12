"""Convert a trained model to fewer bits: 4-bit tables in the MLP become 2-bit tables, with higher ranks.

    python scripts/convert_q4_to_q2.py --q4-checkpoint runs/q4/best.pt --output runs/q2_from_q4/q2_init.pt

The factors are fitted to the 4-bit weights in closed form. With --kmeans only the table is reduced, as in the original
script.
"""

from pathlib import Path

import _anemll


def main() -> None:
    parser = _anemll.parser(__doc__)
    parser.add_argument("--q4-checkpoint", type=Path, required=True, help="a run, a checkpoint folder or a .pt file")
    parser.add_argument("--output", type=Path, required=True, help="a .pt file, or a folder")
    parser.add_argument("--q2-mlp-rank", type=_anemll.at_least(1), default=32)
    parser.add_argument("--q2-attn-rank", type=_anemll.at_least(1), default=8)
    parser.add_argument("--q2-mlp-lut-size", type=int, default=4, choices=[4, 8, 16])
    parser.add_argument("--q2-attn-lut-size", type=int, default=16, choices=[4, 8, 16])
    parser.add_argument("--kmeans", action="store_true", help="cluster the table's entries instead of a new fit")
    parser.add_argument("--eval", action="store_true", help="print the KD loss on the cache before and after")
    parser.add_argument("--cache-dir", type=Path, help="the KD cache for --eval")
    args = parser.parse_args()
    bits = (args.q2_mlp_lut_size.bit_length() - 1, args.q2_attn_lut_size.bit_length() - 1)
    settings = {"checkpoint": args.q4_checkpoint, "output": args.output, "model_id": args.model_id, "force": args.force}
    settings |= {"ranks": (args.q2_mlp_rank, args.q2_attn_rank), "bits": bits, "kmeans": args.kmeans}
    if args.eval and args.cache_dir is None:
        parser.error("--eval needs --cache-dir")
    _anemll.tool("q4_to_q2", **settings, cache=args.cache_dir if args.eval else None)


if __name__ == "__main__":
    main()
