"""Optimizers: AdamW for everything, or Muon (orthogonalized momentum) for matrices and AdamW for the rest.

| group | learning rate | weight decay |
|---|---|---|
| matrices of linear layers | `lr`, or `muon_lr` with Muon | `weight_decay` |
| vectors and embeddings | `lr` | none |
| trained quantization scales | `scale_lr` | none |
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wrinklefree.core.method import quant_layers

Group = dict[str, Any]


def scale_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of quantized layers other than weight and bias."""
    return {
        parameter
        for layer in quant_layers(model).values()
        for name, parameter in layer.named_parameters(recurse=False)
        if name not in ("weight", "bias")
    }


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained parameters as (matrices of linear layers, all others, quantization scales), in model order."""
    scales = scale_parameters(model)
    embedded = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - embedded
    trained = [p for p in model.parameters() if p.requires_grad]
    return (
        [p for p in trained if p in hidden],
        [p for p in trained if p not in hidden and p not in scales],
        [p for p in trained if p in scales],
    )


def build(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    muon_lr: float,
    scale_lr: float,
) -> list[Optimizer]:
    """Return the model's optimizers: AdamW, or Muon and AdamW. `name` is `adamw` or `muon`."""
    matrices, others, scales = split(model)
    rest = [_group(others, lr, 0.0), _group(scales, scale_lr, 0.0)]
    if name == "adamw":
        return [_adamw([_group(matrices, lr, weight_decay), *rest], betas)]
    muon = torch.optim.Muon([_group(matrices, muon_lr, weight_decay)], lr=muon_lr, momentum=0.95)
    return [muon, _adamw(rest, betas)]


def _group(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Group:
    # `set_rate` scales `lr` from `peak_lr`, so that one schedule serves all groups.
    return {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}


def _adamw(groups: Iterable[Group], betas: tuple[float, float]) -> Optimizer:
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas)


def set_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
