"""Do products of thin matrices help, layer by layer? How much of each layer's output is lost, at how many bits.

    python -m benchmarks.low_rank --model FOLDER --text FILE [--blocks 0,11,29] [--steps 200] [--json]

The figure is that of `outliers.py`: the share of a layer's squared output that is lost, the mean over some blocks.
All weights are turned first (`outliers.rotated`). Rows:

    w1, w2           Fairy2i, calibrated, then trained for some steps on the layer's own error
    w2 + rank r      and the best product of two fp16 matrices of rank r for what is left (as in arXiv 2310.08659)
    factors 1, 2     no codes: diag(a) sign(U) diag(g) sign(V) diag(b), U [out, r], V [r, in], as in LittleBit
                     (arXiv 2506.13771); r is the largest with no more bits than w1 or w2, at most that of a matrix
                     of this shape. It begins with the singular vectors and is trained, straight through the signs

Bits count everything: codes, signs, and 16 for each scale and each entry of a correction.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.outliers import METHODS, calibrated, layers, lost, parser, rotated
from wrinklefree.core.ste import straight_through
from wrinklefree.tracking.terminal import print_table

RATE = 0.01  # of Adam, relative to the size of what it trains; it falls to zero
RANKS = (2, 8)

Measured = tuple[float, float]  # share of the output that is lost, bits per weight


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
    layer = calibrated(METHODS[kind], weight, moments)
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
    """The largest rank of binary factors with no more bits per weight; more than the smaller side would be empty."""
    n, k = shape
    return min(n, k, int((bits * n * k - 16 * (n + k)) // (n + k + 16)))


def bits_of(shape: torch.Size, rank: int) -> float:
    """Bits per weight of binary factors with their three scales."""
    n, k = shape
    return (rank * (n + k + 16) + 16 * (n + k)) / (n * k)


def sign(x: Tensor) -> Tensor:
    return straight_through(x, torch.where(x >= 0, 1.0, -1.0))


def factors(weight: Tensor, moments: Tensor, rank: int, steps: int) -> Tensor:
    """The decoded weight of trained binary factors."""
    scale = (moments.diagonal() / moments.diagonal().mean()).clamp_min(1e-4).sqrt()
    left, S, right = torch.linalg.svd(weight * scale, full_matrices=False)
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
        rows[f"factors {number}"] = (lost(weight - made, weight, moments).item(), bits_of(weight.shape, rank))
    for rank in RANKS:
        rest = corrected(weight - product, moments, rank)
        cost = 16 * rank * sum(weight.shape) / weight.numel()
        rows[f"w2 + rank {rank}"] = (lost(rest, weight, moments).item(), bits + cost)
    return rows


def main() -> None:
    arguments_of = parser(__doc__, "0,11,29")
    arguments_of.add_argument("--steps", type=int, default=200)
    arguments = arguments_of.parse_args()
    found: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for name, _, weight, H in layers(arguments):
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
