"""The pass over text that compressors are solved from: second moments of hidden states, for fisher the head's metric.

Each process reads its rows of the same blocks, and all of them add up their sums. The result is kept beside the
compressor in `moments.safetensors`, so that stage 1b can mix it with the moments of thoughts:

    count  fp64 []         total  fp64 [D]        outer  fp64 [D, D]        metric  fp64 [D, D], for fisher alone

While it runs, each process keeps its sums so far in `.moments.RANK.safetensors`. An interrupted pass goes on from there
and gives the same bits as an unbroken one.
"""

import json
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside
from wrinklefree.core.numbers import check_tensor
from wrinklefree.distributed.world import World, any_of, gather
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.objectives.losses import CHUNK
from wrinklefree.thinking.moments import Fisher, Moments, tied_code, weighted_code
from wrinklefree.thinking.network import DimensionCompressor
from wrinklefree.thinking.reconstruction import MarkedStream, real_states
from wrinklefree.tracking.progress import Lines
from wrinklefree.tracking.terminal import short_number

log = logging.getLogger("wrinklefree")

FILE = "moments.safetensors"
KEPT_SECONDS = 30.0  # between two files of the sums so far
SHARES = (0.9, 0.95, 0.99)  # of the energy; the log says how many dimensions have that much


class Code(NamedTuple):
    """The best encoder and decoder, fp64 [D, D]. Those of size D' are the first D' rows of each."""

    encoder: Tensor
    decoder: Tensor

    @torch.no_grad()
    def put(self, compressor: DimensionCompressor) -> DimensionCompressor:
        """Set the weights of a compressor of any size; a tied one takes the encoder."""
        size = len(compressor.weight)
        compressor.weight.copy_(self.encoder[:size])
        if compressor.decoder is not None:
            compressor.decoder.copy_(self.decoder[:size])
        return compressor

    def mse(self, moments: Moments, size: int) -> float:
        """The mean squared error of size D' on the states that the moments were taken from."""
        second, encoder, decoder = moments.second, self.encoder[:size], self.decoder[:size]
        seen = encoder @ second
        error = second.trace() - 2 * (seen * decoder).sum() + ((seen @ encoder.T) * (decoder @ decoder.T)).sum()
        return float(error.clamp(min=0) / len(second))


@dataclass(frozen=True, eq=False)
class Gathered:
    """Moments of states, and for fisher the sum over states of the head's Fisher matrix."""

    moments: Moments
    metric: Tensor | None = None

    @property
    def mean_metric(self) -> Tensor | None:
        """The mean Fisher matrix, fp64 [D, D]."""
        return None if self.metric is None else self.metric / self.moments.count

    @cached_property
    def pca(self) -> Code:
        """The code of the least squared error."""
        axes = tied_code(self.moments, len(self.moments.total))
        return Code(axes, axes)

    @cached_property
    def fisher(self) -> Code:
        """The code of the least error in the head's metric."""
        metric = self.mean_metric
        assert metric is not None
        return Code(*weighted_code(self.moments, metric, len(metric)))

    def solve(self, objective: str) -> Code:
        """The best code for an objective. The objective kl has no closed form: training begins with the PCA."""
        return self.fisher if objective == "fisher" else self.pca

    def mixed(self, other: "Gathered", share: float) -> "Gathered":
        """Both together, so weighted that the other has `share` of all states, whatever their numbers are."""
        a, b = (1 - share) / float(self.moments.count), share / float(other.moments.count)
        metric = None
        if self.metric is not None and other.metric is not None:
            metric = a * self.metric + b * other.metric
        return Gathered(self.moments.scaled(a) + other.moments.scaled(b), metric)

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        m = self.moments
        tensors = {"count": m.count, "total": m.total, "outer": m.outer}
        with file_aside(folder / FILE) as aside:
            save_file(tensors | ({} if self.metric is None else {"metric": self.metric}), aside)


def read_gathered(folder: Path) -> Gathered:
    """What a pass left beside the compressor in `folder`. Raises UserError if it is missing or broken."""
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{file}: missing, and stage 1b goes on from it: run stage 1a again")
    try:
        tensors = load_file(file)
        moments = Moments(tensors["count"], tensors["total"], tensors["outer"])
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{file}: broken ({error}): run stage 1a again") from error
    width = moments.total.numel()
    shapes = {"count": (), "total": (width,), "outer": (width, width), "metric": (width, width)}
    for name in shapes.keys() & tensors.keys():
        check_tensor(str(file), name, tensors[name], torch.float64, shapes[name])
    for name in {"outer", "metric"} & tensors.keys():
        _check_moments(file, name, tensors[name])
    if moments.count < 1:
        raise UserError(f"{file}: the moments of {float(moments.count):g} states: run stage 1a again")
    return Gathered(moments, tensors.get("metric"))


def _check_moments(file: Path, name: str, matrix: Tensor) -> None:
    """Raises UserError for a matrix that is no sum of outer products: not symmetric, or with a negative diagonal."""
    scale = matrix.abs().max()
    if not matrix.diagonal().min() >= -1e-6 * scale or not (matrix - matrix.T).abs().max() <= 1e-6 * scale:
        raise UserError(f"{file}: {name} is no matrix of second moments: run stage 1a again")


def gather_moments(
    decoder: BodyAndHead,
    stream: MarkedStream,
    world: World,
    *,
    blocks: int,
    batch_size: int,
    width: int,
    weighted: bool,
    kept: Path,
    identity: str,
) -> Gathered:
    """The moments of `blocks` blocks of the stream, at most one epoch of it; with `weighted` the head's metric too.

    Every process has to call it, and each gets the sum of all. The sums so far are kept in the folder `kept`. A pass
    with the same `identity` goes on from them.
    """
    moments = Moments.zeros(width)
    fisher = Fisher(decoder.project(torch.zeros(1, width, device=world.device))[1]) if weighted else None
    num_batches = -(-blocks // (world.size * batch_size))
    lines = Lines(num_batches, unit="moments: batch")
    partial = Partial(_kept(kept, world), identity, moments, fisher, stream)
    for number in range(partial.go_on(world), num_batches):
        if stream.state_dict()["epoch"]:  # an interrupted pass had come to the end
            break
        batch = next(stream)
        mine = min(max(0, blocks - (number * world.size + world.rank) * batch_size), batch_size)
        if mine:
            here = {name: tensor[:mine].to(world.device) for name, tensor in batch.items()}
            _add(moments, fisher, decoder, here)
        if world.is_main:
            lines.show(number + 1, f"{short_number(float(moments.count) * world.size)} tokens")
        partial.keep(number + 1, world)
        if stream.state_dict()["epoch"]:
            log.info("the text ends here: moments of all of it")
            break
    found = _summed(Gathered(moments, None if fisher is None else fisher.total), world)
    log_energy(found.moments)
    return found


def _summed(found: Gathered, world: World) -> Gathered:
    """Add up what all processes found, in place, and return it."""
    moments = found.moments
    for part in (moments.count, moments.total, moments.outer, found.metric):
        if world.size > 1 and part is not None:
            dist.all_reduce(part)
    return found


def forget(folder: Path, world: World) -> None:
    """Remove the sums that a pass has kept in `folder`."""
    _kept(folder, world).unlink(missing_ok=True)


def _kept(folder: Path, world: World) -> Path:
    return folder / f".moments.{world.rank}.safetensors"


class Partial:
    """The sums of a pass so far, in a file that an interrupted pass goes on from."""

    def __init__(
        self, file: Path, identity: str, moments: Moments, fisher: Fisher | None, stream: MarkedStream
    ) -> None:
        self.file, self.identity, self.stream = file, identity, stream
        self.sums = {"count": moments.count, "total": moments.total, "outer": moments.outer}
        if fisher is not None:
            self.sums |= {"probabilities": fisher.probabilities, "means": fisher.means}
        self.written = time.monotonic()

    def go_on(self, world: World) -> int:
        """Take over the sums of an interrupted pass. Returns how many batches they are of; 0 if there are none."""
        kept = gather(self._read(), world)
        if any(number != kept[0] for number in kept) or not kept[0]:
            return 0
        number, position = kept[0]
        try:
            self.stream.load_state_dict(position)
        except UserError:
            log.info("moments: the text has changed since an interrupted pass, so all of it is read again")
            return 0
        for name, tensor in load_file(self.file).items():
            self.sums[name].copy_(tensor)
        log.info("moments: going on after batch %d of an interrupted pass", number)
        return int(number)

    def keep(self, number: int, world: World) -> None:
        """Write the sums of `number` batches, if the last time was long ago."""
        if not any_of(time.monotonic() - self.written > KEPT_SECONDS, world):  # all processes write, or none does
            return
        facts = {"identity": self.identity, "batch": number, "stream": self.stream.state_dict()}
        with file_aside(self.file) as aside:
            save_file(self.sums, aside, metadata={"facts": json.dumps(facts)})
        self.written = time.monotonic()

    def _read(self) -> tuple[int, dict[str, Any]] | None:
        """The number of batches and the position in the file; None if there is none of this pass."""
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
        except (SafetensorError, ValueError, LookupError, TypeError):
            return None
        return (facts["batch"], facts["stream"]) if facts["identity"] == self.identity else None


@torch.no_grad()
def _add(moments: Moments, fisher: Fisher | None, decoder: BodyAndHead, batch: Batch) -> None:
    states = real_states(decoder, batch)
    with torch.autocast(states.device.type, enabled=False):  # products in fp32, whatever the model computes in
        moments.add(states)
    if fisher is not None:
        for part in states.split(CHUNK):
            fisher.add(decoder.project(part)[0])


def log_energy(moments: Moments) -> None:
    """Log how many dimensions have most of the energy."""
    values = torch.linalg.eigvalsh(moments.second).flip(0).clamp(min=0)
    needed = torch.searchsorted(values.cumsum(0) / values.sum(), torch.tensor(SHARES, dtype=torch.float64)) + 1
    shares = ", ".join(f"{s:.0%} in {min(int(n), len(values))}" for s, n in zip(SHARES, needed, strict=True))
    log.info("%s states of %d dimensions; energy %s", f"{int(moments.count):,}", len(values), shares)
