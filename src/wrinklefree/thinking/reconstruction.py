"""What a compressor is trained for, and how well hidden states survive it.

x [N, D] are the last hidden states of a language model, after its final norm. Every real token has one, padding has
none. x' [N, D] is what comes back from D' numbers for each.

    mse                  mean over N and D of (x' - x)^2
    cosine_similarity    mean over N of cos(x, x')
    relative_error       |x' - x| / |x|, Frobenius norms over all N
    variance_ratio       mean over D of var(x'_d) / var(x_d): every dimension counts the same
    mean_only_cosine     the cosine_similarity of a constant answer, the mean of x: a good one is well above it
    r2                   1 - sum |x' - x|^2 / sum |x - mean|^2: the constant answer has 0
    kl, top1_agreement   between the next words that the head reads in x' and in x; nats, share

All of them are made from sums over states. So they do not depend on how the states were cut into batches.

Objectives:

    mse       as above
    kl        as above
    fisher    1/2 (x' - x)^T M (x' - x), M the mean Fisher matrix of the head: the KL to second order (moments.py)
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.batch import IGNORE, Batch
from wrinklefree.objectives.base import Loss, Metrics, Objective
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking.moments import RIDGE
from wrinklefree.thinking.network import DimensionCompressor
from wrinklefree.thinking.reading import compare_readings

Sums = dict[str, Tensor]
Figures = dict[str, float]

LEAST_VARIANCE = 1e-8  # added to the variance that variance_ratio divides by; upstream's number
TRAINED_METRICS = ("mse", "cosine_similarity", "relative_error", "variance_ratio")  # logged in training


def mark(batch: Batch, pad: int) -> Batch:
    """Give a batch labels [B, L + 1]. Position i counts if label i + 1 is not -100: so does the loop count tokens.

    A position is padding if it is not learned, has the id `pad`, and nothing but padding follows it.
    """
    ids = batch["input_ids"]
    filler = (batch["labels"] == IGNORE) & (ids == pad)
    trailing = filler.flip(1).long().cumprod(1).flip(1).bool()
    return {**batch, "labels": F.pad(ids.masked_fill(trailing, IGNORE), (1, 0), value=IGNORE)}


class MarkedStream(Iterator[Batch]):
    """A stream of training batches that marks each of them."""

    def __init__(self, stream: Any, pad: int) -> None:
        self.stream, self.pad = stream, pad

    def __next__(self) -> Batch:
        return mark(next(self.stream), self.pad)

    @property
    def skipped(self) -> int:
        return int(self.stream.skipped)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.stream.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


@torch.no_grad()
def real_states(decoder: BodyAndHead, batch: Batch) -> Tensor:
    """The states [N, D] of the positions of a marked batch that count."""
    return decoder.states(batch)[batch["labels"][:, 1:] != IGNORE]


def sums_of(states: Tensor, rebuilt: Tensor) -> Sums:
    """The fp64 sums over N states that `metrics` is made from. Those of two parts can be added."""
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
    """The sums over the states of both."""
    return {name: value + b[name] for name, value in a.items()}


def metrics(sums: Sums) -> Metrics:
    """The figures of the module's table, fp64; kl, top1_agreement and loss only if they were summed."""
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


class Reconstruction(Objective):
    """The objective of a compressor, over marked batches."""

    def __init__(
        self, compressor: DimensionCompressor, decoder: BodyAndHead, objective: str, metric: Tensor | None = None
    ) -> None:
        """`metric` [D, D] is M, which the objective fisher needs."""
        self.compressor, self.decoder, self.objective = compressor, decoder, objective
        if objective == "fisher":
            assert metric is not None
            ridge = RIDGE * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)
            self.metric = (metric + ridge).float().to(compressor.weight.device)

    def __call__(self, batch: Batch) -> Iterator[tuple[Loss, Metrics]]:
        states = real_states(self.decoder, batch)
        rebuilt = self.compressor(states)
        found = metrics(sums_of(states, rebuilt.detach()))
        yield self.loss(states, rebuilt), {name: found[name] for name in TRAINED_METRICS}

    def loss(self, states: Tensor, rebuilt: Tensor) -> Tensor:
        """The objective's mean over states [N, D]."""
        if self.objective == "kl":
            return compare_readings(self.decoder, states, rebuilt).loss
        difference = rebuilt - states.float()
        if self.objective == "mse":
            return difference.square().mean()
        with torch.autocast(states.device.type, enabled=False):
            return ((difference @ self.metric) * difference).sum(-1).mean() / 2

    @torch.no_grad()
    def measure(
        self, batches: Iterable[Batch], compressors: Mapping[str, DimensionCompressor]
    ) -> tuple[dict[str, Figures], int]:
        """The figures and the `loss` of each compressor on marked batches, and the number of states.

        The language model reads each batch once, for all compressors together.
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
        read = compare_readings(self.decoder, states, rebuilt)
        means = {"kl": read.kl, "top1_agreement": read.same_top1, "loss": self.loss(states, rebuilt)}
        return sums_of(states, rebuilt) | {name: value.double() * len(states) for name, value in means.items()}
