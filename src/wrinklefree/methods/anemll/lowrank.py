"""A weight as table entries times low-rank scales: W [out, in] ~ Q * (A B), fitted by alternating least squares.

Q holds entries of a table, one per weight; A [out, r], B [r, in]. Each part of

    sum_oi h_i (W_oi - Q_oi sum_k A_ok B_ki)^2

has a closed form while the others stand still: Q takes the entry nearest to W / (A B), a row of A and a column of B are
r x r systems, a table entry is a quotient. So the error falls at every step. h [in] is the mean square of each input
(E x_i^2): an error in a loud channel costs more. Sums run in fp64, and so do not depend on the number of threads.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wrinklefree.core.codes import look_up

RIDGE = 1e-6  # of the mean diagonal: keeps directions that nothing determines where they are small
SMALLEST = 1e-8  # below this a scale is taken for this, with its sign, before it divides
CLIPS = (1.0, 0.86, 0.72, 0.6)  # shares of the group maximum to start from; the nearest wins


class Factors(NamedTuple):
    """table [N], ascending and symmetric, the largest entry 1; a [out, r]; b [r, in]."""

    table: Tensor
    a: Tensor
    b: Tensor

    def scales(self) -> Tensor:
        return self.a @ self.b


def uniform_table(bits: int) -> Tensor:
    """2**bits evenly spaced numbers from -1 to 1, none of them 0: fp32 [2**bits], rounded to fp16."""
    return torch.linspace(-1, 1, 2**bits).half().float()


def guarded(scales: Tensor) -> Tensor:
    """Scales that may divide: no closer to 0 than `SMALLEST`, signs kept."""
    return torch.where(scales.abs() < SMALLEST, torch.where(scales < 0, -SMALLEST, SMALLEST), scales)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of an ascending table nearest to each value: uint8, the shape of `values`."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def group_svd(weight: Tensor, group_size: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-r approximation of group maxima, max |W| over `group_size` columns, each repeated over its group.

    U [out, r], s [r], V [r, in] of the singular value decomposition. Worked out on [out, groups]: repeating a column n
    times leaves U as it is and makes its singular value sqrt(n) times larger.
    """
    out, width = weight.shape
    padded = nn.functional.pad(weight.double(), (0, -width % group_size))
    maxima = padded.unflatten(1, (-1, group_size)).abs().amax(-1).clamp_min(SMALLEST)
    u, s, v = torch.linalg.svd(maxima, full_matrices=False)
    count = min(rank, out, width)
    u, s, v = (nn.functional.pad(t, pad) for t, pad in zip((u, s, v), _missing(s, count), strict=True))
    repeated = v.repeat_interleave(group_size, dim=1)[:, :width] / group_size**0.5
    return u[:, :count].float(), (s[:count] * group_size**0.5).float(), repeated[:count].float()


def _missing(s: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """Paddings that fill u, s and v with zeros up to `count` components."""
    more = max(0, count - len(s))
    return (0, more), (0, more), (0, 0, 0, more)


def start(weight: Tensor, bits: int, rank: int, group_size: int) -> Factors:
    """The factors that the group maxima give, with the table evenly spaced."""
    u, s, v = group_svd(weight, group_size, rank)
    idle = (v == 0).all(1, keepdim=True)  # more ranks than groups: directions that a fit can take up
    return Factors(uniform_table(bits).to(weight.device), u * s, torch.where(idle, directions(len(v), v), v))


def by_rows(weight: Tensor, bits: int, rank: int) -> Factors:
    """The simplest factors: the maximum of each row, and idle directions."""
    maxima = weight.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    b = torch.cat([torch.ones_like(weight[:1]), directions(rank - 1, weight)])
    return Factors(uniform_table(bits).to(weight.device), nn.functional.pad(maxima, (0, rank - 1)), b)


def directions(count: int, like: Tensor) -> Tensor:
    """Random rows [count, width of `like`] of length 1, always the same."""
    rows = torch.randn(count, like.shape[1], generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(rows, dim=1).to(like)


def error(weight: Tensor, factors: Factors, importance: Tensor) -> Tensor:
    """sum h (W - Q A B)^2 with the nearest Q; fp64."""
    scales = factors.scales()
    values = look_up(factors.table, nearest(weight / guarded(scales), factors.table)) * scales
    return ((weight - values).double().square() * importance).sum()


def fit(weight: Tensor, factors: Factors, importance: Tensor, iterations: int, learn_table: bool) -> Factors:
    """Alternate from `factors`, shrunk by whichever of `CLIPS` is nearest. Weight [out, in] fp32, importance [in]."""
    importance = importance.double()
    tried = [Factors(factors.table, factors.a * clip, factors.b) for clip in CLIPS]
    best = min(tried, key=lambda f: error(weight, f, importance).item())
    for _ in range(iterations):
        best = step(weight, best, importance, learn_table)
    return best


def step(weight: Tensor, factors: Factors, importance: Tensor, learn_table: bool) -> Factors:
    """One round: entries, rows of A, entries again, columns of B, perhaps the table."""
    table, a, b = factors
    q = look_up(table, nearest(weight / guarded(a @ b), table))
    a = solve_rows(weight, q, b, importance)
    q = look_up(table, nearest(weight / guarded(a @ b), table))
    b = solve_rows(weight.T, q.T, a.T, torch.ones(len(a), device=a.device, dtype=torch.float64)).T
    if learn_table:
        table, a = _refit_table(weight, Factors(table, a, b), importance)
    return Factors(table, a, b.contiguous())


def solve_rows(weight: Tensor, q: Tensor, b: Tensor, importance: Tensor) -> Tensor:
    """The a_o [r] that minimize sum_i h_i (W_oi - Q_oi a_o . b_i)^2, for every row o: [out, r]."""
    rank = len(b)
    q, b = q.double(), b.double()
    i, j = torch.triu_indices(rank, rank, device=b.device)
    pairs = (q.square() * importance) @ (b[i] * b[j]).T  # the upper triangle of each row's matrix
    matrix = torch.zeros(len(q), rank, rank, dtype=torch.float64, device=b.device)
    matrix[:, i, j] = matrix[:, j, i] = pairs
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    right = (q * weight.double() * importance) @ b.T
    return torch.linalg.solve(matrix, right).float()


def _refit_table(weight: Tensor, factors: Factors, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest table under these scales, symmetric, fp16, largest entry 1; and A, times what that took away."""
    scales = factors.scales()
    index = nearest(weight / guarded(scales), factors.table).flatten().long()
    weighted = importance * scales.double()
    size = len(factors.table)
    above = torch.zeros(size, dtype=torch.float64, device=weight.device)
    below = torch.zeros_like(above)
    above.index_add_(0, index, (weighted * weight).flatten())
    below.index_add_(0, index, (weighted * scales).flatten())
    values = (above - above.flip(0)) / (below + below.flip(0)).clamp_min(torch.finfo(torch.float32).tiny)
    if (values[size // 2 :].diff(prepend=values.new_zeros(1)) <= 0).any():  # an entry that nothing uses
        return factors.table, factors.a
    return (values / values[-1]).half().float(), factors.a * values[-1].float()


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with the columns of A as long as the rows of B: neither leaves the range of fp16."""
    lengths, others = a.norm(dim=0), b.norm(dim=1)
    ratio = torch.where((lengths > 0) & (others > 0), (others / lengths).sqrt(), 1.0)
    return a * ratio, b / ratio.unsqueeze(1)


@torch.no_grad()
def input_squares(
    model: nn.Module, sites: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Mean square of every input channel [in] of each site over `batches` (input_ids), in shares of the channels' mean.

    Held between 0.01 and 100, so that no channel is ignored; nothing without batches.
    """
    sums: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, 0) + inputs[0].detach().double().flatten(0, -2).square().sum(0)

    handles = [site.register_forward_pre_hook(partial(see, name)) for name, site in sites.items()]
    for batch in batches:
        device = next(model.parameters()).device
        model(**{name: batch[name].to(device) for name in ("input_ids", "position_ids") if name in batch})
    for handle in handles:
        handle.remove()
    return {name: (total / total.mean().clamp_min(SMALLEST)).clamp(0.01, 100).float() for name, total in sums.items()}
