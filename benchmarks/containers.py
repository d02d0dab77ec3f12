"""What Fairy2i would lose in containers of others: relative errors |W - Q| / |W| of a model before training.

    python -m benchmarks.containers --model FOLDER [--layers 0,10,20,29] [--json]

A container holds Fairy2i's weight only with tied scales (docs/formats.md). The figures are means over matrices.

| figure | weight |
|---|---|
| `w1_free`, `w1_tied`, `w1_equal` | W1 with a scale per row and axis, per row, and the same one for U and W |
| `w1_twice` | the scale of U twice that of W, or half of it |
| `w2_tied` | two stages, a scale per row and stage |
| `ternary_row`, `ternary_64` | plain ternary, a scale per row or per 64 columns |
| `integers_4` | integers of 4 bits, a scale per 32 columns, as in Q4_0 |
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import quality


def complex_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """U and W [n / 2, k / 2] of a real matrix, as U z + W conj(z) (arXiv 2512.02901)."""
    half_n, half_k = weight.shape[0] // 2, weight.shape[1] // 2
    (a, b), (c, d) = (rows.split(half_k, dim=1) for rows in weight.split(half_n))
    return torch.complex((a + d) / 2, (c - b) / 2), torch.complex((a - d) / 2, (c + b) / 2)


def projected(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the nearest of 1, i, -1, -i is real, the length along it, and the square of what is across."""
    real = z.real.abs() >= z.imag.abs()
    along, across = torch.where(real, z.real, z.imag).abs(), torch.where(real, z.imag, z.real)
    return real, along, across.square()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)


def w1_errors(weight: Tensor) -> dict[str, Tensor]:
    """Squared errors of one stage by how its scales are tied."""
    (real_u, u, lost_u), (real_w, w, lost_w) = map(projected, complex_parts(weight))
    lost = (lost_u + lost_w).sum(1)

    def error(scales_u: Tensor, scales_w: Tensor) -> Tensor:
        return 2 * (lost + ((u - scales_u).square() + (w - scales_w).square()).sum(1))

    free = [torch.where(r, masked_mean(x, r), masked_mean(x, ~r)) for r, x in ((real_u, u), (real_w, w))]
    mean_u, mean_w = u.mean(1, keepdim=True), w.mean(1, keepdim=True)
    both = (mean_u + mean_w) / 2
    larger_u, larger_w = (2 * mean_u + mean_w) / 5, (mean_u + 2 * mean_w) / 5  # the least-squares unit
    twice = torch.minimum(error(2 * larger_u, larger_u), error(larger_w, 2 * larger_w))
    found = {"w1_free": error(*free), "w1_tied": error(mean_u, mean_w), "w1_equal": error(both, both)}
    return {name: rows.sum() for name, rows in (found | {"w1_twice": twice}).items()}


def w2_error(weight: Tensor) -> Tensor:
    total = torch.zeros(())
    for z in complex_parts(weight):
        for _ in range(2):
            real, along, _ = projected(z)
            scales = along.mean(1, keepdim=True)
            z = z - torch.where(real, z.real.sign(), 1j * z.imag.sign()) * scales
        total += 2 * z.abs().square().sum()
    return total


def ternary_error(weight: Tensor, size: int) -> Tensor:
    blocks = weight.unflatten(1, (-1, size))
    scales = blocks.abs().mean(-1, keepdim=True)
    for _ in range(10):
        codes = (blocks / scales.clamp_min(1e-9)).round().clamp(-1, 1)
        scales = (blocks * codes).sum(-1, keepdim=True) / codes.abs().sum(-1, keepdim=True).clamp_min(1)
    return (blocks - codes * scales).square().sum()


def integer_error(weight: Tensor) -> Tensor:
    """The best of 14 scales for each 32 columns, as `methods/uniform` searches them."""
    blocks = weight.unflatten(1, (-1, 32))
    errors = []
    for step in range(14):
        scales = blocks.abs().amax(-1, keepdim=True) / 7 * (1 - step / 32)
        errors.append(((blocks / scales).round().clamp(-8, 7) * scales - blocks).square().sum(-1))
    return torch.stack(errors).amin(0).sum()


def errors_of(weight: Tensor) -> dict[str, float]:
    """Relative errors of one matrix."""
    found = w1_errors(weight) | {"w2_tied": w2_error(weight), "integers_4": integer_error(weight)}
    found |= {"ternary_row": ternary_error(weight, weight.shape[1]), "ternary_64": ternary_error(weight, 64)}
    return {name: (error / weight.square().sum()).sqrt().item() for name, error in found.items()}


@torch.no_grad()
def compute(args: argparse.Namespace) -> dict[str, Any]:
    """Means over the linear layers of the chosen decoder layers."""
    chosen = tuple(f"layers.{number}." for number in args.layers.split(","))
    found: dict[str, list[float]] = {}
    with safe_open(args.model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            if "_proj.weight" in name and any(layer in name for layer in chosen):
                for figure, value in errors_of(file.get_tensor(name).float()).items():
                    found.setdefault(figure, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with model.safetensors")
    parser.add_argument("--layers", default="0,10,20,29", help="decoder layers, comma-separated")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    quality.print_figures(parser.parse_args(), compute)


if __name__ == "__main__":
    main()
