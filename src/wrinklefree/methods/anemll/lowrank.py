"""Fit W [out, in] ~ Q * (A B) by alternating least squares. Q holds one table entry per weight; A [out, r], B [r, in].

    minimize  sum_oi h_i (W_oi - Q_oi sum_k A_ok B_ki)^2

h [in] is the mean square of each input, E x_i^2, so errors weigh more on columns with large inputs. Each part has a
closed form while the others are fixed, so the error falls at every step:

| part | solution |
|---|---|
| Q | the table entry nearest to W / (A B) |
| a row of A, a column of B | an r x r linear system |
| a table entry | a quotient of two sums |

Sums run in fp64, so that results do not depend on the number of threads.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wrinklefree.core.batch import model_inputs
from wrinklefree.core.codes import look_up

RIDGE = 1e-6  # share of the mean diagonal that is added to it: keeps undetermined directions small
SMALLEST = 1e-8  # the least absolute value of a scale that divides
CLIPS = (1.0, 0.86, 0.72, 0.6)  # shares of the group maximum to try as a start; the one with the least error is taken


class Factors(NamedTuple):
    """Table [N], ascending, symmetric, with largest entry 1; factors a [out, r] and b [r, in] of the scales."""

    table: Tensor
    a: Tensor
    b: Tensor

    def scales(self) -> Tensor:
        """The scales a b [out, in], one per weight."""
        return self.a @ self.b


def uniform_table(bits: int) -> Tensor:
    """2**bits evenly spaced numbers from -1 to 1: fp32 [2**bits], rounded to fp16. None of them is 0."""
    return torch.linspace(-1, 1, 2**bits).half().float()


def guarded(scales: Tensor) -> Tensor:
    """Move scales away from 0 to at least `SMALLEST`, keeping their signs, so that they can divide."""
    return torch.where(scales.abs() < SMALLEST, torch.where(scales < 0, -SMALLEST, SMALLEST), scales)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """For each value, the index of the nearest entry in an ascending table: uint8, in the shape of `values`."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def group_svd(weight: Tensor, group_size: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate the group maxima of a weight by rank r: U [out, r], s [r], V [r, in] of their SVD.

    A group maximum is max |W| over `group_size` columns, repeated over these columns.
    """
    out, width = weight.shape
    padded = nn.functional.pad(weight.double(), (0, -width % group_size))
    maxima = padded.unflatten(1, (-1, group_size)).abs().amax(-1).clamp_min(SMALLEST)
    # Decompose [out, groups]: repeating every column n times leaves U as it is and scales s by sqrt(n).
    u, s, v = torch.linalg.svd(maxima, full_matrices=False)
    count = min(rank, out, width)
    u, s, v = (nn.functional.pad(t, pad) for t, pad in zip((u, s, v), _missing(s, count), strict=True))
    repeated = v.repeat_interleave(group_size, dim=1)[:, :width] / group_size**0.5
    return u[:, :count].float(), (s[:count] * group_size**0.5).float(), repeated[:count].float()


def _missing(s: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """The arguments of `pad` that fill u, s and v with zeros up to `count` components."""
    more = max(0, count - len(s))
    return (0, more), (0, more), (0, 0, 0, more)


def start(weight: Tensor, bits: int, rank: int, group_size: int) -> Factors:
    """Start factors: an evenly spaced table, and scales from the SVD of the group maxima."""
    u, s, v = group_svd(weight, group_size, rank)
    # With more ranks than groups, some rows of V are zero. Random directions let a fit use them; s is zero there.
    idle = (v == 0).all(1, keepdim=True)
    return Factors(uniform_table(bits).to(weight.device), u * s, torch.where(idle, directions(len(v), v), v))


def by_rows(weight: Tensor, bits: int, rank: int) -> Factors:
    """The simplest factors: one scale per row, its largest absolute weight. Further ranks have magnitude 0."""
    maxima = weight.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    b = torch.cat([torch.ones_like(weight[:1]), directions(rank - 1, weight)])
    return Factors(uniform_table(bits).to(weight.device), nn.functional.pad(maxima, (0, rank - 1)), b)


def directions(count: int, like: Tensor) -> Tensor:
    """`count` random rows of length 1, as wide as `like`. The same on every call."""
    rows = torch.randn(count, like.shape[1], generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(rows, dim=1).to(like)


def error(weight: Tensor, factors: Factors, importance: Tensor) -> Tensor:
    """The weighted squared error sum h (W - Q A B)^2 with the nearest Q, in fp64."""
    scales = factors.scales()
    values = look_up(factors.table, nearest(weight / guarded(scales), factors.table)) * scales
    return ((weight - values).double().square() * importance).sum()


def fit(weight: Tensor, factors: Factors, importance: Tensor, iterations: int, learn_table: bool) -> Factors:
    """Improve `factors` by alternating least squares. Weight fp32 [out, in], importance [in].

    The start is `factors` shrunk by the one of `CLIPS` with the least error.
    """
    importance = importance.double()
    starts = [Factors(factors.table, factors.a * clip, factors.b) for clip in CLIPS]
    best = min(starts, key=lambda f: error(weight, f, importance).item())
    for _ in range(iterations):
        best = step(weight, best, importance, learn_table)
    return best


def step(weight: Tensor, factors: Factors, importance: Tensor, learn_table: bool) -> Factors:
    """One round of the alternation: Q, rows of A, Q again, columns of B, and the table if it is learned."""
    table, a, b = factors
    q = look_up(table, nearest(weight / guarded(a @ b), table))
    a = solve_rows(weight, q, b, importance)
    q = look_up(table, nearest(weight / guarded(a @ b), table))
    b = solve_rows(weight.T, q.T, a.T, torch.ones(len(a), device=a.device, dtype=torch.float64)).T
    if learn_table:
        table, a = _refit_table(weight, Factors(table, a, b), importance)
    return Factors(table, a, b.contiguous())


def solve_rows(weight: Tensor, q: Tensor, b: Tensor, importance: Tensor) -> Tensor:
    """Minimize sum_i h_i (W_oi - Q_oi a_o . b_i)^2 over a_o, for every row o. Returns all a_o as [out, r]."""
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
    """Fit the table to the weight for fixed scales. Returns it (symmetric, fp16, largest entry 1) and A.

    A is multiplied by the fitted table's largest entry, which the division by it took away.
    """
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
    """Make the columns of A as long as the rows of B without changing A B, so that both fit the range of fp16."""
    lengths, others = a.norm(dim=0), b.norm(dim=1)
    ratio = torch.where((lengths > 0) & (others > 0), (others / lengths).sqrt(), 1.0)
    return a * ratio, b / ratio.unsqueeze(1)


@torch.no_grad()
def input_squares(
    model: nn.Module, sites: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """For each site, the mean square of its inputs per channel over `batches`, relative to the mean channel: [in].

    Values are clamped to 0.01 .. 100, so that no channel is ignored. Without batches the result is empty.
    """
    sums: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, 0) + inputs[0].detach().double().flatten(0, -2).square().sum(0)

    handles = [site.register_forward_pre_hook(partial(see, name)) for name, site in sites.items()]
    for batch in batches:
        device = next(model.parameters()).device
        model(**{name: tensor.to(device) for name, tensor in model_inputs(batch).items()})
    for handle in handles:
        handle.remove()
    return {name: (total / total.mean().clamp_min(SMALLEST)).clamp(0.01, 100).float() for name, total in sums.items()}
