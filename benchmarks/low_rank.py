"""Do products of thin matrices help, layer by layer? How much of each layer's output is lost, at how many bits.

    python -m benchmarks.low_rank --model FOLDER --text FILE [--blocks 0,11,29] [--steps 200] [--json]

The figure is that of `outliers.py`: the share of a layer's squared output that is lost, the mean over some blocks.
All weights are turned first (`outliers.rotated`). Rows:

    w1, w2           Fairy2i, calibrated, then trained for some steps on the layer's own error
    w2 + rank r      and the best product of two fp16 matrices of rank r for what is left (as in arXiv 2310.08659)
    factors 1, 2     no codes: diag(a) sign(U) diag(g) sign(V) diag(b), U [out, r], V [r, in], as in LittleBit
                     (arXiv 2506.13771); r is the largest with no more bits than w1 or w2. It begins with the singular
                     vectors and is trained for the same steps, straight through the signs

Bits count everything: codes, signs, and 16 for each scale and each entry of a correction.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.outliers import LENGTH, METHODS, TOKENS, rotated, second_moments
from wrinklefree.core.method import QuantLinear
from wrinklefree.core.ste import straight_through
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.models.load import load_model
from wrinklefree.reconstruction import feedback
from wrinklefree.tracking.terminal import print_table

RATE = 0.01  # of Adam, relative to the size of what it trains; it falls to zero
RANKS = (2, 8)

Measured = tuple[float, float]  # share of the output that is lost, bits per weight


def lost(error: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
    """tr(E H E^T) / tr(W H W^T)."""
    return ((error @ moments) * error).sum() / ((weight @ moments) * weight).sum()


def train(
    parameters: Iterable[Tensor], decoded: Callable[[], Tensor], weight: Tensor, moments: Tensor, steps: int
) -> Tensor:
    """Adam on the layer's lost output. Returns the best decoded weight that was met."""
    groups = [{"params": [p], "lr": RATE * p.detach().square().mean().sqrt().item()} for p in parameters]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    least, best = float("inf"), decoded().detach()
    for _ in range(steps):
        product = decoded()
        loss = lost(weight - product, weight, moments)
        if loss.item() < least:
            least, best = loss.item(), product.detach().clone()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return best


def coded(kind: str, weight: Tensor, moments: Tensor, steps: int) -> tuple[Tensor, float]:
    """The decoded weight of a calibrated and trained layer, and its bits per weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    layer: QuantLinear = METHODS[kind].layer(linear, METHODS[kind])
    feedback.calibrate(layer, moments)
    codes = layer.encode()
    numbers = sum(tensor.numel() for tensor in codes.tensors.values())
    bits = (codes.index.numel() * codes.bits + 16 * numbers) / weight.numel()
    return train(layer.parameters(), layer.quantized_weight, weight, moments, steps), bits


def corrected(error: Tensor, moments: Tensor, rank: int) -> Tensor:
    """`error` without its best approximation of this rank, where H weighs the columns."""
    values, vectors = torch.linalg.eigh(moments.double())
    values = values.clamp_min(1e-9 * values.max().item()).sqrt()
    root, inverse = vectors * values @ vectors.T, vectors / values @ vectors.T
    U, S, V = torch.linalg.svd(error.double() @ root, full_matrices=False)
    return (error - (U[:, :rank] * S[:rank] @ V[:rank] @ inverse)).float()


def rank_for(shape: torch.Size, bits: float) -> int:
    """The largest rank of binary factors with no more bits per weight."""
    n, k = shape
    return int((bits * n * k - 16 * (n + k)) // (n + k + 16))


def sign(x: Tensor) -> Tensor:
    return straight_through(x, torch.where(x >= 0, 1.0, -1.0))


def factors(weight: Tensor, moments: Tensor, rank: int, steps: int) -> Tensor:
    """The decoded weight of trained binary factors."""
    scale = (moments.diagonal() / moments.diagonal().mean()).clamp_min(1e-4).sqrt()
    left, S, right = torch.linalg.svd(weight * scale, full_matrices=False)
    rank = min(rank, len(S))  # more would be empty
    U, V = left[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt().unsqueeze(1) * right[:rank]
    a, b = U.abs().mean(1), V.abs().mean(0)
    g = (U / a.unsqueeze(1)).abs().mean(0) * (V / b).abs().mean(1)
    trained = [nn.Parameter(x.contiguous()) for x in (U, V, a, b / scale, g)]

    def decoded() -> Tensor:
        U, V, a, b, g = trained
        return a.unsqueeze(1) * ((sign(U) * g) @ sign(V)) * b

    return train(trained, decoded, weight, moments, steps)


def rows_of(weight: Tensor, moments: Tensor, steps: int) -> dict[str, Measured]:
    """Everything that is compared, for one layer."""
    rows: dict[str, Measured] = {}
    for number, kind in enumerate(("w1", "w2"), 1):
        product, bits = coded(kind, weight, moments, steps)
        rows[kind] = (lost(weight - product, weight, moments).item(), bits)
        rank = rank_for(weight.shape, bits)
        made = factors(weight, moments, rank, steps)
        rows[f"factors {number}"] = (lost(weight - made, weight, moments).item(), bits)
    for rank in RANKS:
        rest = corrected(weight - product, moments, rank)
        cost = 16 * rank * sum(weight.shape) / weight.numel()
        rows[f"w2 + rank {rank}"] = (lost(rest, weight, moments).item(), bits + cost)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", default="0,11,29")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model, _ = load_model(arguments.model, dtype=torch.float32)
    text = arguments.text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(arguments.model)(text, return_tensors="pt", verbose=False).input_ids[0]
    blocks = [int(number) for number in arguments.blocks.split(",")]
    moments = second_moments(model, ids[TOKENS : 2 * TOKENS].view(-1, LENGTH), blocks)
    found: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for (number, name), H in moments.items():
        weight = decoder_layers(model)[number].get_submodule(name).get_parameter("weight").detach().float()
        for row, measured in rows_of(*rotated(weight, H), arguments.steps).items():
            found[name, row].append(measured)
    means = {key: [sum(column) / len(values) for column in zip(*values, strict=True)] for key, values in found.items()}
    if arguments.json:
        print(json.dumps({" ".join(key): values for key, values in means.items()}))
        return
    print_table(
        ["layer", "what", "lost", "bits"],
        [[*key, f"{share:.4f}", f"{bits:.2f}"] for key, (share, bits) in means.items()],
    )


if __name__ == "__main__":
    main()
