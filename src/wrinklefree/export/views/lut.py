"""Quantized layers as one table and low-rank scales, for formats that hold nothing else.

    W = lut[index] * (a @ b)        index uint8 [out, in], lut [2**bits], a [out, r], b [r, in]

The codes decide whether a layer fits, not its method. Two kinds do: codes with `lut`, `a` and `b`; and ternary codes
with one scale per matrix or row, whose table is {-1, 0, 1, 0}.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.core.codes import Codes, packed_length
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, quant_layers
from wrinklefree.export.views.dense import refuse_rotation


@dataclass(frozen=True)
class Palette:
    """A layer with the weight lut[index] * (a @ b)."""

    index: Tensor  # uint8 [out, in]
    bits: int
    lut: Tensor  # fp16 [2**bits]
    a: Tensor  # fp16 [out, r]
    b: Tensor  # fp16 [r, in]

    @property
    def rank(self) -> int:
        """The number of scale products, r."""
        return len(self.b)

    def constants(self) -> list[tuple[int, int]]:
        """Return (entries, bytes) of each stored array: packed codes, then fp16 arrays; a `b` of ones is not stored."""
        scales = [self.lut, self.a, *([self.b] if self.has_b() else [])]
        codes = self.index.numel()
        return [(codes, packed_length(codes, self.bits)), *((t.numel(), 2 * t.numel()) for t in scales)]

    def has_b(self) -> bool:
        """Whether inputs are scaled, so that `b` is not all ones."""
        return bool((self.b != 1).any())

    def weight(self) -> Tensor:
        """Return the effective weight, fp32 [out, in]."""
        return self.lut.float()[self.index.long()] * (self.a.float() @ self.b.float())


@torch.no_grad()
def palettes(model: PreTrainedModel, target: str) -> dict[str, Palette]:
    """Return every quantized layer by fqn. Raises UserError if one has another form, or if nothing is quantized."""
    layers = quant_layers(model)
    if not layers:
        raise UserError(f"--format {target}: nothing in this model is quantized; save it as it is with --format dense")
    refuse_rotation(layers, target)
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
    palette = Palette(codes.index, codes.bits, *(t.half().contiguous() for t in (lut, a, b)))
    if not torch.equal(palette.weight(), layer.decode(codes)):
        raise _no_palette(fqn, layer, target)
    return palette


def _on_cpu(codes: Codes) -> Codes:
    """Move codes to the CPU."""
    # There, both sides of the comparison add up in the same order.
    tensors = {name: t.detach().cpu() for name, t in codes.tensors.items()}
    return Codes(codes.index.cpu(), codes.bits, tensors, codes.shape)


def _one_scale_a_row(codes: Codes) -> bool:
    """Whether these look like ternary codes with one scale per row or per matrix."""
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
