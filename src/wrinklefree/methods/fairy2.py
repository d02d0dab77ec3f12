"""Fairy2i: complex weights in {+1, -1, +i, -i}, refined by residual stages. Paper: arXiv 2512.02901.

A real matrix R = [[A, B], [C, D]] of shape [2n, 2m] acts on x + i y (x, y the halves of its input) as U z + W conj(z):

    U = ((A + D) + i (C - B)) / 2        W = ((A - D) + i (C + B)) / 2             both complex [n, m]
    A = Re U + Re W    B = Im W - Im U   C = Im U + Im W    D = Re U - Re W        and back, without loss

Each entry z of U and W becomes a sum of T terms, one of the four units in each, scaled per axis:

    q = r_j c_k sum_t  s_re,t Re(i^k_t) + i s_im,t Im(i^k_t)          2 bits a term, so T bits per real weight

with scales s per tensor, row or group of columns, and for `scale_granularity: rank1` one factor per complex row j and
column k beside the tensor's. `preset: paper` is the paper's setting: tensor scales, each stage the phase's nearest unit
of what the stages before left over (real axis iff |Re| > |Im|, strictly), s the mean modulus along its axis. Otherwise
all T codes of an entry are chosen together, as the nearest of the 4^T points, and the scales fitted by alternating
least squares (ALS) before training, then left (`als`) or trained (`learned`). LOG.md has what each is worth.

Symbols: T stages, p in {U, W}, axis in {re, im}. Z [2 (p), 2 (axis), n, m]; codes uint8 [2 (p), T, n, m], entry k
stands for i^k; scales [2 (p), T, 2 (axis), R, G], R 1 or n, G 1 or m / group_size; rows [n], columns [m]. An odd width
is padded with a zero row or column, sliced off again.
"""

import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from wrinklefree.core.codes import Codes
from wrinklefree.core.forms import Complex
from wrinklefree.core.grid import snapped
from wrinklefree.core.method import Batches, QuantLinear, QuantMethod, num_groups, quant_layers
from wrinklefree.core.ste import round_fp16
from wrinklefree.core.units import entries, spread, units

log = logging.getLogger("wrinklefree")

ALS_ITERATIONS, BALANCE_ITERATIONS, TINY = 6, 5, 1e-8


def to_widely_linear(R: Tensor) -> Tensor:
    """Real [2n, 2m] -> Z [2 (U, W), 2 (re, im), n, m]."""
    (A, B), (C, D) = (half.chunk(2, dim=1) for half in R.chunk(2, dim=0))
    return torch.stack([A + D, C - B, A - D, C + B]).unflatten(0, (2, 2)) / 2


def to_real(Z: Tensor) -> Tensor:
    """Inverse of `to_widely_linear`."""
    (U_re, U_im), (W_re, W_im) = Z
    top = torch.cat([U_re + W_re, W_im - U_im], dim=1)
    return torch.cat([top, torch.cat([U_im + W_im, U_re - W_re], dim=1)], dim=0)


def padded(weight: Tensor) -> Tensor:
    """[out, in] with a zero row or column where a width is odd."""
    return pad(weight, (0, weight.shape[1] % 2, 0, weight.shape[0] % 2))


def nearest_unit(Z: Tensor) -> Tensor:
    """Z [2, 2, n, m] -> the code of the unit nearest in phase; ties |re| = |im| go to the imaginary axis."""
    re, im = Z.unbind(1)
    imaginary = re.abs() <= im.abs()
    negative = (imaginary & (im < 0)) | (~imaginary & (re < 0))
    return imaginary.to(torch.uint8) | (negative.to(torch.uint8) << 1)


def residual_codes(Z: Tensor, num_stages: int) -> tuple[Tensor, Tensor]:
    """The paper's quantizer: (codes [2, T, n, m], scales [2, T, 2, 1, 1]), stage by stage."""
    codes, scales = [], []
    for _ in range(num_stages):
        k = nearest_unit(Z)
        axes = torch.stack(units(k), dim=1)
        used = axes.abs().sum(dim=(2, 3), keepdim=True).clamp_min(1)
        s = round_fp16(((Z * axes).sum(dim=(2, 3), keepdim=True) / used).clamp_min(TINY))
        Z = Z - axes * s
        codes.append(k)
        scales.append(s)
    return torch.stack(codes, dim=1), torch.stack(scales, dim=1)


def candidates(num_stages: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(axis, sign) of every stage, for one of each four points that mirror each other in the axes."""
    found = []
    for axes in itertools.product((1, 0), repeat=num_stages):
        for signs in itertools.product((1, -1), repeat=num_stages):
            first = dict(reversed(list(zip(axes, signs, strict=True))))
            if all(sign == 1 for sign in first.values()):
                found.append((axes, signs))
    return found


def nearest_codes(Z: Tensor, scales: Tensor) -> Tensor:
    """The codes [2, T, n, m] of the point nearest to Z among all 4^T that `scales` span.

    By symmetry |re|, |im| decide, and signs follow. Maximizes x.q - |q|^2 / 2; a tie goes to the imaginary axis.
    Choices are made by masks, because `torch.where` on random conditions is 50 times slower on a CPU.
    """
    x, y = Z.abs().unbind(1)
    scales = spread(scales, *Z.shape[-2:])
    best = torch.full_like(x, -torch.inf)
    codes = [torch.zeros_like(x, dtype=torch.uint8) for _ in range(scales.shape[1])]
    for axes, signs in candidates(scales.shape[1]):
        terms = [scales[:, t, axis] * sign for t, (axis, sign) in enumerate(zip(axes, signs, strict=True))]
        point = [sum((s for s, axis in zip(terms, axes, strict=True) if axis == a), 0 * terms[0]) for a in (0, 1)]
        p, q = point[0].abs(), point[1].abs()
        score = (x * p).addcmul_(y, q).sub_((p.square() + q.square()) / 2)
        better = (score > best).to(torch.uint8).neg_()  # 0 or 255
        best = torch.maximum(best, score)
        for code, axis, sign in zip(codes, axes, signs, strict=True):
            flipped = (point[axis] < 0) ^ (sign < 0)
            code ^= (code ^ (axis | flipped.to(torch.uint8) << 1)) & better
    negative_re, negative_im = ((Z < 0).to(torch.uint8) << 1).unbind(1)
    return torch.stack([k ^ negative_re ^ ((negative_re ^ negative_im) & (k & 1).neg()) for k in codes], dim=1)


def blocks(x: Tensor, like: Tensor) -> Tensor:
    """[..., n, m] -> [..., R, n / R, G, m / G] for scales [..., R, G]."""
    return x.unflatten(-1, (like.shape[-1], -1)).unflatten(-3, (like.shape[-2], -1))


def fit_scales(Z: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The least-squares scales [2, T, 2, R, G] for given codes: T x T normal equations per part, axis, row, group."""
    axes = torch.stack(units(index), dim=2)  # [2, T, 2, n, m]
    gram = torch.einsum("ptarigj,psarigj->pargts", blocks(axes, like), blocks(axes, like))
    moment = torch.einsum("ptarigj,parigj->pargt", blocks(axes, like), blocks(Z, like))
    entries = Z.shape[-2] * Z.shape[-1] / (like.shape[-2] * like.shape[-1])
    # Two stages may have the same codes throughout: equal rows, without a unique solution.
    ridge = 1e-6 * entries * torch.eye(index.shape[1], device=Z.device)
    scales = torch.linalg.solve(gram.double() + ridge, moment.double())
    return scales.to(Z.dtype).permute(0, 4, 1, 2, 3).contiguous()


class Dequantize(torch.autograd.Function):
    """Codes and scales -> Z [2, 2, n, m]; the backward pass works the units out again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(index, scales)
        wide = spread(scales, *index.shape[-2:])
        Z = torch.zeros(2, 2, *index.shape[-2:], device=index.device)
        for t in range(index.shape[1]):
            for axis, unit in enumerate(units(index[:, t])):
                Z[:, axis].addcmul_(unit, wide[:, t, axis])
        return Z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        index, scales = ctx.saved_tensors
        grads = [
            [(blocks(unit * grad[:, axis], scales)).sum(dim=(-3, -1)) for axis, unit in enumerate(units(index[:, t]))]
            for t in range(index.shape[1])
        ]
        return None, torch.stack([torch.stack(pair, dim=1) for pair in grads], dim=1)


class Fairy2Linear(QuantLinear):
    """`nn.Linear` with Fairy2i weights. Scales that do not follow the weight are kept, and trained, as logarithms.

    A logarithm takes relative steps, whatever a layer's magnitude, and keeps a scale positive.
    """

    config: "Config"

    def setup(self) -> None:
        if self.config.scale_mode == "mean":
            return
        trained = self.config.scale_mode == "learned"
        for name, tensor in fit(padded(self.weight.detach()), self.config).items():
            self.register_parameter(f"log_{name}", nn.Parameter(tensor.log(), requires_grad=trained))

    def encode(self) -> Codes:
        weight, shape = padded(self.weight.detach()), (self.out_features, self.in_features)
        if self.config.scale_mode == "mean":
            index, scales = residual_codes(to_widely_linear(weight), self.config.num_stages)
            return Codes(index, 2, {"scales": scales}, shape)
        logs = {name: p for name, p in self.named_parameters(recurse=False) if name.startswith("log_")}
        tensors = {name.removeprefix("log_"): round_fp16(p.exp()) for name, p in logs.items()}
        if "rows" in tensors:
            weight = weight / outer(tensors["rows"], tensors["columns"]).detach()
        return Codes(nearest_codes(to_widely_linear(weight), tensors["scales"].detach()), 2, tensors, shape)

    @staticmethod
    def decode(codes: Codes) -> Tensor:
        tensors = {name: tensor.float() for name, tensor in codes.tensors.items()}
        if torch.compiler.is_compiling():
            weight = entries(codes.index, tensors["scales"])
        else:
            weight = to_real(Dequantize.apply(codes.index, tensors["scales"]))
        if "rows" in tensors:
            weight = weight * outer(tensors["rows"], tensors["columns"])
        return weight[: codes.shape[0], : codes.shape[1]]

    @staticmethod
    def snap(codes: Codes) -> Codes:
        return replace(codes, tensors=codes.tensors | {"scales": snapped(codes.tensors["scales"])})

    @staticmethod
    def form(codes: Codes) -> Complex:
        factors = [codes.tensors[name].repeat(2) if name in codes.tensors else None for name in ("rows", "columns")]
        return Complex(codes.index, codes.tensors["scales"], *factors)


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Factors of complex rows [n] and columns [m] -> factors of the real weight's entries [2n, 2m]."""
    return rows.repeat(2).unsqueeze(1) * columns.repeat(2)


def balance(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [n], [m] of complex rows and columns, without which all have a root mean square of 1 (Sinkhorn)."""
    energy = weight.square().unflatten(1, (2, -1)).mean(1).unflatten(0, (2, -1)).mean(0) + TINY**2
    rows, columns = energy.mean(1).sqrt(), torch.ones_like(energy[0])
    for _ in range(BALANCE_ITERATIONS):
        columns = (energy / rows.square().unsqueeze(1)).mean(0).sqrt()
        rows = (energy / columns.square()).mean(1).sqrt()
    return rows, columns


def fit(weight: Tensor, config: "Config") -> dict[str, Tensor]:
    """`scales` [2, T, 2, R, G], and for rank1 `rows` [n], `columns` [m], of a weight of even widths.

    Scales by alternating least squares: nearest codes for fixed scales, best scales for fixed codes.
    """
    factors = {}
    if config.scale_granularity == "rank1":
        factors = dict(zip(("rows", "columns"), balance(weight), strict=True))
        weight = weight / outer(factors["rows"], factors["columns"])
    Z = to_widely_linear(weight)
    index, scales = residual_codes(Z, config.num_stages)
    like = scales.expand(-1, -1, -1, *config.grid(*Z.shape[-2:]))
    for _ in range(ALS_ITERATIONS):
        scales = fit_scales(Z, index, like).abs().clamp_min(TINY)
        index = nearest_codes(Z, scales)
    return {"scales": fit_scales(Z, index, like).abs().clamp_min(TINY), **factors}


@dataclass(kw_only=True)
class Config(QuantMethod):
    """Fairy2i. `preset: paper` is `tensor` and `mean`, whatever else is set."""

    layer: ClassVar[type[QuantLinear]] = Fairy2Linear

    name: Literal["fairy2"] = "fairy2"
    num_stages: Annotated[int, Field(ge=1, le=4)] = 2
    scale_granularity: Literal["tensor", "row", "group", "rank1"] = "rank1"
    scale_mode: Literal["mean", "als", "learned"] = "learned"
    group_size: Annotated[int, Field(gt=0)] = 64  # complex columns, for scale_granularity group
    activation_bits: Literal[8] | None = None  # None leaves activations in floating point
    preset: Literal["paper"] | None = None

    def __post_init__(self) -> None:
        if self.preset == "paper":
            self.scale_granularity, self.scale_mode = "tensor", "mean"
        if self.scale_mode == "mean" and self.scale_granularity != "tensor":
            raise ValueError("scale_mode=mean is the paper's and knows scale_granularity=tensor only")

    @property
    def weight_bits(self) -> float:
        return float(self.num_stages)

    def grid(self, n: int, m: int) -> tuple[int, int]:
        """(R, G), the scales of an n x m complex matrix. Raises UserError where groups do not fill its rows."""
        rows = n if self.scale_granularity in ("row", "group") else 1
        grouped = self.scale_granularity == "group"
        return rows, num_groups(m, self.group_size, "complex columns") if grouped else 1

    @property
    def int8_inputs(self) -> bool:
        return self.activation_bits is not None

    def prepare(self, model: nn.Module, batches: Batches = (), initialize: bool = True) -> nn.Module:
        model = super().prepare(model)
        odd = [fqn for fqn, layer in quant_layers(model).items() if layer.in_features % 2 or layer.out_features % 2]
        if odd:
            log.info("odd width, padded inside: %s", ", ".join(odd))
        return model


def convert_to_fairy2(
    model: nn.Module, num_stages: int = 2, exclude_names: Iterable[str] = ("embed_tokens", "lm_head")
) -> nn.Module:
    """Swap the linear layers of `model`, in place, for Fairy2i ones; `exclude_names` as in the config."""
    return Config(num_stages=num_stages, exclude_names=list(exclude_names)).prepare(model)
