"""Fit Fairy2i codes and scales to a weight: the paper's residual stages, or alternating least squares.

Formulas, symbols and shapes are explained in this folder's `__init__.py`.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from wrinklefree.core.ste import round_fp16
from wrinklefree.methods.fairy2.decode import outer, spread, units

ALS_ITERATIONS, BALANCE_ITERATIONS, TINY = 6, 5, 1e-8


def to_widely_linear(R: Tensor) -> Tensor:
    """Convert a real matrix [2n, 2m] to Z [2 (U, W), 2 (re, im), n, m], without loss."""
    (A, B), (C, D) = (half.chunk(2, dim=1) for half in R.chunk(2, dim=0))
    return torch.stack([A + D, C - B, A - D, C + B]).unflatten(0, (2, 2)) / 2


def padded(weight: Tensor) -> Tensor:
    """Add a zero row to [out, in] if `out` is odd, and a zero column if `in` is odd."""
    return pad(weight, (0, weight.shape[1] % 2, 0, weight.shape[0] % 2))


def nearest_unit(Z: Tensor) -> Tensor:
    """For each entry of Z [2, 2, n, m], the code k whose unit i^k is nearest in phase: uint8 [2, n, m].

    If |re| = |im|, the imaginary axis is taken, as in the paper.
    """
    re, im = Z.unbind(1)
    imaginary = re.abs() <= im.abs()
    negative = (imaginary & (im < 0)) | (~imaginary & (re < 0))
    return imaginary.to(torch.uint8) | (negative.to(torch.uint8) << 1)


def residual_codes(Z: Tensor, num_stages: int) -> tuple[Tensor, Tensor]:
    """The paper's quantizer. Each stage quantizes what the stages before left over.

    Returns codes uint8 [2, T, n, m] and scales [2, T, 2, 1, 1].
    """
    codes, scales = [], []
    for _ in range(num_stages):
        k = nearest_unit(Z)
        axes = torch.stack(units(k), dim=1)
        used = axes.abs().sum(dim=(2, 3), keepdim=True).clamp_min(1)
        s = round_fp16(((Z * axes).sum(dim=(2, 3), keepdim=True) / used).clamp_min(TINY))
        Z = Z - axes * s
        codes.append(k)
        scales.append(s)
    return torch.stack(codes, dim=1), torch.stack(scales, dim=1)


def candidates(num_stages: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The axis and the sign of each stage's unit, for every sum of units that `nearest_codes` has to try.

    Of four sums that mirror each other in the axes only one is listed: on each axis, the first unit is positive.
    """
    sums = []
    for axes in itertools.product((1, 0), repeat=num_stages):
        for signs in itertools.product((1, -1), repeat=num_stages):
            first = dict(reversed(list(zip(axes, signs, strict=True))))  # axis -> sign of its first unit
            if all(sign == 1 for sign in first.values()):
                sums.append((axes, signs))
    return sums


def nearest_codes(Z: Tensor, scales: Tensor) -> Tensor:
    """The codes [2, T, n, m] whose sum is nearest to Z, among all 4^T sums that `scales` allow.

    It maximizes x.q - |q|^2 / 2, which has the same maximum as -|x - q|^2. A tie goes to the imaginary axis.
    """
    x, y = Z.abs().unbind(1)  # by symmetry it is enough to search one quadrant; the signs are applied at the end
    scales = spread(scales, *Z.shape[-2:])
    best = torch.full_like(x, -torch.inf)
    codes = [torch.zeros_like(x, dtype=torch.uint8) for _ in range(scales.shape[1])]
    for axes, signs in candidates(scales.shape[1]):
        terms = [scales[:, t, axis] * sign for t, (axis, sign) in enumerate(zip(axes, signs, strict=True))]
        point = [sum((s for s, axis in zip(terms, axes, strict=True) if axis == a), 0 * terms[0]) for a in (0, 1)]
        p, q = point[0].abs(), point[1].abs()
        score = (x * p).addcmul_(y, q).sub_((p.square() + q.square()) / 2)
        # A mask of 0 or 255, because torch.where on random conditions is 50 times slower on a CPU.
        better = (score > best).to(torch.uint8).neg_()
        best = torch.maximum(best, score)
        for code, axis, sign in zip(codes, axes, signs, strict=True):
            flipped = (point[axis] < 0) ^ (sign < 0)
            code ^= (code ^ (axis | flipped.to(torch.uint8) << 1)) & better
    negative_re, negative_im = ((Z < 0).to(torch.uint8) << 1).unbind(1)
    return torch.stack([k ^ negative_re ^ ((negative_re ^ negative_im) & (k & 1).neg()) for k in codes], dim=1)


def blocks(x: Tensor, like: Tensor) -> Tensor:
    """Split [..., n, m] into the blocks that share a scale of `like` [..., R, G]: [..., R, n / R, G, m / G]."""
    return x.unflatten(-1, (like.shape[-1], -1)).unflatten(-3, (like.shape[-2], -1))


def fit_scales(Z: Tensor, index: Tensor, like: Tensor, importance: Tensor | None = None) -> Tensor:
    """The least-squares scales [2, T, 2, R, G] for given codes. `like` has their shape.

    Each part (U, W), axis, row and group has T x T normal equations of its own. `importance` [n, m] weights entries.
    """
    axes = torch.stack(units(index), dim=2)  # [2, T, 2, n, m]
    weighted = axes if importance is None else axes * importance
    gram = torch.einsum("ptarigj,psarigj->pargts", blocks(weighted, like), blocks(axes, like))
    moment = torch.einsum("ptarigj,parigj->pargt", blocks(weighted, like), blocks(Z, like))
    entries = Z.shape[-2] * Z.shape[-1] / (like.shape[-2] * like.shape[-1])
    # If two stages have equal codes everywhere, rows of the system are equal. The ridge makes the solution unique.
    ridge = 1e-6 * entries * torch.eye(index.shape[1], device=Z.device)
    scales = torch.linalg.solve(gram.double() + ridge, moment.double())
    return scales.to(Z.dtype).permute(0, 4, 1, 2, 3).contiguous()


def balance(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of complex rows [n] and columns [m]. A weight divided by them has a root mean square of 1 in each.

    The factors alternate as in Sinkhorn's algorithm.
    """
    energy = weight.square().unflatten(1, (2, -1)).mean(1).unflatten(0, (2, -1)).mean(0) + TINY**2
    rows, columns = energy.mean(1).sqrt(), torch.ones_like(energy[0])
    for _ in range(BALANCE_ITERATIONS):
        columns = (energy / rows.square().unsqueeze(1)).mean(0).sqrt()
        rows = (energy / columns.square()).mean(1).sqrt()
    return rows, columns


def fit(
    weight: Tensor, num_stages: int, grid: tuple[int, int], rank1: bool, importance: Tensor | None = None
) -> dict[str, Tensor]:
    """Fit the scales of a weight with even widths by alternating least squares: nearest codes, then best scales.

    `importance` [in] says how often an error in a column counts; None counts all once.
    Returns `scales` [2, T, 2, R, G] with (R, G) = `grid`, and for rank1 also `rows` [n] and `columns` [m].
    """
    factors: dict[str, Tensor] = {}
    counts = None
    if importance is not None:
        # U and W mix the columns j and j + m, so their errors share one importance.
        counts = pad(importance, (0, len(importance) % 2)).unflatten(0, (2, -1)).mean(0).expand(len(weight) // 2, -1)
        counts = counts / counts.mean()
    if rank1:
        factors = dict(zip(("rows", "columns"), balance(weight), strict=True))
        weight = weight / outer(factors["rows"], factors["columns"])
        if counts is not None:
            counts = counts * factors["rows"].square().unsqueeze(1) * factors["columns"].square()
            counts = counts / counts.mean()
    Z = to_widely_linear(weight)
    index, scales = residual_codes(Z, num_stages)
    like = scales.expand(-1, -1, -1, *grid)
    for _ in range(ALS_ITERATIONS):
        scales = fit_scales(Z, index, like, counts).abs().clamp_min(TINY)
        index = nearest_codes(Z, scales)
    return {"scales": fit_scales(Z, index, like, counts).abs().clamp_min(TINY), **factors}


def unfitted(weight: Tensor, num_stages: int, grid: tuple[int, int], rank1: bool) -> dict[str, Tensor]:
    """Ones in the shapes of what `fit` returns."""
    n, m = weight.shape[0] // 2, weight.shape[1] // 2
    shapes = {"scales": (2, num_stages, 2, *grid)} | ({"rows": (n,), "columns": (m,)} if rank1 else {})
    return {name: weight.new_ones(shape) for name, shape in shapes.items()}
