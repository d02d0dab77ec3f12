"""ANEMLL lookup tables: 2 to 4 bits per weight with low-rank scales, for the Apple Neural Engine (ANEMLL-QUANT-1).

    W ~ lut[codes] * S        S = A B        lut [2**bits], symmetric, largest entry 1; A [out, r], B [r, in]

The setting `view` chooses what trains:

v1  The latent weight W and the scales train, and codes follow: codes = nearest(W / S). Let n = W / S, Q = lut[codes],
    and m = 1 if n lies within the table, else 0. The gradients of the effective weight Q S are

        d/dW = m        d/dS = Q - n m                                                  (as in LSQ, arXiv 1902.08153)

v2  Codes are frozen, and S = sum_k g_k a_k b_k with a_k and b_k of length 1. The directions a_k (`scale_A`), b_k
    (`scale_B`) and the magnitudes g_k (`rank_magnitude`) train.

The setting `forward` chooses how a layer multiplies:

    weight              y = (Q S) x                             one matrix product, whatever r is
    factored, batched   y = sum_k g_k a_k * (Q (b_k * x))       r products, as the Neural Engine computes it

The setting `init` chooses the start: `svd` of the group maxima as in the original tools, or `als`, which continues
from there by least squares (lowrank.py).

Codes uint8 [out, in]; stored in fp16: lut [2**bits], a [out, r], b [r, in].
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from wrinklefree.core import fused, surgery
from wrinklefree.core.codes import Codes, look_up
from wrinklefree.core.forms import Form, low_rank
from wrinklefree.core.method import Batches, QuantLinear, QuantMethod, Tensors, quant_layers
from wrinklefree.core.ste import round_fp16
from wrinklefree.families.architectures import ATTENTION
from wrinklefree.methods.anemll import lowrank
from wrinklefree.methods.anemll.decode import decode
from wrinklefree.methods.anemll.lowrank import Factors, guarded, nearest

NORM_EPS = 1e-6  # the least length that a direction is divided by


class LutLinear(QuantLinear):
    """A linear layer whose weights are table entries times low-rank scales."""

    config: "Config"
    codes: Tensor
    share: Tensor

    def setup(self) -> None:
        out, width = self.weight.shape
        rank, device = min(self.config.rank, out, width), self.weight.device
        self.lut = nn.Parameter(lowrank.uniform_table(self.config.bits).to(device))
        self.scale_A = nn.Parameter(torch.zeros(out, rank, device=device))
        self.scale_B = nn.Parameter(torch.zeros(rank, width, device=device))
        if self.config.view == "v2":
            self.rank_magnitude = nn.Parameter(torch.zeros(rank, device=device))
            self.register_buffer("share", torch.ones(rank, device=device))
            self.register_buffer("codes", torch.zeros(out, width, dtype=torch.uint8, device=device))
        self._adopt_nearest(lowrank.by_rows(self.weight.detach(), self.config.bits, rank))

    def table(self) -> Tensor:
        """The trained table [2**bits] in ascending order, as `nearest` needs it."""
        return self.lut.sort().values

    def factors(self) -> Factors:
        """The table and factors before they are rounded to fp16. Differentiable."""
        if self.config.view == "v1":
            return Factors(self.table(), self.scale_A, self.scale_B)
        # Stored are a_k g_k / s_k and b_k s_k, with s_k (`share`) the length of b_k at conversion. So both stay in the
        # range of fp16, and a layer converted from v1 keeps its rounded factors.
        a = self.scale_A / self.scale_A.norm(dim=0).clamp_min(NORM_EPS)
        b = self.scale_B / self.scale_B.norm(dim=1, keepdim=True).clamp_min(NORM_EPS)
        return Factors(self.table(), a * (self.rank_magnitude / self.share), b * self.share.unsqueeze(1))

    def encode(self) -> Codes:
        table, a, b = (round_fp16(t) for t in self.factors())
        tensors = {"lut": table, "a": a, "b": b}
        index = self.codes if self.config.view == "v2" else self.nearest(self.weight.detach(), tensors)
        return Codes(index, self.config.bits, tensors, (self.out_features, self.in_features))

    @property
    def follows_weight(self) -> bool:
        return self.config.view == "v1"

    def nearest(self, weight: Tensor, tensors: Tensors) -> Tensor:
        table, scales = tensors["lut"].detach(), tensors["a"].detach() @ tensors["b"].detach()
        if fused.serves(weight):
            return fused.table_codes(weight, scales, table)
        return nearest(weight / guarded(scales), table)

    def part(self, tensors: Tensors, columns: Tensor) -> Tensors:
        return tensors | {"b": tensors["b"][:, columns]}

    def fit(self, importance: Tensor) -> None:
        self.initialize(importance if self.config.importance else None)

    @torch.no_grad()
    def adopt(self, weight: Tensor, rounded: Tensor) -> None:
        super().adopt(weight, rounded)
        if self.config.view == "v2":
            table, a, b = (round_fp16(t) for t in self.factors())
            self.codes.copy_(self.nearest(weight, {"lut": table, "a": a, "b": b}))

    def ratios(self, a: Tensor, b: Tensor) -> Tensor:
        """The latent weight divided by the scales a b: W / S [out, in], without gradient."""
        return self.weight.detach() / guarded(a.detach() @ b.detach())

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        table, a, b = (codes.tensors[name].float() for name in ("lut", "a", "b"))
        if a.shape[:1] + b.shape[1:] != codes.index.shape:  # torch would stretch some that the library refuses
            raise ValueError(f"factors {list(a.shape)} and {list(b.shape)} for codes {list(codes.index.shape)}")
        if fused.serves(codes.index) and not any(t.requires_grad for t in (table, a, b)):
            return fused.table_weight(codes.index, a @ b, table)
        return decode(codes)

    @staticmethod
    def form(codes: Codes) -> Form:
        return low_rank(codes.index, *(codes.tensors[name].float() for name in ("lut", "a", "b")))

    def quantized_weight(self) -> Tensor:
        codes = self.encode()
        if self.config.view == "v2" or not self.weight.requires_grad:
            return self.decode(codes)
        if fused.serves(self.weight):
            return estimated(self.weight, codes)
        value = self.decode(codes)
        a, b = codes.tensors["a"], codes.tensors["b"]
        ratios = self.ratios(a, b)
        inside = (ratios.abs() <= codes.tensors["lut"].detach()[-1]).float()
        scales = a @ b
        # Both brackets are zero in value. They add the gradients d/dS = -n m (Q comes with `value`) and d/dW = m.
        towards_scales = ratios * inside * (scales - scales.detach())
        return value - towards_scales + inside * (self.weight - self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        rounding = self.config.ste_fp16 and self.training  # evaluation multiplies with the weight that is packed
        if rounding or self.config.forward == "factored":
            return factored(self, x, fp16=rounding)
        return batched(self, x) if self.config.forward == "batched" else super().forward(x)

    @torch.no_grad()
    def take(self, factors: Factors, codes: Tensor) -> None:
        """Set the table and factors from `factors`, and in view v2 also the frozen `codes` (uint8 [out, in])."""
        table, a, b = factors
        self.lut.copy_(table)
        if self.config.view == "v2":
            self.rank_magnitude.copy_(a.norm(dim=0) * b.norm(dim=1))
            self.share.copy_(torch.where(b.norm(dim=1) > 0, b.norm(dim=1), 1.0))
            a, b = F.normalize(a, dim=0, eps=NORM_EPS), F.normalize(b, dim=1, eps=NORM_EPS)
            self.codes.copy_(codes)
        self.scale_A.copy_(a)
        self.scale_B.copy_(b)
        self.effective.clear()

    def initialize(self, importance: Tensor | None) -> None:
        """Fit table, factors and codes to the weight. `importance` [in] weights its columns; None weights all alike."""
        config = self.config
        weight = self.weight.detach()
        factors = lowrank.start(weight, config.bits, config.rank, config.group_size)
        if config.init == "als":
            if importance is None:
                importance = torch.ones(self.in_features, device=weight.device)
            factors = lowrank.fit(weight, factors, importance, config.als_iterations, config.learn_table)
        self._adopt_nearest(factors)

    def _adopt_nearest(self, factors: Factors) -> None:
        """Balance `factors`, choose the codes nearest to the weight, and `take` both."""
        factors = Factors(factors.table, *lowrank.balanced(factors.a, factors.b))
        table, a, b = (round_fp16(t) for t in factors)
        self.take(factors, nearest(self.weight.detach() / guarded(a @ b), table))

    def choose_trained(self, trains: bool) -> None:
        """Turn gradients on for the parameters that the config trains, or off for all if `trains` is False."""
        config = self.config
        scales = trains and config.train != "weights"
        self.weight.requires_grad_(trains and config.view == "v1" and config.train != "scales")
        self.lut.requires_grad_(scales and config.learn_table and not config.g_only)
        for factor in (self.scale_A, self.scale_B):
            factor.requires_grad_(scales and not config.g_only)
        if config.view == "v2":
            self.rank_magnitude.requires_grad_(scales)


def estimated(weight: Tensor, codes: Codes) -> Tensor:
    """Compute Q (A B) from the codes of a latent weight, with the gradients of view v1."""
    value: Tensor = _Estimated.apply(weight, *(codes.tensors[name] for name in ("lut", "a", "b")), codes.index)
    return value


class _Estimated(torch.autograd.Function):
    """Compute Q (A B) with the gradients of view v1. A B is computed again for them, to save memory."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Tensor, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weight, table, a, b)
        return fused.table_weight(index, a @ b, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, table, a, b = ctx.saved_tensors
        grads = fused.table_gradients(grad, weight, a @ b, table)
        return grads.weight, grads.table, grads.scales @ b.T, a.T @ grads.scales, None


def factored(layer: LutLinear, x: Tensor, fp16: bool = False) -> Tensor:
    """Compute sum_k a_k * (Q (b_k * x)) + bias, one rank after the other: x [..., in] -> fp32 [..., out].

    With `fp16`, the inputs and every intermediate result are rounded to half precision. Autocast is off, so that no
    product is rounded to bf16 instead. The gradient ignores the rounding.
    """
    rounded = round_fp16 if fp16 else _unrounded
    with torch.autocast(device_type=x.device.type, enabled=False):
        codes = layer.encode()
        q, a, b = look_up(codes.tensors["lut"], codes.index), codes.tensors["a"], codes.tensors["b"]
        x = rounded(x.float())
        y = torch.zeros((), device=x.device)
        for k in range(len(b)):
            y = rounded(y + rounded(a[:, k] * rounded(F.linear(rounded(x * b[k]), q))))
        return y if layer.bias is None else rounded(y + rounded(layer.bias.float()))


def batched(layer: LutLinear, x: Tensor) -> Tensor:
    """Compute sum_k a_k * (Q (b_k * x)) + bias for all ranks at once: x [..., in] -> fp32 [..., out].

    It needs memory for a tensor [..., r, out], which `factored` does not.
    """
    codes = layer.encode()
    q, a, b = look_up(codes.tensors["lut"], codes.index), codes.tensors["a"], codes.tensors["b"]
    y = (F.linear(x.float().unsqueeze(-2) * b, q) * a.T).sum(-2)
    return y if layer.bias is None else y + layer.bias.float()


def _unrounded(x: Tensor) -> Tensor:
    return x


@dataclass(kw_only=True)
class Config(QuantMethod):
    """Settings of ANEMLL. Layers in `attn_names` have `attn_bits` and `attn_rank`, all others `bits` and `rank`."""

    layer: ClassVar[type[QuantLinear]] = LutLinear
    ladder: ClassVar[tuple[str, tuple[int, ...]] | None] = ("bits", (2, 3, 4))

    name: Literal["anemll"] = "anemll"
    view: Literal["v1", "v2"] = "v1"
    bits: Literal[2, 3, 4] = 2
    rank: Annotated[int, Field(gt=0, lt=2**31)] = 32
    attn_bits: Literal[2, 3, 4] = 4
    attn_rank: Annotated[int, Field(gt=0, lt=2**31)] = 8
    attn_names: list[str] = field(default_factory=lambda: list(ATTENTION))
    group_size: Annotated[int, Field(gt=0, lt=2**31)] = 32  # columns that share a maximum in the first fit; not stored
    init: Literal["als", "svd"] = "als"
    als_iterations: Annotated[int, Field(ge=0, lt=2**31)] = 10
    importance: bool = True  # init=als weights columns by the mean square of their inputs, if these are not rotated
    learn_table: bool = True
    train: Literal["both", "scales", "weights"] = "both"  # v2 has no weights to train
    g_only: bool = False  # v2: train only the magnitudes
    mlp_only: bool = False
    attn_only: bool = False
    forward: Literal["weight", "factored", "batched"] = "weight"
    ste_fp16: bool = False  # train with forward=factored and every intermediate result rounded to fp16
    requantize: Literal["refit", "kmeans"] = "refit"  # to other bits: a new fit, or the original tools' k-means

    def __post_init__(self) -> None:
        if self.mlp_only and self.attn_only:
            raise ValueError("mlp_only and attn_only exclude one another")
        if self.view == "v2" and self.train == "weights":
            raise ValueError("train=weights needs view=v1: codes are frozen in v2")
        if (self.ste_fp16 or self.forward != "weight") and self.view == "v1" and self.train != "scales":
            raise ValueError("ste_fp16 and forward train only scales, which needs view=v2 or train=scales")
        if (self.ste_fp16 or self.forward != "weight") and self.rotate_inputs:
            raise ValueError("ste_fp16 and forward compute as the Neural Engine does, which does not rotate_inputs")
        if self.g_only and self.view == "v1":
            raise ValueError("g_only needs view=v2: v1 has no magnitudes of its own")

    def config_for(self, fqn: str) -> Self:
        own = super().config_for(fqn)
        if own is not self or not self.is_attention(fqn):
            return own
        return replace(self, bits=self.attn_bits, rank=self.attn_rank)

    def is_attention(self, fqn: str) -> bool:
        return surgery.matches(fqn, self.attn_names)

    def trains(self, fqn: str) -> bool:
        """Whether any parameter of the layer `fqn` trains."""
        return not (self.mlp_only if self.is_attention(fqn) else self.attn_only)

    def prepare(self, model: nn.Module, batches: Batches = (), initialize: bool = True) -> nn.Module:
        """Swap the linear layers and fit them. If the model is prepared already, convert its layers instead."""
        self.keep_rotation(model)
        known = quant_layers(model)
        squares = {}
        weighted = self.importance and self.init == "als" and not self.rotate_inputs  # squares are of other columns
        if initialize and not known and weighted:
            squares = lowrank.input_squares(model, self.sites(model), batches)
        if known:
            for fqn, layer in known.items():
                assert isinstance(layer, LutLinear)
                model.set_submodule(fqn, converted(layer, self.config_for(fqn)))
        else:
            super().prepare(model)
        for fqn, layer in quant_layers(model).items():
            assert isinstance(layer, LutLinear)
            if initialize and not known:
                layer.initialize(squares.get(fqn))
            layer.choose_trained(self.trains(fqn))
        return model


@torch.no_grad()
def converted(layer: LutLinear, config: Config) -> LutLinear:
    """Convert a layer to other settings. It is returned as it is if view, bits and rank stay the same.

    | change | result |
    |---|---|
    | view | the effective weight stays |
    | more ranks | they begin at zero, so the effective weight stays |
    | other bits, fewer ranks: `refit` | new table, factors and codes are fitted |
    | other bits, fewer ranks: `kmeans` | the table is clustered, the first ranks stay, new codes are chosen |
    """
    old = layer.config
    codes = layer.encode()
    if (old.view, old.bits, len(codes.tensors["b"])) == (config.view, config.bits, _rank(layer, config)):
        layer.config = config
        return layer
    effective = layer.decode(codes)
    if old.view == "v2" or old.bits != config.bits:
        layer.weight.copy_(effective)  # frozen codes leave the latent weight behind; the effective one is the truth
    new = LutLinear(layer, config)
    factors = Factors(codes.tensors["lut"], codes.tensors["a"], codes.tensors["b"])
    if old.bits == config.bits and _rank(layer, config) >= len(factors.b):
        new.take(_widened(factors, _rank(layer, config)), codes.index)
    elif config.requantize == "kmeans":
        table, a, b = _widened(factors, _rank(layer, config))
        table = _kmeans(table, 2**config.bits)
        new.take(Factors(table, a, b), nearest(effective / guarded(a @ b), table))
    else:
        new.initialize(None)
    return new


def _rank(layer: nn.Linear, config: Config) -> int:
    return min(config.rank, layer.out_features, layer.in_features)


def _widened(factors: Factors, rank: int) -> Factors:
    """Add ranks of magnitude 0 up to `rank` ranks, or keep only the first `rank` of them."""
    table, a, b = factors
    more = max(0, rank - len(b))
    return Factors(table, F.pad(a, (0, more))[:, :rank], torch.cat([b, lowrank.directions(more, b)])[:rank])


def _kmeans(table: Tensor, size: int, iterations: int = 20) -> Tensor:
    """Reduce a table to `size` entries by k-means, then make it symmetric. Every old entry counts once, as upstream."""
    starts = (torch.arange(1, size + 1) * (len(table) - 1) / (size + 1)).long()
    centres = table[starts]
    for _ in range(iterations):
        owner = (table.unsqueeze(1) - centres).abs().argmin(1)
        centres = torch.stack([table[owner == k].mean() if (owner == k).any() else centres[k] for k in range(size)])
    return ((centres - centres.flip(0)) / 2).half().float()
