"""ANEMLL lookup tables: 2 to 4 bits per weight with low-rank scales, for the Apple Neural Engine (ANEMLL-QUANT-1).

    W ~ lut[codes] * S        S = A B        lut [2**bits], symmetric, largest entry 1; A [out, r], B [r, in]

Two views of one layer (`view`):

v1  the latent weight W trains with the scales, and codes move: codes = nearest(W / S). With n = W / S, Q = lut[codes]
    and m = 1 where n lies within the table, else 0, the gradients of the effective weight Q S are

        d/dW = m        d/dS = Q - n m                                                  (as in LSQ, arXiv 1902.08153)

v2  codes are frozen and S = sum_k g_k a_k b_k with a_k, b_k of length 1: A_dir, B_dir and `rank_magnitude` g train.
    Stored are a_k g_k / s_k and b_k s_k, with s_k (`share`) the length that b_k had at conversion: both stay in the
    range of fp16, and v1 converts to v2 without rounding anew.

Both compute with the effective weight, one matrix product however large r is. `factored` and `batched` compute the same
without it, rank by rank, as the Neural Engine does:

    y = sum_k g_k a_k * (Q (b_k * x))

`ste_fp16` trains through `factored` with every intermediate result rounded to fp16, in fp32 arithmetic that no autocast
reaches. Initialization (`init`): `svd` of the group maxima (upstream's), or `als` from there on, weighted by the mean
square of the inputs where there are batches to see it on (lowrank.py).

A prepared model takes other settings: v1 <-> v2 keeps the effective weight; more ranks begin at zero; other bits are
fitted to the effective weight (`requantize: refit`) or reduced by k-means over the table (`kmeans`, upstream's).

Codes uint8 [out, in]; stored in fp16: lut [2**bits], a [out, r], b [r, in].
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from wrinklefree.core import surgery
from wrinklefree.core.codes import Codes, look_up
from wrinklefree.core.forms import Form, low_rank
from wrinklefree.core.method import Batches, QuantLinear, QuantMethod, quant_layers
from wrinklefree.core.ste import round_fp16
from wrinklefree.families.architectures import ATTENTION
from wrinklefree.methods.anemll import lowrank
from wrinklefree.methods.anemll.decode import decode
from wrinklefree.methods.anemll.lowrank import Factors, guarded, nearest

NORM_EPS = 1e-6  # of the length of a direction


class LutLinear(QuantLinear):
    """`nn.Linear` with table entries times low-rank scales for a weight."""

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
        """The trained table [2**bits], ascending."""
        return self.lut.sort().values

    def factors(self) -> Factors:
        """The table and factors as they train, not yet rounded; differentiable."""
        if self.config.view == "v1":
            return Factors(self.table(), self.scale_A, self.scale_B)
        a = self.scale_A / self.scale_A.norm(dim=0).clamp_min(NORM_EPS)
        b = self.scale_B / self.scale_B.norm(dim=1, keepdim=True).clamp_min(NORM_EPS)
        return Factors(self.table(), a * (self.rank_magnitude / self.share), b * self.share.unsqueeze(1))

    def encode(self) -> Codes:
        table, a, b = (round_fp16(t) for t in self.factors())
        index = self.codes if self.config.view == "v2" else nearest(self.ratios(a, b), table.detach())
        tensors = {"lut": table, "a": a, "b": b}
        return Codes(index, self.config.bits, tensors, (self.out_features, self.in_features))

    def ratios(self, a: Tensor, b: Tensor) -> Tensor:
        """W / S [out, in], without gradient."""
        return self.weight.detach() / guarded(a.detach() @ b.detach())

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        return decode(codes)

    @staticmethod
    def form(codes: Codes) -> Form:
        return low_rank(codes.index, *(codes.tensors[name].float() for name in ("lut", "a", "b")))

    def quantized_weight(self) -> Tensor:
        codes = self.encode()
        value = self.decode(codes)
        if self.config.view == "v2" or not self.weight.requires_grad:
            return value
        a, b = codes.tensors["a"], codes.tensors["b"]
        ratios = self.ratios(a, b)
        inside = (ratios.abs() <= codes.tensors["lut"].detach()[-1]).float()
        scales = a @ b
        pulled = ratios * inside * (scales - scales.detach())
        return value - pulled + inside * (self.weight - self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        rounding = self.config.ste_fp16 and self.training  # what is packed is judged by the weight it stands for
        if rounding or self.config.forward == "factored":
            return factored(self, x, fp16=rounding)
        return batched(self, x) if self.config.forward == "batched" else super().forward(x)

    @torch.no_grad()
    def adopt(self, factors: Factors, codes: Tensor) -> None:
        """Take over table and factors, and, where they are frozen, codes."""
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
        """Fit table, factors and codes to the weight; `importance` [in] of its inputs."""
        config = self.config
        weight = self.weight.detach()
        factors = lowrank.start(weight, config.bits, config.rank, config.group_size)
        if config.init == "als":
            every = torch.ones(self.in_features, device=weight.device)
            chosen = every if importance is None else importance
            factors = lowrank.fit(weight, factors, chosen, config.als_iterations, config.learn_table)
        self._adopt_nearest(factors)

    def _adopt_nearest(self, factors: Factors) -> None:
        """`adopt`, with the codes nearest to the weight."""
        factors = Factors(factors.table, *lowrank.balanced(factors.a, factors.b))
        table, a, b = (round_fp16(t) for t in factors)
        self.adopt(factors, nearest(self.weight.detach() / guarded(a @ b), table))

    def choose_trained(self, trains: bool) -> None:
        """Let gradients reach what the config says; nothing where the layer is left out."""
        config = self.config
        scales = trains and config.train != "weights"
        self.weight.requires_grad_(trains and config.view == "v1" and config.train != "scales")
        self.lut.requires_grad_(scales and config.learn_table and not config.g_only)
        for factor in (self.scale_A, self.scale_B):
            factor.requires_grad_(scales and not config.g_only)
        if config.view == "v2":
            self.rank_magnitude.requires_grad_(scales)


def factored(layer: LutLinear, x: Tensor, fp16: bool = False) -> Tensor:
    """sum_k a_k * (Q (b_k * x)) + bias, one rank after the other: fp32 [..., out] of x [..., in].

    With `fp16`, inputs and each result are rounded to half precision (identity gradient).
    """
    rounded = round_fp16 if fp16 else _same
    with torch.autocast(device_type=x.device.type, enabled=False):
        codes = layer.encode()
        q, a, b = look_up(codes.tensors["lut"], codes.index), codes.tensors["a"], codes.tensors["b"]
        x = rounded(x.float())
        y = torch.zeros((), device=x.device)
        for k in range(len(b)):
            y = rounded(y + rounded(a[:, k] * rounded(F.linear(rounded(x * b[k]), q))))
        return y if layer.bias is None else rounded(y + rounded(layer.bias.float()))


def batched(layer: LutLinear, x: Tensor) -> Tensor:
    """The same with all ranks at once, [..., r, out] in memory: fp32 [..., out]."""
    codes = layer.encode()
    q, a, b = look_up(codes.tensors["lut"], codes.index), codes.tensors["a"], codes.tensors["b"]
    y = (F.linear(x.float().unsqueeze(-2) * b, q) * a.T).sum(-2)
    return y if layer.bias is None else y + layer.bias.float()


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(kw_only=True)
class Config(QuantMethod):
    """ANEMLL. `bits` and `rank` are those of the MLP, `attn_bits` and `attn_rank` of the layers in `attn_names`."""

    layer: ClassVar[type[QuantLinear]] = LutLinear

    name: Literal["anemll"] = "anemll"
    view: Literal["v1", "v2"] = "v1"
    bits: Literal[2, 3, 4] = 2
    rank: Annotated[int, Field(gt=0)] = 32
    attn_bits: Literal[2, 3, 4] = 4
    attn_rank: Annotated[int, Field(gt=0)] = 8
    attn_names: list[str] = field(default_factory=lambda: list(ATTENTION))
    group_size: Annotated[int, Field(gt=0)] = 32  # columns that share a maximum at the start; nothing of it is stored
    init: Literal["als", "svd"] = "als"
    als_iterations: Annotated[int, Field(ge=0)] = 10
    importance: bool = True  # weight the fit by the inputs' mean squares
    learn_table: bool = True
    train: Literal["both", "scales", "weights"] = "both"  # v2 has no weights to train
    g_only: bool = False  # v2: the magnitudes alone
    mlp_only: bool = False
    attn_only: bool = False
    forward: Literal["weight", "factored", "batched"] = "weight"
    ste_fp16: bool = False  # in training, and rank by rank, whatever `forward` says
    requantize: Literal["refit", "kmeans"] = "refit"

    def __post_init__(self) -> None:
        if self.mlp_only and self.attn_only:
            raise ValueError("mlp_only and attn_only exclude one another")
        if self.view == "v2" and self.train == "weights":
            raise ValueError("train=weights needs view=v1: codes are frozen in v2")
        if (self.ste_fp16 or self.forward != "weight") and self.view == "v1" and self.train != "scales":
            raise ValueError("ste_fp16 and forward train scales alone: view=v2, or train=scales")
        if self.g_only and self.view == "v1":
            raise ValueError("g_only needs view=v2: v1 has no magnitudes of its own")

    def config_for(self, fqn: str) -> Self:
        if not self.is_attention(fqn):
            return self
        return replace(self, bits=self.attn_bits, rank=self.attn_rank)

    def is_attention(self, fqn: str) -> bool:
        return surgery.matches(fqn, self.attn_names)

    def trains(self, fqn: str) -> bool:
        """Whether anything of the layer `fqn` trains."""
        return not (self.mlp_only if self.is_attention(fqn) else self.attn_only)

    def prepare(self, model: nn.Module, batches: Batches = (), initialize: bool = True) -> nn.Module:
        """Swap the linear layers and fit them; a model that is prepared already is converted to these settings."""
        known = quant_layers(model)
        squares = {}
        if initialize and not known and self.importance and self.init == "als":
            squares = lowrank.input_squares(model, dict(surgery.linears(model, self.exclude_names)), batches)
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
    """The layer under other settings: see the head of this file. The same layer where it already has their shape."""
    old = layer.config
    codes = layer.encode()
    if (old.view, old.bits, len(codes.tensors["b"])) == (config.view, config.bits, _rank(layer, config)):
        layer.config = config
        return layer
    effective = layer.decode(codes)
    if old.view == "v2" or old.bits != config.bits:
        layer.weight.copy_(effective)  # the latent weight of codes that were frozen is not what they stand for
    new = LutLinear(layer, config)
    factors = Factors(codes.tensors["lut"], codes.tensors["a"], codes.tensors["b"])
    if old.bits == config.bits and _rank(layer, config) >= len(factors.b):
        new.adopt(_widened(factors, _rank(layer, config)), codes.index)
    elif config.requantize == "kmeans":
        table, a, b = _widened(factors, _rank(layer, config))
        table = _kmeans(table, 2**config.bits)
        new.adopt(Factors(table, a, b), nearest(effective / guarded(a @ b), table))
    else:
        new.initialize(None)
    return new


def _rank(layer: nn.Linear, config: Config) -> int:
    return min(config.rank, layer.out_features, layer.in_features)


def _widened(factors: Factors, rank: int) -> Factors:
    """More ranks, with magnitude 0; or the first ones."""
    table, a, b = factors
    more = max(0, rank - len(b))
    return Factors(table, F.pad(a, (0, more))[:, :rank], torch.cat([b, lowrank.directions(more, b)])[:rank])


def _kmeans(table: Tensor, size: int, iterations: int = 20) -> Tensor:
    """Centres of the entries of a table, each counted once, as upstream does: [size], made symmetric."""
    starts = (torch.arange(1, size + 1) * (len(table) - 1) / (size + 1)).long()
    centres = table[starts]
    for _ in range(iterations):
        owner = (table.unsqueeze(1) - centres).abs().argmin(1)
        centres = torch.stack([table[owner == k].mean() if (owner == k).any() else centres[k] for k in range(size)])
    return ((centres - centres.flip(0)) / 2).half().float()
