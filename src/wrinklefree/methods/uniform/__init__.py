"""Uniform integers: b bits per weight, one scale per row or group of columns. Paper: arXiv 1712.05877.

    W ~ s (q - 2^(b-1))        q = clip(round(W / s), -m, m) + 2^(b-1)        m = 2^(b-1) - 1

`scale_mode` chooses the scale of a group:

- `absmax`: s = max|W| / m.
- `search`: try s = max|W| / m times each of `SHRINKS`, and take the one with the least squared error.

Packed folders store embeddings and heads in this format, and GGUF files are read into it; those have another code for 0
than 2^(b-1), in a tensor `zero` [1]. It is also the round-to-nearest baseline for other methods.

Symbols: codes uint8 [out, in], q above; scales fp16 [out, G], G = 1 (`granularity: row`) or in / group_size.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from wrinklefree.core.codes import Codes
from wrinklefree.core.forms import Form, Integers, Table
from wrinklefree.core.method import QuantLinear, QuantMethod, Tensors, num_groups
from wrinklefree.core.ste import round_fp16
from wrinklefree.methods.uniform.decode import decode, int8_inputs

SHRINKS = [1 - step / 32 for step in range(14)]  # below 1 the outlier is clipped, which at 4 bits often costs less
SMALLEST = 2.0**-24  # the smallest positive fp16 number


def codes_of(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Round a weight [out, G, size] to integers from -m to m, given scales [out, G]. Returned as fp32."""
    most = 2 ** (bits - 1) - 1
    return (blocks / scales.unsqueeze(-1)).round().clamp(-most, most)


def fit(blocks: Tensor, config: "Config") -> Tensor:
    """Choose the scales [out, G] of a weight [out, G, size]. They are exactly fp16 numbers."""
    most = 2 ** (config.bits - 1) - 1
    widest = blocks.abs().amax(-1) / most
    scales = round_fp16(widest).clamp_min(SMALLEST)
    if config.scale_mode == "absmax":
        return scales
    least = torch.full_like(scales, torch.inf)
    best = scales
    for shrink in SHRINKS:
        scales = round_fp16(widest * shrink).clamp_min(SMALLEST)
        error = (codes_of(blocks, scales, config.bits) * scales.unsqueeze(-1) - blocks).square().sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


class UniformLinear(QuantLinear):
    """A linear layer whose weights are rounded to 2**bits evenly spaced values."""

    config: "Config"

    def encode(self) -> Codes:
        weight = self.weight.detach()
        blocks = weight.unflatten(1, (self.config.groups(weight.shape[1]), -1))
        scales = fit(blocks, self.config)
        index = codes_of(blocks, scales, self.config.bits) + 2 ** (self.config.bits - 1)
        shape = (weight.shape[0], weight.shape[1])
        return Codes(index.flatten(1).to(torch.uint8), self.config.bits, {"scales": scales}, shape)

    @property
    def calibrates(self) -> bool:
        # Scales are computed from the weight. With few values, a rounded weight gives the scales it was rounded by.
        return self.config.bits <= 3

    def nearest(self, weight: Tensor, tensors: Tensors) -> Tensor:
        scales = tensors["scales"]
        blocks = weight.unflatten(1, (scales.shape[1], -1))
        index = codes_of(blocks, scales, self.config.bits) + 2 ** (self.config.bits - 1)
        return index.flatten(1).to(torch.uint8)

    def part(self, tensors: Tensors, columns: Tensor) -> Tensors:
        group = int(columns[0]) * tensors["scales"].shape[1] // self.in_features
        return {"scales": tensors["scales"][:, group : group + 1]}

    @torch.no_grad()
    def adopt(self, weight: Tensor, rounded: Tensor) -> None:
        self.weight.copy_(rounded)  # which keeps its scales: see `calibrates`

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        return decode(codes)

    @staticmethod
    def form(codes: Codes) -> Form | None:
        scales = codes.tensors["scales"]
        if codes.bits <= 4:
            zero = codes.tensors.get("zero", torch.tensor(2.0 ** (codes.bits - 1)))
            return Table(codes.index, torch.arange(2**codes.bits) - zero.cpu().float(), scales)
        if scales.shape[1] > 1 or "zero" in codes.tensors:
            return None
        return Integers((codes.index.int() - 2 ** (codes.bits - 1)).to(torch.int8), scales.flatten())


@dataclass(kw_only=True)
class Config(QuantMethod):
    """Settings of uniform integers with `bits` bits."""

    layer: ClassVar[type[QuantLinear]] = UniformLinear
    ladder: ClassVar[tuple[str, tuple[int, ...]] | None] = ("bits", (2, 3, 4, 8))

    name: Literal["uniform"] = "uniform"
    bits: Literal[2, 3, 4, 8] = 4
    granularity: Literal["row", "group"] = "row"
    group_size: Annotated[int, Field(gt=0, lt=2**31)] = 32  # columns, for granularity group
    scale_mode: Literal["absmax", "search"] = "search"
    activation_bits: Literal[8] | None = None  # None leaves activations in floating point

    @property
    def weight_bits(self) -> float:
        return float(self.bits)

    def groups(self, in_features: int) -> int:
        """How many scales a row has. Raises UserError if `group_size` does not divide `in_features`."""
        return num_groups(in_features, self.group_size) if self.granularity == "group" else 1

    @property
    def int8_inputs(self) -> bool:
        return int8_inputs(vars(self))
