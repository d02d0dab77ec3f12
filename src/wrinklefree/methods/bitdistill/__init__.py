"""BitDistill: ternary weights, int8 activations, SubLN. Paper: arXiv 2510.13998; BitNet b1.58: arXiv 2402.17764.

Weights W [out, in], one scale D per tensor, row or group of columns:

    D = mean |W|, at least 1e-5        C = clip(round(W / D), -1, 1)        used: D C                     (Eq. 1, 2)

so |w| < D/2 becomes 0. With `scale_mode: learned`, D is a parameter that starts at the least-squares scale.

Activations x [..., in], per token:  s = 127 / max|x|,  used: round(s x) / s                                     (Eq. 3)

SubLN: RMSNorms before `o_proj` and `down_proj`, and nowhere else                                             (Eq. 4, 5)

    Y = X + o_proj(SubLN(heads))        X' = Y + down_proj(SubLN(up(Y) * act(gate(Y))))

A norm with gain 1 changes the model, because it divides each token by its own root mean square. With `subln_init:
calibrated`, the gain of channel j makes up for that as well as it can: least squares over a few tokens t, with
x^ = x / rms(x),

    g_j = sum_t x_tj x^_tj / sum_t x^_tj^2

Warm-up: in training mode the weight is W + l (D C - W), and l rises from 0 to 1 over `weight_warmup_steps`. Activations
have an l of their own. Gradients pass both roundings unchanged; none flows through s, nor through D unless learned.

Symbols: codes uint8 [out, in], C + 1; scales [1, 1], [out, 1] or [out, in / group_size].
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import BitNetForCausalLM, PreTrainedModel

from wrinklefree.core import surgery
from wrinklefree.core.batch import model_inputs
from wrinklefree.core.codes import Codes
from wrinklefree.core.errors import UserError
from wrinklefree.core.forms import Table
from wrinklefree.core.method import Batches, QuantLinear, QuantMethod, Tensors, num_groups, quant_layers
from wrinklefree.core.norm import RMSNorm, normalized
from wrinklefree.core.ste import round_fp16, straight_through
from wrinklefree.families import bitnet
from wrinklefree.families.architectures import SUB_NORMS
from wrinklefree.methods.bitdistill.decode import decode, int8_inputs

log = logging.getLogger("wrinklefree")

SMALLEST = 1e-5  # the least scale, as in BitNet and in transformers
EPS = 1e-6  # of norms that layers own; those of a BitNet follow its config
ALS_ITERATIONS = 10


def absmean(weight: Tensor) -> Tensor:
    """The paper's scales mean |W|, at least `SMALLEST`: a weight [rows, groups, size] -> [rows, groups]."""
    return weight.abs().mean(-1).clamp_min(SMALLEST)


def ternary(weight: Tensor, scales: Tensor) -> Tensor:
    """Round a weight [rows, groups, size] to codes 0, 1, 2 (uint8), given scales [rows or 1, groups]."""
    return ((weight / scales.unsqueeze(-1)).round().clamp(-1, 1) + 1).to(torch.uint8)


class TernaryLinear(QuantLinear):
    """A linear layer with ternary weights, and with int8 inputs if its config asks for them."""

    config: "Config"
    weight_share: Tensor
    activation_share: Tensor

    def setup(self) -> None:
        for name in ("weight_share", "activation_share"):  # the two l of the warm-up; not saved, the step gives them
            self.register_buffer(name, torch.ones((), device=self.weight.device), persistent=False)
        if self.config.scale_mode == "learned":
            # A logarithm takes relative steps and keeps the scale positive.
            self.log_scales = nn.Parameter(fit(self.blocks(), self.config).log())

    def blocks(self) -> Tensor:
        """The weight as [out, groups, size]."""
        return self.weight.detach().unflatten(1, (self.config.groups(self.in_features), -1))

    def encode(self) -> Codes:
        exact = self.log_scales.exp() if self.config.scale_mode == "learned" else start(self.blocks(), self.config)
        index = ternary(self.blocks(), exact.detach()).flatten(1)  # codes from the scale before it is rounded to fp16
        return Codes(index, 2, {"scales": round_fp16(exact)}, (self.out_features, self.in_features))

    @property
    def calibrates(self) -> bool:
        return self.config.scale_mode == "learned"

    def nearest(self, weight: Tensor, tensors: Tensors) -> Tensor:
        scales = tensors["scales"].detach()
        return ternary(weight.unflatten(1, (scales.shape[1], -1)), scales).flatten(1)

    def part(self, tensors: Tensors, columns: Tensor) -> Tensors:
        group = int(columns[0]) * tensors["scales"].shape[1] // self.in_features
        return {"scales": tensors["scales"][:, group : group + 1]}

    def fit(self, importance: Tensor) -> None:
        weighted = importance.expand_as(self.weight).unflatten(1, (self.config.groups(self.in_features), -1))
        self.log_scales.data.copy_(fit(self.blocks(), self.config, weighted).log())

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        return decode(codes)

    @staticmethod
    def form(codes: Codes) -> Table:
        return Table(codes.index, torch.tensor([-1.0, 0.0, 1.0, 0.0]), codes.tensors["scales"])

    def quantized_weight(self) -> Tensor:
        quantized = self.decode(self.encode())
        if self.training and self.config.weight_warmup_steps:
            quantized = torch.lerp(self.weight.detach(), quantized, self.weight_share)
        return straight_through(self.weight, quantized)

    def rounded(self, x: Tensor) -> Tensor:
        quantized = super().rounded(x)
        if self.training and self.config.activation_warmup_steps:
            return torch.lerp(x, quantized, self.activation_share.to(x.dtype))
        return quantized

    def warm(self, weight: float, activation: float) -> None:
        """Set the shares l of the warm-up: 0 is full precision, 1 is quantized."""
        if self.weight_share.item() != weight:
            self.effective.clear()
        self.weight_share.fill_(weight)
        self.activation_share.fill_(activation)


def start(blocks: Tensor, config: "Config") -> Tensor:
    """The paper's scales of a weight [out, groups, size], as `granularity` says: [1, 1], [out, 1] or [out, groups]."""
    scales = absmean(blocks)  # per row first, so that the mean does not depend on the number of threads
    return scales if config.granularity != "tensor" else scales.mean(0, keepdim=True)


def fit(blocks: Tensor, config: "Config", importance: Tensor | None = None) -> Tensor:
    """The least-squares scales of a weight [out, groups, size], found by alternating with its codes.

    The paper's scales are the start. Shapes are [1, 1], [out, 1] or [out, groups]. `importance` weights the entries.
    """
    scales = start(blocks, config)
    for _ in range(ALS_ITERATIONS):
        codes = ternary(blocks, scales).float() - 1
        weighted = codes if importance is None else codes * importance
        moments, counts = (blocks * weighted).sum(-1), (codes * weighted).sum(-1)
        if config.granularity == "tensor":
            moments, counts = moments.sum(0, keepdim=True), counts.sum(0, keepdim=True)
        least = 1.0 if importance is None else SMALLEST
        scales = (moments / counts.clamp_min(least)).clamp_min(SMALLEST)
    return scales


def gains(model: PreTrainedModel, sites: Mapping[str, nn.Linear], batches: Batches) -> dict[str, Tensor]:
    """The least-squares gain [in] of a norm before each site, over `batches`. Without batches every gain is 1."""
    sums = {fqn: torch.zeros(2, site.in_features, dtype=torch.float64) for fqn, site in sites.items()}

    def see(fqn: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().flatten(0, -2)
        unit = normalized(x, EPS)
        sums[fqn] += torch.stack([(x * unit).sum(0), unit.square().sum(0)]).double().cpu()

    handles = [site.register_forward_pre_hook(partial(see, fqn)) for fqn, site in sites.items()]
    with torch.no_grad():
        for batch in batches:
            inputs = {name: tensor.to(model.device) for name, tensor in model_inputs(batch).items()}
            model.base_model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    fitted = {fqn: torch.where(s[1] > 0, s[0] / s[1], 1.0).float() for fqn, s in sums.items()}
    return {fqn: gain.to(sites[fqn].weight.device) for fqn, gain in fitted.items()}


@dataclass(kw_only=True)
class Config(QuantMethod):
    """Settings of BitDistill. `norm_names` are the layers whose inputs `norm_mode: subln` normalizes."""

    layer: ClassVar[type[QuantLinear]] = TernaryLinear

    name: Literal["bitdistill"] = "bitdistill"
    granularity: Literal["tensor", "row", "group"] = "tensor"
    scale_mode: Literal["absmean", "learned"] = "absmean"
    group_size: Annotated[int, Field(gt=0, lt=2**31)] = 128  # columns, for granularity group
    activation_bits: Literal[8] | None = 8  # None leaves activations in floating point
    norm_mode: Literal["subln", "per_linear", "none"] = "subln"
    norm_names: list[str] = field(default_factory=lambda: list(SUB_NORMS))
    subln_init: Literal["calibrated", "ones"] = "calibrated"
    weight_warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    activation_warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    warmup_shape: Literal["linear", "cosine"] = "linear"

    @property
    def weight_bits(self) -> float:
        return 1.58

    def groups(self, in_features: int) -> int:
        """How many scales a row has. Raises UserError if `group_size` does not divide `in_features`."""
        return num_groups(in_features, self.group_size) if self.granularity == "group" else 1

    @property
    def int8_inputs(self) -> bool:
        return int8_inputs(vars(self))

    def on_step(self, model: nn.Module, step: int) -> None:
        """Set both warm-ups for the optimizer step `step` (from 0)."""
        shares = [self._share(step, steps) for steps in (self.weight_warmup_steps, self.activation_warmup_steps)]
        for layer in quant_layers(model).values():
            assert isinstance(layer, TernaryLinear)
            layer.warm(*shares)

    def _share(self, step: int, steps: int) -> float:
        if step >= steps:
            return 1.0
        return step / steps if self.warmup_shape == "linear" else (1 - math.cos(math.pi * step / steps)) / 2

    def prepare(self, model: nn.Module, batches: Batches = (), initialize: bool = True) -> nn.Module:
        """Insert norms, fit their gains on `batches`, and make the linear layers ternary.

        A Llama with the paper's norms is returned as a new BitNet model. A model that is prepared already keeps its
        norms and gets these settings. Raises UserError if

        - there is no layer to quantize or to normalize,
        - the model is a BitNet, which has the paper's norms, and `norm_mode` is another,
        - the model was prepared with another method, `norm_mode`, `scale_mode` or `rotate_inputs`.
        """
        self.keep_rotation(model)
        if quant_layers(model):
            return self._adopt(model)
        sites = self._sites(model)
        fitted = gains(model, sites, batches if self.subln_init == "calibrated" else ())
        if self.norm_mode == "subln" and self.norm_names == list(SUB_NORMS) and bitnet.fits(model):
            model = bitnet.from_llama(model)
        if isinstance(model, BitNetForCausalLM):
            bitnet.quicken(model)
        super().prepare(model)
        for fqn, gain in fitted.items():
            _set_norm(model, fqn, gain)
        _state_natively(model, self)
        return model

    def _sites(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers whose inputs get a new norm, by fqn."""
        linears = self.sites(model)
        if isinstance(model, BitNetForCausalLM):  # it has its norms already
            if self.norm_mode != "subln":
                raise UserError(f"method.norm_mode={self.norm_mode}: a BitNet has its norms already: use subln")
            return {}
        if self.norm_mode == "per_linear":
            return linears
        sites = {fqn: m for fqn, m in linears.items() if surgery.matches(fqn, self.norm_names)}
        if self.norm_mode == "subln" and linears and not sites:
            raise UserError(
                f"method.norm_names={self.norm_names}: no such linear layer in {type(model).__name__}; name the last "
                f"projections of its attention and MLP, or choose method.norm_mode=per_linear or none"
            )
        return sites if self.norm_mode == "subln" else {}

    def _adopt(self, model: nn.Module) -> nn.Module:
        """Give these settings to the layers of a prepared model. Raises UserError if norms or scales do not match."""
        layers = quant_layers(model)
        before = norm_mode(model)
        if before != self.norm_mode:
            raise UserError(f"method.norm_mode={self.norm_mode}: this model was prepared with {before}")
        for fqn, layer in layers.items():
            if not isinstance(layer, TernaryLinear) or layer.config.scale_mode != self.scale_mode:
                raise UserError(
                    f"{fqn}: was prepared with another method or method.scale_mode; start from the original"
                )
            layer.config = self.config_for(fqn)
        return model


def norm_mode(model: nn.Module) -> str:
    """The `norm_mode` that a model was prepared with."""
    normed = [layer.rms_norm is not None for layer in quant_layers(model).values()]
    if isinstance(model, BitNetForCausalLM) or (any(normed) and not all(normed)):
        return "subln"
    return "per_linear" if all(normed) else "none"


def _set_norm(model: nn.Module, fqn: str, gain: Tensor) -> None:
    """Give the inputs of the layer `fqn` a norm with this gain: BitNet's own norm, or an `rms_norm` in the layer."""
    beside = bitnet.norm_beside(model, fqn)
    if beside is None:
        model.get_submodule(fqn).rms_norm = RMSNorm(gain, EPS)
    else:
        beside.get_parameter("weight").data.copy_(gain)


def _state_natively(model: nn.Module, config: Config) -> None:
    """Mark the model's checkpoints for plain transformers if it can quantize them. If not, log that it cannot."""
    if not isinstance(model, PreTrainedModel):
        return
    inside = any(layer.rms_norm is not None for layer in quant_layers(model).values())
    plain = config.granularity == "tensor" and config.scale_mode == "absmean" and config.int8_inputs
    plain = plain and not config.rotate_inputs
    if plain and not (inside and config.norm_mode == "subln"):
        bitnet.state_online(model, inside, EPS)
    else:
        log.info("checkpoints need wrinklefree: plain transformers would lose the norms, or not quantize the model")
