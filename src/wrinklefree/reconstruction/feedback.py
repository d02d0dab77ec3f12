"""Choose codes column by column, so that later columns make up for the errors of earlier ones.

GPTQ (arXiv 2210.17323), and LDLQ of QuIP (arXiv 2307.13304), which is the same rule. For inputs x with the second
moments H = E x x^T, a layer's mean squared output error is tr((W - Q) H (W - Q)^T). Let U be the upper Cholesky factor
of H^-1, so that H^-1 = U^T U, and P a set of columns that are coded together. For one set after the other:

    Q_P = nearest(W_P)      E = (W_P - Q_P) U_PP^-1      W_later -= E U_P,later

Sets with large moments come first: what is coded late has nothing left to make up for it.

Symbols: W, Q [out, in]; H, U [in, in]; P 1 or 2 columns.
"""

import torch
from torch import Tensor

from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantLinear

DAMPING = 0.01  # share of the mean diagonal of H that is added to it, as in GPTQ
LAZY = 64  # sets after which all later ones are corrected at once


def factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of `moments` [in, in], damped. fp32."""
    damped = moments.double()
    diagonal = damped.diagonal()
    # A column that is always 0 has no influence, and no inverse either.
    diagonal += DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


@torch.no_grad()
def calibrate(layer: QuantLinear, moments: Tensor) -> None:
    """Choose the layer's scales and codes for inputs with the second moments `moments`, fp32 [in, in].

    The master becomes a weight whose nearest codes are the chosen ones, so training goes on from there.
    """
    mean = moments.diagonal().mean()
    if mean == 0:
        return  # nothing comes in, so no code is better than another
    layer.fit(moments.diagonal() / mean)
    master, rounded = with_feedback(layer, moments)
    layer.adopt(master, rounded)
    layer.effective.clear()


def with_feedback(layer: QuantLinear, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Code the layer's columns with error feedback for its present scales.

    Returns the corrected weight, each column as it was when it was coded, and the values of the codes: fp32 [out, in].
    """
    codes = layer.encode()
    tensors = {name: tensor.detach() for name, tensor in codes.tensors.items()}
    sets = by_importance(layer.column_sets(), moments.diagonal())
    order = torch.cat(sets)
    U = factor(moments[order][:, order])
    W = layer.weight.detach()[:, order].clone()
    Q = torch.empty_like(W)
    end = 0
    for chunk in range(0, len(sets), LAZY):
        first, end = end, end + sum(len(columns) for columns in sets[chunk : chunk + LAZY])
        errors, here = [], slice(first, first)
        for columns in sets[chunk : chunk + LAZY]:
            here = slice(here.stop, here.stop + len(columns))
            part = layer.part(tensors, columns)
            Q[:, here] = layer.decode(Codes(layer.nearest(W[:, here], part), codes.bits, part, (len(W), len(columns))))
            error = torch.linalg.solve_triangular(U[here, here], W[:, here] - Q[:, here], upper=True, left=False)
            W[:, here.stop : end] -= error @ U[here, here.stop : end]
            errors.append(error)
        W[:, end:] -= torch.cat(errors, dim=1) @ U[first:end, end:]
    back = order.argsort()
    return W[:, back].contiguous(), Q[:, back].contiguous()


def by_importance(sets: list[Tensor], importance: Tensor) -> list[Tensor]:
    """Order sets of columns by the sum of their importance [in], the largest first."""
    sums = torch.stack([importance[columns].sum() for columns in sets])
    return [sets[i] for i in sums.argsort(descending=True, stable=True)]
