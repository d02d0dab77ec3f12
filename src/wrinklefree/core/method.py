"""What a method is: a typed config that prepares a model, and a linear layer that quantizes itself.

A file `methods/<name>.py` with a class `Config` is the whole registration: `find("<name>")` imports it.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from wrinklefree.core import surgery
from wrinklefree.core.codes import Codes
from wrinklefree.core.effective import EffectiveWeight
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import METHODS, find_named, names
from wrinklefree.core.forms import Form
from wrinklefree.core.inputs import compute_dtype, int8_per_token
from wrinklefree.core.norm import RMSNorm
from wrinklefree.core.ste import straight_through

log = logging.getLogger("wrinklefree")


Batches = Iterable[Mapping[str, Tensor]]


class QuantLinear(nn.Linear):
    """A linear layer whose weight is seen through `decode(encode(weight))`.

    The full-precision master stays in `weight` (fp32, [out, in]), under the pretrained checkpoint's name. A method
    overrides `encode` and `decode`, and `setup` when it trains parameters of its own. A layer may own a norm of its
    inputs, `rms_norm`, which the method puts there.
    """

    rms_norm: RMSNorm | None

    def __init__(self, linear: nn.Linear, config: "QuantMethod") -> None:
        """Take over the weight and bias of `linear` (no copy beyond the cast to fp32) and its train/eval mode."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.weight.data = self.weight.data.float()
        self.bias = linear.bias
        self.config = config
        self.effective = EffectiveWeight()
        self.register_module("rms_norm", None)
        self.train(linear.training)
        self.setup()

    def setup(self) -> None:
        """Create the method's own parameters from `self.weight`."""

    def encode(self) -> Codes:
        """The codes of the current weight; differentiable in the trained scales, not in the codes."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        """The fp32 weight [out, in] that `codes` stand for; differentiable in `codes.tensors`."""
        raise TypeError("a QuantLinear must define decode()")

    @staticmethod
    def form(codes: Codes) -> Form | None:
        """The same weight in a form that native kernels know, perhaps padded with zeros; None where there is none."""
        return None

    @staticmethod
    def snap(codes: Codes) -> Codes:
        """The same codes with the nearest scales that fast kernels have tables for; by default all are."""
        return codes

    def quantized_weight(self) -> Tensor:
        """`decode(encode(weight))` with the straight-through gradient to the master: fp32 [out, in]."""
        return straight_through(self.weight, self.decode(self.encode()))

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The quantized weight in the compute dtype, computed once per change of the parameters."""
        return self.effective.get(self, self.quantized_weight, dtype)

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self.effective.clear()
        return super().train(mode)

    def inputs(self, x: Tensor) -> Tensor:
        """What is multiplied with the weight: `x`, normalized if the layer has a norm, then `rounded`."""
        return self.rounded(x if self.rms_norm is None else self.rms_norm(x))

    def rounded(self, x: Tensor) -> Tensor:
        """`x` in int8 per token if the method says so, else `x` itself."""
        return int8_per_token(x) if self.config.int8_inputs else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        return F.linear(x, self.effective_weight(compute_dtype(x)), self.bias)


@dataclass(kw_only=True)
class QuantMethod:
    """Base of every method's config: a dataclass that swaps linear layers for `layer`. Unknown keys are errors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a ConfigDict; packed folders have no pydantic

    layer: ClassVar[type[QuantLinear]]

    name: str
    exclude_names: list[str] = field(default_factory=lambda: ["embed_tokens", "lm_head"])

    @property
    def weight_bits(self) -> float | None:
        """Bits per weight by their usual name, such as 1.58; None for a method that has no such number."""
        return None

    def decode(self, codes: Codes) -> Tensor:
        """The weight of the method's codes: what packed layers ask for."""
        return self.layer.decode(codes)

    def config_for(self, fqn: str) -> Self:
        """The config of the layer `fqn`; override for mixed precision."""
        return self

    @property
    def int8_inputs(self) -> bool:
        """Whether layers round their inputs to int8 per token. Training, packed layers and exports all ask here."""
        return False

    def prepare(self, model: nn.Module, batches: Batches = (), initialize: bool = True) -> nn.Module:
        """Swap every linear layer that `exclude_names` does not match, and say what could not be converted.

        Returns `model`, changed in place; a method may return a model that took over its weights instead.
        `batches` (input_ids [B, L], perhaps position_ids) are a few to calibrate on. Without `initialize`, trained
        weights are about to be loaded, and what takes long and would be overwritten may be left out.
        Raises UserError if nothing was converted.
        """
        found = list(surgery.linears(model, self.exclude_names))
        kept = surgery.unconvertible(model, self.exclude_names)
        if kept:
            log.warning("kept in full precision, not linear layers: %s", ", ".join(kept))
        if not found and not quant_layers(model):
            raise UserError(
                f"{self.name}: no linear layer to quantize in {type(model).__name__} (exclude_names excludes all?)"
            )
        for fqn, linear in found:
            model.set_submodule(fqn, self.layer(linear, self.config_for(fqn)))
        return model

    def on_step(self, model: nn.Module, step: int) -> None:
        """Called before each optimizer step: for schedules that live inside the model."""


def num_groups(columns: int, size: int, kind: str = "columns") -> int:
    """Groups of `size` columns in a row, for methods with a setting `group_size`. Raises UserError where one is cut."""
    if columns % size:
        raise UserError(f"method.group_size={size}: does not divide {columns} {kind}")
    return columns // size


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Every quantized layer by fqn."""
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, QuantLinear)}


def rounds_inputs(model: nn.Module) -> bool:
    """Whether any quantized layer of `model` rounds its inputs to int8."""
    return any(layer.config.int8_inputs for layer in quant_layers(model).values())


def refresh(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring every effective weight up to date; a compiled forward cannot do it from inside."""
    for layer in quant_layers(model).values():
        layer.effective_weight(dtype)


def available() -> list[str]:
    """Names of all methods."""
    return names(METHODS)


def find(name: str) -> type[QuantMethod]:
    """The config class of a method: `Config` of its file. Raises UserError for an unknown name."""
    config: type[QuantMethod] = find_named(METHODS, name)
    return config
