"""Measure what each choice in Fairy2i contributes: the final KL after the `story` training of quality.py.

    python -m benchmarks.variants --story FOLDER [--quick] [--json] [--seeds 0,1,2]

The variants differ in scale granularity and mode, number of stages, learning rate of the scales, int8 activations or
optimizer. A control outside of Fairy2i is residual sign quantization at the same bits: T stages of scale times sign.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmarks import quality
from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantLinear, QuantMethod
from wrinklefree.models.load import load_model

W2 = ["training=fairy2_w2", "training.lr=2.5e-3"]
W1 = ["training=fairy2_w1", "training.lr=5e-3"]

VARIANTS = {
    "w2 paper": [*W2, "method.preset=paper"],
    "w2 residual sign": W2,
    "w2 tensor als": [*W2, "method.scale_granularity=tensor", "method.scale_mode=als"],
    "w2 tensor learned": [*W2, "method.scale_granularity=tensor"],
    "w2 rank1 als": [*W2, "method.scale_mode=als"],
    "w2 rank1 learned (default)": W2,
    "w2 rank1 learned, scale lr x 5": [*W2, "training.optimizer.scale_lr=2.5e-3"],
    "w2 rank1 learned, muon": [*W2, "training.optimizer.name=muon"],
    "w2 rank1 learned, int8 activations": [*W2, "method.activation_bits=8"],
    "w2 row learned": [*W2, "method.scale_granularity=row"],
    "w2 group 32 learned": [*W2, "method.scale_granularity=group", "method.group_size=32"],
    "w1 paper": [*W1, "method.preset=paper"],
    "w1 residual sign": W1,
    "w1 tensor learned": [*W1, "method.scale_granularity=tensor"],
    "w1 rank1 learned (default)": W1,
    "w1 row learned": [*W1, "method.scale_granularity=row"],
    "w3 rank1 learned": [*W2, "method.num_stages=3"],
}


class SignLinear(QuantLinear):
    """Quantizes W ~ sum_t s_t sign(r_t) with r_0 = W, r_t+1 = r_t - s_t sign(r_t), s_t = mean |r_t|."""

    config: "ResidualSign"

    def encode(self) -> Codes:
        rest, bits, scales = self.weight.detach(), [], []
        for _ in range(self.config.num_stages):
            scales.append(rest.abs().mean())
            bits.append((rest < 0).to(torch.uint8))
            rest = rest - scales[-1] * (1 - 2.0 * bits[-1])
        shape = (self.out_features, self.in_features)
        return Codes(torch.stack(bits), 1, {"scales": torch.stack(scales)}, shape)

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        return torch.einsum("t,toi->oi", codes.tensors["scales"], 1 - 2.0 * codes.index)


@dataclass(kw_only=True)
class ResidualSign(QuantMethod):
    """The config of residual sign quantization."""

    layer: ClassVar[type[QuantLinear]] = SignLinear
    name: Literal["residual_sign"] = "residual_sign"
    num_stages: int = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--story", type=Path, required=True, help="folder with a small pretrained model")
    parser.add_argument("--quick", action="store_true", help="20 steps")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--only", default="", help="run only variants whose name contains this")
    args = parser.parse_args()
    stdout = sys.stdout
    if args.json:
        sys.stdout = sys.stderr
    seeds = [int(seed) for seed in args.seeds.split(",")]
    figures = measure(args.story, 20 if args.quick else 250, seeds, args.only)
    lines = [f"{name:36s} {f['kl']:.4f}  {f['bits']:.3f} bits" for name, f in figures.items()]
    print(json.dumps(figures, indent=2) if args.json else "\n".join(lines), file=stdout)


def measure(story: Path, steps: int, seeds: list[int], only: str) -> dict[str, Any]:
    """KL and bits of each variant whose name contains `only`: the mean over the seeds, and each seed."""
    teacher, tokenizer = load_model(story, dtype=torch.float32)
    teacher.requires_grad_(False)
    heldout = quality.sampled(teacher, batches=4, rows=12, length=256, seed=10_000)
    data = {seed: quality.sampled(teacher, steps, rows=12, length=128, seed=seed) for seed in seeds}
    figures = {}
    for name, overrides in VARIANTS.items():
        if only not in name:
            continue
        method = ResidualSign(num_stages=int(name[1])) if "residual sign" in name else None
        runs = [quality.story_run(story, overrides, teacher, tokenizer, data[s], heldout, s, method) for s in seeds]
        kls = [run.kl for run in runs]
        figures[name] = {"kl": statistics.mean(kls), "kl_seeds": kls, "bits": runs[0].bits}
    return figures


if __name__ == "__main__":
    main()
