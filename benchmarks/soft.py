"""Does a soft quantizer learn more than a hard one in the same steps? Measured on the first blocks of a real model.

    python -m benchmarks.soft --model FOLDER --text FILE [--blocks 2] [--steps 96] [--json]

A soft weight is the mean of all points of its method, weighted by exp(-|w - point|^2 / (t s^2)), with s the smallest
scale (Hestia, arXiv 2601.20745). The temperature t falls from its start to a fiftieth of that in the first half of the
steps; after that, and for every error shown, the weights are hard. `blend` instead moves from the master to the hard
weight in a straight line. `hard` is the straight-through estimator of the product.

The figure is the mean relative squared error of a token behind each block (wrinklefree/reconstruction/rebuild.py), for
Fairy2i at 2 bits, at several learning rates.
"""

import argparse
import copy
import itertools
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from wrinklefree.config.schema import BlockwiseConfig
from wrinklefree.core.method import QuantLinear
from wrinklefree.distributed.world import has_bf16
from wrinklefree.methods.fairy2 import Config, Fairy2Linear
from wrinklefree.methods.fairy2.decode import outer, to_real
from wrinklefree.methods.fairy2.fitting import to_widely_linear
from wrinklefree.models.load import load_model
from wrinklefree.reconstruction.rebuild import Rebuilding
from wrinklefree.tracking.terminal import print_table

LENGTH, BATCH, PASSES, HELDOUT = 256, 2, 2, 8  # HELDOUT: batches that errors are measured on
SOFT_SHARE, COLDEST = 0.5, 0.02  # of the steps; of the first temperature

START, KINDS = 8192, {"hard": 0.0, "soft 0.1": 0.1, "soft 0.3": 0.3, "soft 1": 1.0, "blend": 1.0}


class SoftLinear(Fairy2Linear):
    """Counts its training steps, and is soft in the first of them."""

    config: "SoftConfig"
    log_scales: nn.Parameter
    log_rows: nn.Parameter
    log_columns: nn.Parameter

    def quantized_weight(self) -> Tensor:
        if not torch.is_grad_enabled():
            return super().quantized_weight()
        self.step = vars(self).get("step", 0) + 1
        progress = self.step / (SOFT_SHARE * self.config.steps)
        if self.config.kind == "hard" or progress >= 1:
            return super().quantized_weight()
        if self.config.kind == "blend":
            hard = super().quantized_weight()
            return hard + (1 - progress) * (self.weight.detach() - hard.detach())
        return self.soft(KINDS[self.config.kind] * COLDEST**progress)

    def soft(self, temperature: float) -> Tensor:
        """The mean of all points, differentiable in the master and in the scales: fp32 [out, in]."""
        scales, factors = self.log_scales.exp(), outer(self.log_rows.exp(), self.log_columns.exp())
        re, im = to_widely_linear(self.weight / factors.detach()).unbind(1)
        points = [point(scales, units) for units in itertools.product(range(4), repeat=scales.shape[1])]
        p_re, p_im = (torch.stack(axis) for axis in zip(*points, strict=True))
        distance = (re - p_re).square() + (im - p_im).square()
        share = (-distance / (temperature * scales.detach().amin().square())).softmax(0)
        return to_real(torch.stack([(share * p_re).sum(0), (share * p_im).sum(0)], dim=1)) * factors


def point(scales: Tensor, units: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The sum of one unit i^k a stage for scales [2, T, 2, 1, 1], as its real and imaginary part, each [2, 1, 1]."""
    axes = [torch.zeros_like(scales[:, 0, 0]), torch.zeros_like(scales[:, 0, 0])]
    for stage, k in enumerate(units):
        axes[k % 2] = axes[k % 2] + scales[:, stage, k % 2] * (1 - (k & 2))
    return axes[0], axes[1]


@dataclass(kw_only=True)
class SoftConfig(Config):
    """Fairy2i with a quantizer that is soft in the first steps."""

    layer: ClassVar[type[QuantLinear]] = SoftLinear
    kind: str = "hard"
    steps: int = 96


def bf16() -> AbstractContextManager[Any]:
    """bf16 products if the processor has them."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu")))


def errors(
    original: PreTrainedModel, ids: Tensor, kind: str, rate: float, steps: int, blocks: int
) -> tuple[list[float], float]:
    """The error behind each of the first blocks, and the seconds that they took."""
    student = SoftConfig(kind=kind, steps=steps).prepare(copy.deepcopy(original).requires_grad_(True), initialize=False)
    assert isinstance(student, PreTrainedModel)
    settings = BlockwiseConfig(lr=rate, batch_size=BATCH, passes=PASSES)
    batches = [{"input_ids": rows} for rows in ids.split(BATCH)]
    work = Rebuilding(original, student, batches, HELDOUT, settings, partial(bf16), seed=0)
    reports = [work.rebuild(number, steps) for number in range(blocks)]
    return [report.trained for report in reports], sum(report.seconds for report in reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rates", default="0.0025,0.01,0.025")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    original, _ = load_model(arguments.model, dtype=torch.float32)
    original.requires_grad_(False)
    ids = AutoTokenizer.from_pretrained(arguments.model)(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    count = arguments.steps * BATCH // PASSES + HELDOUT * BATCH
    rows = ids[START : START + count * LENGTH].view(count, LENGTH)
    found = {}
    for rate, kind in itertools.product(map(float, arguments.rates.split(",")), KINDS):
        found[f"{kind} {rate}"] = errors(original, rows, kind, rate, arguments.steps, arguments.blocks)
    if arguments.json:
        print(json.dumps({name: {"errors": values, "seconds": seconds} for name, (values, seconds) in found.items()}))
        return
    table = [[name, *(f"{v:.4f}" for v in values), f"{seconds:.0f} s"] for name, (values, seconds) in found.items()]
    print_table(["quantizer, rate", *(f"block {i + 1}" for i in range(arguments.blocks)), "time"], table)


if __name__ == "__main__":
    main()
