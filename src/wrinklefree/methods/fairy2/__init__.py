"""Fairy2i: complex weights in {+1, -1, +i, -i}, refined by residual stages. Paper: arXiv 2512.02901.

A real matrix R = [[A, B], [C, D]] of shape [2n, 2m] acts on x + i y (x, y the halves of its input) as U z + W conj(z):

    U = ((A + D) + i (C - B)) / 2        W = ((A - D) + i (C + B)) / 2             both complex [n, m]
    A = Re U + Re W    B = Im W - Im U   C = Im U + Im W    D = Re U - Re W        and back, without loss

Each entry z of U and W becomes a sum of T terms. A term is one of the four units, scaled per axis:

    q = r_j c_k sum_t  s_re,t Re(i^k_t) + i s_im,t Im(i^k_t)          2 bits a term, so T bits per real weight

There is one set of scales s per tensor, row or group of columns. `scale_granularity: rank1` has the tensor's scales,
and factors r_j, c_k for each complex row and column.

| `scale_mode` | codes of an entry | scales |
|---|---|---|
| `mean` (paper) | stage by stage, the unit nearest in phase to what is left over | mean modulus along the axis |
| `als` | all T together, the nearest of the 4^T points | least squares, alternating with the codes; fixed in training |
| `learned` | as for `als` | as for `als`, then trained |

Symbols: T stages, p in {U, W}, axis in {re, im}. Z [2 (p), 2 (axis), n, m]; codes uint8 [2 (p), T, n, m], entry k
stands for i^k; scales [2 (p), T, 2 (axis), R, G], R 1 or n, G 1 or m / group_size; rows [n], columns [m].
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wrinklefree.core import fused
from wrinklefree.core.codes import Codes
from wrinklefree.core.forms import Complex
from wrinklefree.core.fused import ComplexScales
from wrinklefree.core.method import Batches, QuantLinear, QuantMethod, Tensors, num_groups, quant_layers
from wrinklefree.core.ste import round_fp16
from wrinklefree.methods.fairy2.decode import dequantized, finished, int8_inputs, outer, to_real, units
from wrinklefree.methods.fairy2.entrywise import entries
from wrinklefree.methods.fairy2.fitting import (
    blocks,
    fit,
    nearest_codes,
    padded,
    residual_codes,
    to_widely_linear,
    unfitted,
)
from wrinklefree.methods.fairy2.grid import snapped

log = logging.getLogger("wrinklefree")


class Dequantize(torch.autograd.Function):
    """Compute Z [2, 2, n, m] from codes and scales. The backward pass computes the units again, to save memory."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(index, scales)
        return dequantized(index, scales)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        index, scales = ctx.saved_tensors
        grads = [
            [(blocks(unit * grad[:, axis], scales)).sum(dim=(-3, -1)) for axis, unit in enumerate(units(index[:, t]))]
            for t in range(index.shape[1])
        ]
        return None, torch.stack([torch.stack(pair, dim=1) for pair in grads], dim=1)


class Fairy2Linear(QuantLinear):
    """A linear layer with Fairy2i weights.

    With `scale_mode: mean` scales are computed from the weight. In the other modes they are parameters, `log_scales`,
    and for rank1 also `log_rows` and `log_columns`.
    """

    config: "Config"

    def setup(self) -> None:
        if self.config.scale_mode == "mean":
            return
        trained, made = self.config.scale_mode == "learned", self._fitted() if self.fits else self._unfitted()
        for name, tensor in made.items():
            # A logarithm takes relative steps, whatever the size of the weights, and keeps a scale positive.
            self.register_parameter(f"log_{name}", nn.Parameter(tensor.log(), requires_grad=trained))

    def _fitted(self, importance: Tensor | None = None) -> Tensors:
        weight, rank1 = padded(self.weight.detach()), self.config.scale_granularity == "rank1"
        return fit(weight, self.config.num_stages, self._grid(), rank1, importance)

    def _unfitted(self) -> Tensors:
        weight, rank1 = padded(self.weight.detach()), self.config.scale_granularity == "rank1"
        return unfitted(weight, self.config.num_stages, self._grid(), rank1)

    def _grid(self) -> tuple[int, int]:
        return self.config.grid((self.out_features + 1) // 2, (self.in_features + 1) // 2)

    def encode(self) -> Codes:
        weight, shape = self.weight.detach(), (self.out_features, self.in_features)
        if self.config.scale_mode == "mean":
            index, scales = residual_codes(to_widely_linear(padded(weight)), self.config.num_stages)
            return Codes(index, 2, {"scales": scales}, shape)
        logs = {name: p for name, p in self.named_parameters(recurse=False) if name.startswith("log_")}
        tensors = {name.removeprefix("log_"): round_fp16(p.exp()) for name, p in logs.items()}
        return Codes(self.nearest(weight, tensors), 2, tensors, shape)

    @property
    def calibrates(self) -> bool:
        return self.config.scale_mode != "mean"

    def nearest(self, weight: Tensor, tensors: Tensors) -> Tensor:
        weight = padded(weight)
        if fused.serves(weight):
            return fused.complex_codes(weight, scales_of(tensors))
        if "rows" in tensors:
            weight = weight / outer(tensors["rows"], tensors["columns"]).detach()
        return nearest_codes(to_widely_linear(weight), tensors["scales"].detach())

    def part(self, tensors: Tensors, columns: Tensor) -> Tensors:
        column, scales = int(columns[0]), tensors["scales"]
        group = column * scales.shape[-1] // ((self.in_features + 1) // 2)
        parts = tensors | {"scales": scales[..., group : group + 1]}
        return parts | ({"columns": tensors["columns"][column : column + 1]} if "columns" in tensors else {})

    def column_sets(self) -> list[Tensor]:
        half = (self.in_features + 1) // 2
        pairs = [torch.tensor([column, column + half]) for column in range(half)]
        return [pair[pair < self.in_features] for pair in pairs]

    def fit(self, importance: Tensor) -> None:
        for name, tensor in self._fitted(importance).items():
            self.get_parameter(f"log_{name}").data.copy_(tensor.log())

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        scales = codes.tensors["scales"].float()
        if torch.compiler.is_compiling():
            return finished(codes, entries(codes.index, scales))
        if fused.serves(codes.index):
            weight = fused.complex_weight(codes.index, scales_of(codes.tensors))
            return weight[: codes.shape[0], : codes.shape[1]]
        scales_of(codes.tensors).check(codes.index.shape)  # torch would stretch some that the library refuses
        return finished(codes, to_real(Dequantize.apply(codes.index, scales)))

    @staticmethod
    def snap(codes: Codes) -> Codes:
        return replace(codes, tensors=codes.tensors | {"scales": snapped(codes.tensors["scales"])})

    @staticmethod
    def form(codes: Codes) -> Complex:
        factors = [codes.tensors[name].repeat(2) if name in codes.tensors else None for name in ("rows", "columns")]
        return Complex(codes.index, codes.tensors["scales"], *factors)


def scales_of(tensors: Mapping[str, Tensor]) -> ComplexScales:
    """The scales and factors of codes, as the native loops take them."""
    return ComplexScales(tensors["scales"], tensors.get("rows"), tensors.get("columns"))


@dataclass(kw_only=True)
class Config(QuantMethod):
    """Settings of Fairy2i. `preset: paper` sets `scale_granularity: tensor`, `scale_mode: mean`, and no rotation."""

    layer: ClassVar[type[QuantLinear]] = Fairy2Linear
    ladder: ClassVar[tuple[str, tuple[int, ...]] | None] = ("num_stages", (1, 2, 3))

    name: Literal["fairy2"] = "fairy2"
    num_stages: Annotated[int, Field(ge=1, le=4)] = 2
    scale_granularity: Literal["tensor", "row", "group", "rank1"] = "rank1"
    scale_mode: Literal["mean", "als", "learned"] = "learned"
    group_size: Annotated[int, Field(gt=0, lt=2**31)] = 64  # complex columns, for scale_granularity group
    activation_bits: Literal[8] | None = None  # None leaves activations in floating point
    preset: Literal["paper"] | None = None

    def __post_init__(self) -> None:
        if self.preset == "paper":
            self.scale_granularity, self.scale_mode, self.rotate_inputs = "tensor", "mean", False
        if self.scale_mode == "mean" and self.scale_granularity != "tensor":
            raise ValueError("scale_mode=mean, the paper's, allows scale_granularity=tensor only")

    @property
    def weight_bits(self) -> float:
        return float(self.num_stages)

    def grid(self, n: int, m: int) -> tuple[int, int]:
        """(R, G), the rows and groups that have scales of their own in an n x m complex matrix.

        Raises UserError if `group_size` does not divide m.
        """
        rows = n if self.scale_granularity in ("row", "group") else 1
        grouped = self.scale_granularity == "group"
        return rows, num_groups(m, self.group_size, "complex columns") if grouped else 1

    @property
    def int8_inputs(self) -> bool:
        return int8_inputs(vars(self))

    def prepare(self, model: nn.Module, batches: Batches = (), initialize: bool = True) -> nn.Module:
        """Swap the linear layers for Fairy2i ones. Odd widths are padded with zeros inside, and the log names them."""
        model = super().prepare(model, initialize=initialize)
        odd = [fqn for fqn, layer in quant_layers(model).items() if layer.in_features % 2 or layer.out_features % 2]
        if odd:
            log.info("odd width, padded inside: %s", ", ".join(odd))
        return model
