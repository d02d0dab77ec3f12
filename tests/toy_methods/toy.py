"""A small ternary method with everything a method may have: trained scales, a table, odd widths, activations."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wrinklefree.core import ste
from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantLinear, QuantMethod


class ToyLinear(QuantLinear):
    def setup(self) -> None:
        self.scales = nn.Parameter(ste.round_fp16(self.weight.detach().abs().mean(1, keepdim=True)))

    def encode(self) -> Codes:
        scales = ste.round_fp16(self.scales)
        index = (self.weight.detach() / scales.detach().clamp_min(1e-6)).round().clamp(-1, 1) + 1
        table = torch.tensor([-1.0, 0.0, 1.0, 0.0])
        return Codes(index.to(torch.uint8), 2, {"scales": scales, "table": table}, tuple(self.weight.shape))

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        return codes.tensors["table"][codes.index.int()] * codes.tensors["scales"]


@dataclass(kw_only=True)
class Config(QuantMethod):
    layer: ClassVar[type[QuantLinear]] = ToyLinear

    name: Literal["toy"] = "toy"
    int8: bool = False
    levels: Annotated[int, Field(ge=1, le=1)] = 1

    @property
    def int8_inputs(self) -> bool:
        return self.int8
