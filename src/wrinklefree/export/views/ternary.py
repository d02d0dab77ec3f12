"""Quantized layers as ternary matrices, for formats that hold nothing else.

The codes decide whether a layer fits, not its method: its weight has to be {-1, 0, 1} times scales, with one scale per
matrix, per row, or per equal group of columns in a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.core.codes import Codes
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, quant_layers
from wrinklefree.export.views.dense import refuse_rotation


@dataclass(frozen=True)
class Ternary:
    """A layer with the weight scales x codes."""

    codes: Tensor  # int8 [out, in], each -1, 0 or 1
    scales: Tensor  # fp32 [1, 1], [out, 1] or [out, groups]

    def weight(self) -> Tensor:
        """Return the effective weight, fp32 [out, in]."""
        scales = self.scales.expand(len(self.codes), -1)
        return (self.codes.float().unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)


@torch.no_grad()
def ternary_layers(model: PreTrainedModel, target: str) -> dict[str, Ternary]:
    """Return every quantized layer by fqn. Raises UserError if one is not ternary, or if nothing is quantized."""
    layers = quant_layers(model)
    if not layers:
        raise UserError(f"--format {target}: nothing in this model is quantized; save it as it is with --format dense")
    refuse_rotation(layers, target)
    return {fqn: _ternary(fqn, layer, target) for fqn, layer in layers.items()}


def _ternary(fqn: str, layer: QuantLinear, target: str) -> Ternary:
    codes = layer.encode()
    if not _looks_ternary(codes):
        raise _not_ternary(fqn, layer, target)
    ternary = Ternary((codes.index.to(torch.int8) - 1), codes.tensors["scales"].float())
    if not torch.equal(ternary.weight(), layer.decode(codes)):
        raise _not_ternary(fqn, layer, target)
    return ternary


def _looks_ternary(codes: Codes) -> bool:
    scales = codes.tensors.get("scales")
    return (
        codes.tensors.keys() == {"scales"}
        and codes.index.shape == codes.shape
        and int(codes.index.max()) <= 2
        and scales is not None
        and scales.ndim == 2
        and scales.shape[0] in (1, codes.shape[0])
        and codes.shape[1] % scales.shape[1] == 0
    )


def _not_ternary(fqn: str, layer: QuantLinear, target: str) -> UserError:
    return UserError(
        f"--format {target}: {fqn} is not ternary ({layer.config.name}), and {target} holds nothing else: "
        f"use --format hf, or --format dense"
    )


def one_scale(fqn: str, layer: Ternary, target: str) -> Tensor:
    """Return the layer's only scale, fp32 []. Raises UserError if it has more than one."""
    if layer.scales.numel() != 1:
        raise UserError(
            f"--format {target}: {fqn} has {layer.scales.numel()} scales, and {target} holds one per matrix: "
            f"train with method.granularity=tensor, or use --format hf, gguf or compressed-tensors"
        )
    return layer.scales.reshape(())
