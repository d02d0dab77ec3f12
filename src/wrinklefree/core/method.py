"""Base classes of every quantization method: a typed config that prepares a model, and a linear layer.

To add a method, write `methods/<name>.py` with a class `Config`. `find("<name>")` imports it; no other file lists it.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from wrinklefree.core import fused, products
from wrinklefree.core.codes import Codes
from wrinklefree.core.effective import EffectiveWeight, MasterWeight
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import METHODS, find_named, names
from wrinklefree.core.forms import Form
from wrinklefree.core.inputs import compute_dtype
from wrinklefree.core.norm import RMSNorm
from wrinklefree.core.rotation import rotated
from wrinklefree.core.ste import straight_through
from wrinklefree.core.stored import is_stored, widened
from wrinklefree.core.surgery import matches
from wrinklefree.core.turned import TurnedLinear, store_turned

log = logging.getLogger("wrinklefree")


LEAST_SHARE = 0.9  # of the blocks' weights: with less, a model is hardly a quantized one

Batches = Iterable[Mapping[str, Tensor]]
Tensors = dict[str, Tensor]  # scales and tables by name, as `Codes.tensors` holds them


class QuantLinear(nn.Linear):
    """A linear layer that multiplies with `decode(encode(weight))` instead of `weight`.

    The full-precision master stays in `weight` (fp32, [out, in]), so checkpoints keep its name. A method overrides
    `encode` and `decode`. If it trains parameters of its own, it also overrides `setup`. If it normalizes the layer's
    inputs, it assigns `rms_norm`. With `rotate_inputs`, inputs and weight are turned by `rotation.py`.
    """

    rms_norm: RMSNorm | None

    def __init__(self, linear: nn.Linear, config: "QuantMethod", fits: bool = True) -> None:
        """Take over weight, bias and train/eval mode of `linear`. The weight is cast to fp32, not copied.

        Without `fits`, trained values are loaded next, and `setup` needs to make parameters of the right shapes only.
        """
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.weight.data = self.weight.data.float()
        if isinstance(linear, TurnedLinear):
            store_turned(self)
        self.bias = linear.bias
        self.config, self.fits = config, fits
        if not is_stored(self) and not isinstance(linear, QuantLinear):
            self.turn()  # what lies in a file turns once it is in memory
        self.effective = EffectiveWeight()
        self.register_module("rms_norm", None)
        self.train(linear.training)
        self.setup()

    def turn(self) -> None:
        """Turn the weight as the inputs are, if they are."""
        if self.config.rotate_inputs:
            self.weight.data = rotated(self.weight.data)

    def setup(self) -> None:
        """Create the parameters that the method trains besides `weight`. The base class has none."""

    def encode(self) -> Codes:
        """Quantize the current weight. Gradients flow through `Codes.tensors` to trained scales, not through codes."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    @property
    def calibrates(self) -> bool:
        """Whether codes can be chosen by what the layer is given (`reconstruction/`). It needs `nearest`.

        It also needs scales that stay as they are while the weight changes.
        """
        return type(self).nearest is not QuantLinear.nearest

    @property
    def follows_weight(self) -> bool:
        """Whether the codes are those of `weight`, and not frozen."""
        return True

    def nearest(self, weight: Tensor, tensors: Tensors) -> Tensor:
        """The codes of a weight [out, columns] for given scales and tables, as `encode` chooses them."""
        raise TypeError(f"{type(self).__name__} cannot be calibrated: it does not define nearest()")

    def part(self, tensors: Tensors, columns: Tensor) -> Tensors:
        """The scales and tables of one of the `column_sets`. By default all columns share them."""
        return tensors

    def column_sets(self) -> list[Tensor]:
        """The columns of the weight that are coded together, int64. By default each column is coded by itself."""
        return list(torch.arange(self.in_features).split(1))

    def fit(self, importance: Tensor) -> None:
        """Fit scales and tables to the weight again. An error in column j counts `importance[j]` times, fp32 [in]."""

    @torch.no_grad()
    def adopt(self, weight: Tensor, rounded: Tensor) -> None:
        """Take over a calibrated master [out, in]; `rounded` is the weight that its nearest codes stand for."""
        self.weight.copy_(weight)

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        """Turn codes back into the fp32 weight [out, in]. Differentiable in `codes.tensors`."""
        raise TypeError("a QuantLinear must define decode()")

    @staticmethod
    def form(codes: Codes) -> Form | None:
        """Describe the weight to the native kernels, perhaps padded with zeros. None if no kernel fits the method."""
        return None

    @staticmethod
    def snap(codes: Codes) -> Codes:
        """Move scales to the nearest values that fast kernels support. By default every value is supported."""
        return codes

    def quantized_weight(self) -> Tensor:
        """Compute `decode(encode(weight))`, fp32 [out, in]. The gradient goes straight through to `weight`."""
        return straight_through(self.weight, self.decode(self.encode()))

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The quantized weight [out, in] in `dtype`. It is cached until a parameter changes."""
        return self.effective.get(self, self.quantized_weight, dtype)

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self.effective.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves to other devices, but keep masters and scales in fp32 if the model is cast to fewer bits."""
        own = chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        kept = {id(tensor) for name, tensor in own if name != "bias"}

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if id(tensor) in kept and narrowed else moved

        return super()._apply(apply, recurse)

    def inputs(self, x: Tensor) -> Tensor:
        """Normalize `x` if the layer has a norm, rotate it if the method says so, then round it with `rounded`.

        The weight multiplies the result.
        """
        x = x if self.rms_norm is None else self.rms_norm(x)
        return self.rounded(rotated(x) if self.config.rotate_inputs else x)

    def rounded(self, x: Tensor) -> Tensor:
        """Round `x` to int8 per token if the method asks for it, else return `x`."""
        return fused.rounded(x) if self.config.int8_inputs else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        return F.linear(x, self.effective_weight(compute_dtype(x)), self.bias)


@dataclass(kw_only=True)
class QuantMethod:
    """Base class of every method's config. `prepare` swaps linear layers for `layer`. Unknown keys are errors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a ConfigDict; packed folders have no pydantic

    layer: ClassVar[type[QuantLinear]]
    ladder: ClassVar[tuple[str, tuple[int, ...]] | None] = None  # a setting and its values, by bits; for `wf compare`

    name: str
    exclude_names: list[str] = field(default_factory=lambda: ["embed_tokens", "lm_head"])
    per_layer: list[str] = field(default_factory=list)  # mixed precision: "KEY=VALUE GLOB ...", the first that matches
    # Turn inputs and weights by signs and a Hadamard transform, against outliers. `auto` is as a quantized model was
    # trained, and for any other yes, unless a weight is shared. `prepare` puts the answer in its place.
    rotate_inputs: bool | Literal["auto"] = False
    allow_partial: bool = False  # train a model although less than 90 % of its blocks' weights can be quantized

    @property
    def weight_bits(self) -> float | None:
        """The nominal bits per weight, such as 1.58 for ternary. None if the method has no such number."""
        return None

    def decode(self, codes: Codes) -> Tensor:
        """Turn codes into the fp32 weight [out, in]. Packed layers know only the config, so they call this."""
        return self.layer.decode(codes)

    def config_for(self, fqn: str) -> Self:
        """The config for the layer `fqn`: this one, changed as `per_layer` says (mixed precision)."""
        for entry in self.per_layer:
            change, globs = per_layer_entry(entry)
            if matches(fqn, globs):
                return replace(self, **change, per_layer=[])
        return self

    @property
    def int8_inputs(self) -> bool:
        """Whether layers round their inputs to int8 per token, in training, in packed layers and in exports."""
        return False

    def prepare(self, model: nn.Module, batches: Batches = (), initialize: bool = True) -> nn.Module:
        """Swap every layer that multiplies with a weight and that `exclude_names` does not match.

        Say which weights stay as they are, and how much of the blocks' weights is quantized.

        `batches` (input_ids [B, L], perhaps position_ids) is a small set to calibrate on. `initialize=False` means that
        trained weights are loaded next, so a method may skip slow fits that would be overwritten.
        Returns `model`, changed in place. A method may instead return a new model that took over the weights.
        Raises UserError if there is no linear layer to quantize, or if layers cannot be rotated as the method says.
        """
        self.keep_rotation(model)
        sites = self.sites(model)
        known = [*sites, *quant_layers(model)]
        if not known:
            raise UserError(
                f"{self.name}: no linear layer to quantize in {type(model).__name__} (exclude_names excludes all?)"
            )
        for entry in self.per_layer:
            if not any(matches(fqn, per_layer_entry(entry)[1]) for fqn in known):
                raise UserError(f"method.per_layer: {entry[:80]!r} matches no layer, such as {known[0]}")
        shared = _shared(model, sites) if self.rotate_inputs else ""
        if self.rotate_inputs == "auto":
            self.rotate_inputs = not shared
        elif shared:
            raise UserError(f"method.rotate_inputs: {shared}: exclude_names")
        for fqn, linear in sites.items():
            with widened(linear.weight):
                layer = self.layer(linear, self.config_for(fqn), initialize)
            # Of layers whose weights stay in a file, the effective weights would be the whole model in memory.
            layer.effective.cached = not is_stored(linear)
            model.set_submodule(fqn, layer)
        left = products.uncovered(model, self.exclude_names, quant_layers(model).values())
        if left and sites:
            log.warning("%s; in full precision: %s", coverage(model).words, products.short(left))
        return model

    def sites(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers to quantize by fqn. Layers of other classes that multiply alike become linear ones, in place."""
        return products.open_products(model, self.exclude_names)

    def keep_rotation(self, model: nn.Module) -> None:
        """Let `rotate_inputs: auto` be what a quantized model was trained with.

        Raises UserError if `model` is quantized already, and its weights are turned otherwise than this method's.
        """
        trained = {layer.config.rotate_inputs for layer in quant_layers(model).values()}
        if self.rotate_inputs == "auto" and trained:
            self.rotate_inputs = trained.pop()
        if trained - {self.rotate_inputs}:
            setting = str(self.rotate_inputs).lower()
            raise UserError(f"method.rotate_inputs={setting}: a quantized model keeps what it was trained with")

    def check_coverage(self, model: nn.Module) -> None:
        """Raises UserError if too little of a prepared model is quantized, unless `allow_partial` is set.

        What `exclude_names` names does not count: somebody has chosen that.
        """
        found = coverage(model)
        left = products.uncovered(model, self.exclude_names, quant_layers(model).values())
        if self.allow_partial or found.quantized >= LEAST_SHARE * (found.quantized + sum(left.values())):
            return
        raise UserError(
            f"{type(model).__name__}: {found.words} (in full precision: {products.short(left)}): the file would stay "
            f"large; method.allow_partial=true trains it all the same"
        )

    def on_step(self, model: nn.Module, step: int) -> None:
        """Update schedules that live inside the model. Training calls it before optimizer step `step` (from 0)."""


def per_layer_entry(entry: str) -> tuple[dict[str, Any], list[str]]:
    """The change of settings and the globs of layers in an entry of `per_layer`, such as `num_stages=1 layers.0`.

    Raises ValueError if the entry has another form. The setting itself is not checked.
    """
    change, *globs = entry.split() or [""]
    key, equals, text = change.partition("=")
    if not equals or not globs:
        raise ValueError(f"{entry!r} is not KEY=VALUE and names of layers")
    return {key: int(text) if text.isdigit() else text}, globs


def _shared(model: nn.Module, sites: Mapping[str, nn.Linear]) -> str:
    """Say which of the layers shares its weight with others; "" if none does. It would turn for all that have it."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    found = ((fqn, owners[id(linear.weight)]) for fqn, linear in sites.items())
    return next((f"{fqn} shares its weight ({', '.join(names)})" for fqn, names in found if len(names) > 1), "")


@dataclass(frozen=True)
class Coverage:
    """How many weights of a model's blocks are quantized, of how many."""

    quantized: int
    weights: int

    @property
    def share(self) -> float:
        return self.quantized / max(1, self.weights)

    @property
    def words(self) -> str:
        return f"{100 * self.share:.3g} % of the blocks' weights are quantized"


def coverage(model: nn.Module) -> Coverage:
    """How much of a prepared model's blocks is quantized. Embeddings and the output head do not count."""
    layers = quant_layers(model).values()
    quantized = {id(layer.weight): layer.weight.numel() for layer in layers}
    left = products.uncovered(model, (), layers)
    return Coverage(sum(quantized.values()), sum(quantized.values()) + sum(left.values()))


def num_groups(columns: int, size: int, kind: str = "columns") -> int:
    """How many groups of `size` columns a row has, for methods with a setting `group_size`.

    Raises UserError if `size` does not divide `columns`. `kind` names the columns in that message.
    """
    if columns % size:
        raise UserError(f"method.group_size={size}: does not divide {columns} {kind}")
    return columns // size


@contextmanager
def masters(layers: Iterable[QuantLinear]) -> Iterator[None]:
    """Multiply with the layers' masters, not with their quantized weights, while the block runs."""
    layers = list(layers)
    kept = [layer.effective for layer in layers]
    for layer in layers:
        layer.effective = MasterWeight()
    try:
        yield
    finally:
        for layer, effective in zip(layers, kept, strict=True):
            layer.effective = effective


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """All quantized layers of `model` by fqn."""
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, QuantLinear)}


def keeps_effective(model: nn.Module) -> bool:
    """Whether there is memory for the effective weights of all layers at once."""
    return all(layer.effective.cached for layer in quant_layers(model).values())


def keep_effective(block: nn.Module, kept: bool) -> None:
    """Say whether the effective weights of the layers in `block` are kept between forward passes."""
    for layer in quant_layers(block).values():
        layer.effective.clear()
        layer.effective.cached = kept


def rounds_inputs(model: nn.Module) -> bool:
    """Whether any quantized layer of `model` rounds its inputs to int8."""
    return any(layer.config.int8_inputs for layer in quant_layers(model).values())


def refresh(model: nn.Module, dtype: torch.dtype) -> None:
    """Recompute every effective weight that is out of date. A compiled forward pass cannot do it from inside."""
    for layer in quant_layers(model).values():
        layer.effective_weight(dtype)


def available() -> list[str]:
    """The names of all methods, the user's own included."""
    return names(METHODS)


def find(name: str) -> type[QuantMethod]:
    """The class `Config` in the file of the method `name`. Raises UserError if there is no such method."""
    config: type[QuantMethod] = find_named(METHODS, name)
    return config
