"""Quantized layers as one table and low-rank scales, for targets that know tables and products alone.

    W = lut[index] * (a @ b)        index uint8 [out, in], lut [2**bits], a [out, r], b [r, in]

Judged by the codes, not by the method: those that hold `lut`, `a` and `b`, and ternary ones with a scale per matrix or
row, whose table is {-1, 0, 1, 0}.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.core.codes import Codes, packed_length
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, quant_layers


@dataclass(frozen=True)
class Palette:
    """One layer's codes; see the head of this file. `lut`, `a` and `b` are fp16."""

    index: Tensor
    bits: int
    lut: Tensor
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """Number of scale products, r."""
        return len(self.b)

    def constants(self) -> list[tuple[int, int]]:
        """Entries and bytes of each array: codes, packed across rows, and fp16; a `b` of ones is left out."""
        scales = [self.lut, self.a, *([self.b] if self.has_b() else [])]
        codes = self.index.numel()
        return [(codes, packed_length(codes, self.bits)), *((t.numel(), 2 * t.numel()) for t in scales)]

    def has_b(self) -> bool:
        """Whether inputs are scaled at all."""
        return bool((self.b != 1).any())

    def weight(self) -> Tensor:
        """fp32 [out, in]."""
        return self.lut.float()[self.index.long()] * (self.a.float() @ self.b.float())


@torch.no_grad()
def palettes(model: PreTrainedModel, target: str) -> dict[str, Palette]:
    """Every quantized layer by fqn. Raises UserError where one is no table times scales, or nothing is quantized."""
    layers = quant_layers(model)
    if not layers:
        raise UserError(f"--format {target}: nothing in this model is quantized; save it as it is with --format dense")
    return {fqn: _palette(fqn, layer, target) for fqn, layer in layers.items()}


def _palette(fqn: str, layer: QuantLinear, target: str) -> Palette:
    codes = _on_cpu(layer.encode())
    if codes.tensors.keys() == {"lut", "a", "b"}:
        lut, a, b = (codes.tensors[name] for name in ("lut", "a", "b"))
    elif _one_scale_a_row(codes):
        lut = torch.tensor([-1.0, 0.0, 1.0, 0.0])
        a = codes.tensors["scales"].expand(codes.shape[0], 1)
        b = torch.ones(1, codes.shape[1])
    else:
        raise _no_palette(fqn, layer, target)
    found = Palette(codes.index, codes.bits, *(t.half().contiguous() for t in (lut, a, b)))
    if not torch.equal(found.weight(), layer.decode(codes)):
        raise _no_palette(fqn, layer, target)
    return found


def _on_cpu(codes: Codes) -> Codes:
    """Where sums have the same order for both sides of the comparison."""
    tensors = {name: t.detach().cpu() for name, t in codes.tensors.items()}
    return Codes(codes.index.cpu(), codes.bits, tensors, codes.shape)


def _one_scale_a_row(codes: Codes) -> bool:
    """Whether these may be ternary codes that a column of scales turns into the weight."""
    scales = codes.tensors.get("scales")
    return (
        codes.tensors.keys() == {"scales"}
        and codes.bits == 2
        and codes.index.shape == codes.shape
        and scales is not None
        and scales.shape in ((1, 1), (codes.shape[0], 1))
    )


def _no_palette(fqn: str, layer: QuantLinear, target: str) -> UserError:
    return UserError(
        f"--format {target}: {fqn} ({layer.config.name}) is not a table times low-rank scales, and {target} holds "
        f"nothing else: use --format hf, or --format dense"
    )
