"""What a compressor is trained for, and how well hidden states survive it.

States x [N, D] are a language model's last ones, after its final norm, of all real tokens and of no padding; x' is what
comes back from D' numbers each.

    mse                  mean over N and D of (x' - x)^2
    cosine_similarity    mean over N of cos(x, x')
    relative_error       |x' - x| / |x|, over all N together (Frobenius)
    variance_ratio       mean over D of var(x'_d) / var(x_d), every dimension alike
    mean_only_cosine     what the mean of x as a constant answer reaches: a cosine is good by what it is above this
    r2                   1 - sum |x' - x|^2 / sum |x - mean|^2: centred, so that the constant has 0
    kl, top1_agreement   of the next word that the head reads in x' against that in x, nats

All follow from sums over states, so they are exact however the states came in batches.

Objectives: mse; kl, as above; fisher, 1/2 (x' - x)^T M (x' - x) with the mean Fisher matrix M of the head, which is the
KL to second order (core/moments.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.moments import RIDGE
from wrinklefree.data.open import IGNORE
from wrinklefree.methods.trm import DimensionCompressor
from wrinklefree.objectives.base import Batch, Metrics, Objective
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.objectives.losses import TokenLosses, token_losses

Sums = dict[str, Tensor]
Figures = dict[str, float]

LEAST_VARIANCE = 1e-8  # of a dimension, beside which its own counts; upstream's number
TRAINED_METRICS = ("mse", "cosine_similarity", "relative_error", "variance_ratio")  # of every training batch


def mark(batch: Batch, pad: int) -> Batch:
    """The batch with labels [B, L + 1]: position i counts where label i + 1 is not -100, as the trainer counts tokens.

    Padding is what stands at the end of a block, not learned, with the id `pad`.
    """
    ids = batch["input_ids"]
    filler = (batch["labels"] == IGNORE) & (ids == pad)
    trailing = filler.flip(1).long().cumprod(1).flip(1).bool()
    return {**batch, "labels": F.pad(ids.masked_fill(trailing, IGNORE), (1, 0), value=IGNORE)}


class MarkedStream(Iterator[Batch]):
    """Training batches, marked; the position is the inner stream's."""

    def __init__(self, stream: Any, pad: int) -> None:
        self.stream, self.pad = stream, pad

    def __next__(self) -> Batch:
        return mark(next(self.stream), self.pad)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.stream.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


@torch.no_grad()
def real_states(decoder: BodyAndHead, batch: Batch) -> Tensor:
    """The states [N, D] that count of a marked batch."""
    return decoder.states(batch)[batch["labels"][:, 1:] != IGNORE]


def sums_of(states: Tensor, rebuilt: Tensor) -> Sums:
    """What `metrics` needs of N states, in fp64; sums of parts add up."""
    both = torch.stack([states.double(), rebuilt.double()])
    x, y = both
    return {
        "count": x.new_tensor(len(x)),
        "error": (y - x).square().sum(),
        "cosine": F.cosine_similarity(x, y, dim=-1).sum(),
        "units": F.normalize(x, dim=-1).sum(0),
        "totals": both.sum(1),  # [2, D], of x and of x'
        "squares": both.square().sum(1),
    }


def added(a: Sums, b: Sums) -> Sums:
    return {name: value + b[name] for name, value in a.items()}


def metrics(sums: Sums) -> Metrics:
    """The figures named above, fp64; kl, top1_agreement and loss where they were summed."""
    count, totals, squares = sums["count"], sums["totals"], sums["squares"]
    means = totals / count
    variances = squares / count - means.square()  # [2, D]
    found = {
        "mse": sums["error"] / (count * totals.shape[1]),
        "cosine_similarity": sums["cosine"] / count,
        "relative_error": (sums["error"] / squares[0].sum()).sqrt(),
        "variance_ratio": (variances[1] / (variances[0] + LEAST_VARIANCE)).mean(),
        "mean_only_cosine": sums["units"] / count @ F.normalize(means[0], dim=0),
        "r2": 1 - sums["error"] / (count * variances[0].sum()),
    }
    return found | {name: sums[name] / count for name in ("kl", "top1_agreement", "loss") if name in sums}


def reading(decoder: BodyAndHead, states: Tensor, rebuilt: Tensor) -> TokenLosses:
    """The KL from what the head reads in states [N, D] to what it reads in rebuilt ones, differentiable in these."""
    meant, head = decoder.project(states)
    said = decoder.project(rebuilt)[0]
    no_labels = torch.zeros(len(states), dtype=torch.long, device=states.device)
    return token_losses(
        said, head.to(said.dtype), no_labels, teacher=(meant, head.to(meant.dtype)), ce_weight=0.0, kl_weight=1.0
    )


class Reconstruction(Objective):
    """Objective over marked batches."""

    def __init__(
        self, compressor: DimensionCompressor, decoder: BodyAndHead, objective: str, metric: Tensor | None = None
    ) -> None:
        """`metric` [D, D] is M, for objective fisher."""
        self.compressor, self.decoder, self.objective = compressor, decoder, objective
        if objective == "fisher":
            assert metric is not None
            ridge = RIDGE * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)
            self.metric = (metric + ridge).float().to(compressor.weight.device)

    def __call__(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        states = real_states(self.decoder, batch)
        rebuilt = self.compressor(states)
        found = metrics(sums_of(states, rebuilt.detach()))
        yield self.loss(states, rebuilt), {name: found[name] for name in TRAINED_METRICS}

    def loss(self, states: Tensor, rebuilt: Tensor) -> Tensor:
        """A mean over states [N, D]."""
        if self.objective == "kl":
            return reading(self.decoder, states, rebuilt).loss
        difference = rebuilt - states.float()
        if self.objective == "mse":
            return difference.square().mean()
        with torch.autocast(states.device.type, enabled=False):
            return ((difference @ self.metric) * difference).sum(-1).mean() / 2

    @torch.no_grad()
    def measure(
        self, batches: Iterable[Batch], compressors: Mapping[str, DimensionCompressor]
    ) -> tuple[dict[str, Figures], int]:
        """The figures of each compressor on marked batches, `loss` among them, and on how many states.

        The language model reads each batch once.
        """
        sums: dict[str, Sums] = {}
        for held in batches:
            batch = {name: tensor.to(self.compressor.weight.device) for name, tensor in held.items()}
            states = real_states(self.decoder, batch)
            for name, compressor in compressors.items():
                here = self._sums(states, compressor(states))
                sums[name] = added(sums[name], here) if name in sums else here
        count = int(next(iter(sums.values()))["count"])
        found = {name: metrics(total) for name, total in sums.items()}
        return {name: {key: float(value) for key, value in of.items()} for name, of in found.items()}, count

    def _sums(self, states: Tensor, rebuilt: Tensor) -> Sums:
        read = reading(self.decoder, states, rebuilt)
        means = {"kl": read.kl, "top1_agreement": read.same_top1, "loss": self.loss(states, rebuilt)}
        return sums_of(states, rebuilt) | {name: value.double() * len(states) for name, value in means.items()}
