"""BitDistill: ternary weights, int8 activations, SubLN. Paper: arXiv 2510.13998; BitNet b1.58: arXiv 2402.17764.

Weights W [out, in], one scale D per tensor, row or group of columns:

    D = mean |W|, at least 1e-5        C = clip(round(W / D), -1, 1)        used: D C                     (Eq. 1, 2)

so |w| < D/2 becomes 0. D is kept as an fp16 number; the codes come from D before that rounding. With `scale_mode:
learned` D is a parameter that starts at the least-squares scale and is trained as a logarithm.

Activations x [..., in], per token:  s = 127 / max|x|,  used: round(s x) / s                                     (Eq. 3)

SubLN: one RMSNorm over the input of `o_proj` and one over that of `down_proj`, none elsewhere                (Eq. 4, 5)

    Y = X + o_proj(SubLN(heads))        X' = Y + down_proj(SubLN(up(Y) * act(gate(Y))))

A norm with gain 1 changes the model: it takes away each token's own root mean square. What a gain can give back is the
least-squares fit over a few tokens t, x^ = x / rms(x), per channel j (`subln_init: calibrated`):

    g_j = sum_t x_tj x^_tj / sum_t x^_tj^2

transformers has two homes for such norms, and these are their names here: a Llama becomes a `BitNetForCausalLM`
(`attn_sub_norm`, `ffn_sub_norm`); elsewhere, and for `norm_mode: per_linear`, the layer owns an `rms_norm`.

Warm-up: in training mode the weight is W + l (D C - W), l rising from 0 to 1 over `weight_warmup_steps`; activations
likewise, with an l of their own. Gradients: identity through both roundings, none through D (unless learned) and s.

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
from wrinklefree.core.codes import Codes
from wrinklefree.core.errors import UserError
from wrinklefree.core.forms import Table
from wrinklefree.core.method import Batches, QuantLinear, QuantMethod, num_groups, quant_layers
from wrinklefree.core.norm import RMSNorm, normalized
from wrinklefree.core.ste import round_fp16, straight_through
from wrinklefree.families import bitnet
from wrinklefree.methods.bitdistill.decode import decode, int8_inputs

log = logging.getLogger("wrinklefree")

SMALLEST = 1e-5  # of a scale, as everywhere in this family
EPS = 1e-6  # of the norms inside of layers; a BitNet's own follow its config
ALS_ITERATIONS = 10


def absmean(weight: Tensor) -> Tensor:
    """Scales [rows, groups] of a weight [rows, groups, size]; rows first, so that no number of threads changes it."""
    return weight.abs().mean(-1).clamp_min(SMALLEST)


def ternary(weight: Tensor, scales: Tensor) -> Tensor:
    """Codes {0, 1, 2} of a weight [rows, groups, size] under scales [rows or 1, groups]: uint8, the same shape."""
    return ((weight / scales.unsqueeze(-1)).round().clamp(-1, 1) + 1).to(torch.uint8)


class TernaryLinear(QuantLinear):
    """`nn.Linear` with ternary weights and, where its config says so, int8 inputs."""

    config: "Config"
    weight_share: Tensor
    activation_share: Tensor

    def setup(self) -> None:
        for name in ("weight_share", "activation_share"):  # the l of the warm-up; not stored: a function of the step
            self.register_buffer(name, torch.ones((), device=self.weight.device), persistent=False)
        if self.config.scale_mode == "learned":
            self.log_scales = nn.Parameter(fit(self.blocks(), self.config).log())

    def blocks(self) -> Tensor:
        """The weight as [out, groups, size]."""
        return self.weight.detach().unflatten(1, (self.config.groups(self.in_features), -1))

    def encode(self) -> Codes:
        exact = self.log_scales.exp() if self.config.scale_mode == "learned" else start(self.blocks(), self.config)
        index = ternary(self.blocks(), exact.detach()).flatten(1)
        return Codes(index, 2, {"scales": round_fp16(exact)}, (self.out_features, self.in_features))

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
        """Set both l of the warm-up."""
        if self.weight_share.item() != weight:
            self.effective.clear()
        self.weight_share.fill_(weight)
        self.activation_share.fill_(activation)


def start(blocks: Tensor, config: "Config") -> Tensor:
    """The scales of a weight [out, groups, size] by the paper's rule: [1, 1], [out, 1] or [out, groups]."""
    scales = absmean(blocks)
    return scales if config.granularity != "tensor" else scales.mean(0, keepdim=True)


def fit(blocks: Tensor, config: "Config") -> Tensor:
    """The scales nearest to a weight in least squares, by alternation with its codes, from the paper's on."""
    scales = start(blocks, config)
    for _ in range(ALS_ITERATIONS):
        codes = ternary(blocks, scales).float() - 1
        moments, counts = (blocks * codes).sum(-1), codes.abs().sum(-1)
        if config.granularity == "tensor":
            moments, counts = moments.sum(0, keepdim=True), counts.sum(0, keepdim=True)
        scales = (moments / counts.clamp_min(1)).clamp_min(SMALLEST)
    return scales


def gains(model: PreTrainedModel, sites: Mapping[str, nn.Linear], batches: Batches) -> dict[str, Tensor]:
    """The least-squares gain [in] of a norm at the input of each site; ones without batches."""
    sums = {fqn: torch.zeros(2, site.in_features, dtype=torch.float64) for fqn, site in sites.items()}

    def see(fqn: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().flatten(0, -2)
        unit = normalized(x, EPS)
        sums[fqn] += torch.stack([(x * unit).sum(0), unit.square().sum(0)]).double().cpu()

    handles = [site.register_forward_pre_hook(partial(see, fqn)) for fqn, site in sites.items()]
    with torch.no_grad():
        for batch in batches:
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
            model.base_model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    fitted = {fqn: torch.where(s[1] > 0, s[0] / s[1], 1.0).float() for fqn, s in sums.items()}
    return {fqn: gain.to(sites[fqn].weight.device) for fqn, gain in fitted.items()}


@dataclass(kw_only=True)
class Config(QuantMethod):
    """BitDistill. `norm_names` are the layers whose inputs `norm_mode: subln` normalizes."""

    layer: ClassVar[type[QuantLinear]] = TernaryLinear

    name: Literal["bitdistill"] = "bitdistill"
    granularity: Literal["tensor", "row", "group"] = "tensor"
    scale_mode: Literal["absmean", "learned"] = "absmean"
    group_size: Annotated[int, Field(gt=0)] = 128  # columns, for granularity group
    activation_bits: Literal[8] | None = 8  # None leaves activations in floating point
    norm_mode: Literal["subln", "per_linear", "none"] = "subln"
    norm_names: list[str] = field(default_factory=lambda: list(bitnet.NORMS))
    subln_init: Literal["calibrated", "ones"] = "calibrated"
    weight_warmup_steps: Annotated[int, Field(ge=0)] = 0
    activation_warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_shape: Literal["linear", "cosine"] = "linear"

    @property
    def weight_bits(self) -> float:
        return 1.58

    def groups(self, in_features: int) -> int:
        """Scales in a row. Raises UserError where groups do not fill the rows."""
        return num_groups(in_features, self.group_size) if self.granularity == "group" else 1

    @property
    def int8_inputs(self) -> bool:
        return int8_inputs(vars(self))

    def on_step(self, model: nn.Module, step: int) -> None:
        """Set both warm-ups for optimizer step `step` (from 0)."""
        shares = [self._share(step, steps) for steps in (self.weight_warmup_steps, self.activation_warmup_steps)]
        for layer in quant_layers(model).values():
            assert isinstance(layer, TernaryLinear)
            layer.warm(*shares)

    def _share(self, step: int, steps: int) -> float:
        if step >= steps:
            return 1.0
        return step / steps if self.warmup_shape == "linear" else (1 - math.cos(math.pi * step / steps)) / 2

    def prepare(self, model: nn.Module, batches: Batches = (), initialize: bool = True) -> nn.Module:
        """Insert the norms, fitted on `batches`, and make the linear layers ternary; a Llama comes back as a BitNet.

        A model that is prepared already keeps its norms and gets these settings. Raises UserError where there is
        nothing to quantize or to normalize, and where a prepared model has other norms.
        """
        if quant_layers(model):
            return self._adopt(model)
        sites = self._sites(model)
        fitted = gains(model, sites, batches if self.subln_init == "calibrated" else ())
        if self.norm_mode == "subln" and self.norm_names == list(bitnet.NORMS) and bitnet.fits(model):
            model = bitnet.from_llama(model)
        if isinstance(model, BitNetForCausalLM):
            bitnet.quicken(model)
        super().prepare(model)
        for fqn, gain in fitted.items():
            _set_norm(model, fqn, gain)
        _state_natively(model, self)
        return model

    def _sites(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers whose inputs get a norm, by fqn."""
        linears = dict(surgery.linears(model, self.exclude_names))
        if isinstance(model, BitNetForCausalLM):  # has them
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
        """Give a prepared model's layers these settings."""
        layers = quant_layers(model)
        found = norm_mode(model)
        if found != self.norm_mode:
            raise UserError(f"method.norm_mode={self.norm_mode}: this model was prepared with {found}")
        for fqn, layer in layers.items():
            if not isinstance(layer, TernaryLinear) or layer.config.scale_mode != self.scale_mode:
                raise UserError(
                    f"{fqn}: was prepared with another method or method.scale_mode; start from the original"
                )
            layer.config = self.config_for(fqn)
        return model


def norm_mode(model: nn.Module) -> str:
    """The `norm_mode` that a prepared model has."""
    normed = [layer.rms_norm is not None for layer in quant_layers(model).values()]
    if isinstance(model, BitNetForCausalLM) or (any(normed) and not all(normed)):
        return "subln"
    return "per_linear" if all(normed) else "none"


def _set_norm(model: nn.Module, fqn: str, gain: Tensor) -> None:
    """Give the norm of the layer `fqn` its gain: the BitNet's own norm, or a new one inside of the layer."""
    beside = bitnet.norm_beside(model, fqn)
    if beside is None:
        quant_layers(model)[fqn].rms_norm = RMSNorm(gain, EPS)
    else:
        beside.get_parameter("weight").data.copy_(gain)


def _state_natively(model: nn.Module, config: Config) -> None:
    """Let checkpoints say what transformers can do with them by itself, or say that it cannot."""
    if not isinstance(model, PreTrainedModel):
        return
    inside = any(layer.rms_norm is not None for layer in quant_layers(model).values())
    plain = config.granularity == "tensor" and config.scale_mode == "absmean" and config.int8_inputs
    if plain and not (inside and config.norm_mode == "subln"):
        bitnet.state_online(model, inside, EPS)
    else:
        log.info("checkpoints of this model need wrinklefree: transformers alone would not quantize, or lose its norms")
