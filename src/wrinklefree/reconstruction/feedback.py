"""Choose codes column by column, so that later columns make up for the errors of earlier ones.

GPTQ (arXiv 2210.17323), and LDLQ of QuIP (arXiv 2307.13304), which is the same rule. For inputs x with the second
moments H = E x x^T, a layer's mean squared output error is tr((W - Q) H (W - Q)^T). Let U be the upper Cholesky factor
of H^-1, so that H^-1 = U^T U, and P a set of columns that are coded together. For one set after the other:

    Q_P = nearest(W_P)      E = (W_P - Q_P) U_PP^-1      W_later -= E U_P,later

Sets with large moments come first: what is coded late has nothing left to make up for it.

Symbols: W, Q [out, in]; H, U [in, in]; P 1 or 2 columns.
"""

from dataclasses import replace

import torch
from torch import Tensor

from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantLinear

DAMPING = 0.01  # share of the mean diagonal of H that is added to it, as in GPTQ
REFIT_STEPS, REFIT_RATE = 20, 0.02
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

    1. Fit the scales to the weight, by the importance of its columns.
    2. Choose codes with feedback.
    3. Fit the scales again, now to these codes and to all of H, and choose the codes again.
    """
    mean = moments.diagonal().mean()
    if mean == 0:  # nothing comes in, so no code is better than another
        layer.fit(torch.ones_like(moments.diagonal()))
        layer.effective.clear()
        return
    original = layer.weight.detach().clone()
    layer.fit(moments.diagonal() / mean)
    layer.adopt(*with_feedback(layer, moments))
    kept = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = output_error(layer, original, moments)
    if refit(layer, original, moments / mean):
        layer.weight.copy_(original)
        layer.adopt(*with_feedback(layer, moments))
        if not output_error(layer, original, moments) < before:
            layer.load_state_dict(kept)
    layer.effective.clear()


def output_error(layer: QuantLinear, weight: Tensor, moments: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) for the layer's present codes Q."""
    error = weight - layer.decode(layer.encode())
    return ((error @ moments) * error).double().sum().item()


@torch.enable_grad()
def refit(layer: QuantLinear, weight: Tensor, moments: Tensor) -> bool:
    """Minimize tr((W - Q) H (W - Q)^T) over the trained scales, for the layer's present codes. False if it has none.

    It takes a few steps of Adam, because scales enter in another way in each method.
    """
    trained = {
        n: p for n, p in layer.named_parameters(recurse=False) if p.requires_grad and n not in ("weight", "bias")
    }
    if not trained:
        return False
    index = layer.encode().index
    groups = [{"params": [p], "lr": REFIT_RATE * relative_size(n, p)} for n, p in trained.items()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, REFIT_STEPS)
    for _ in range(REFIT_STEPS):
        rounded = layer.decode(replace(layer.encode(), index=index))
        rounded.backward((rounded.detach() - weight) @ moments)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return True


def relative_size(name: str, parameter: Tensor) -> float:
    """What a relative learning rate is multiplied by: the root mean square of a parameter.

    A logarithm, whose name begins with `log_`, takes relative steps by itself.
    """
    return 1.0 if name.startswith("log_") else parameter.detach().square().mean().sqrt().item()


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
