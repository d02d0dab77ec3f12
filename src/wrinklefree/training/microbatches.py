"""The micro-batches of one optimizer step, whose loss and gradient do not depend on how the step is cut.

A term k of the loss is a mean over some count of things: labelled tokens, related tokens, sequences, answers.
Micro-batch i has the mean m_ik over n_ik things, and N_k = sum_i n_ik over all micro-batches of all processes. The
step's loss is

    sum_k sum_i m_ik n_ik / N_k

The N_k are known before the first forward pass, because the objective counts from the batches alone.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import DataError, UserError
from wrinklefree.distributed.world import World, any_of, gather, sum_over_processes
from wrinklefree.objectives.base import LOSS, Loss, Metrics, Objective, terms_of
from wrinklefree.training.state import TrainingState

Yielded = tuple[Loss, Metrics] | None  # None once an objective has no more losses for its batch


class Weighed(NamedTuple):
    """What one micro-batch adds to its step."""

    loss: Tensor  # to call backward() on; the step's gradient is the sum of these, divided by `Step.count`
    sums: dict[str, Tensor]  # the loss and the metrics, each times its count


class Step:
    """The micro-batches of one process for one optimizer step; for several if the objective yields several losses."""

    def __init__(self, run: TrainingState, batches: list[Batch]) -> None:
        """Count what the terms are means over, here and in all processes. Every process has to call this."""
        self.run = run
        self.first: Yielded = None
        self.batches = [self._prepared(batch) for batch in batches]
        self.counts = [{name: float(count) for name, count in run.objective.counts(b).items()} for b in self.batches]
        sums = {name: torch.tensor(sum(c[name] for c in self.counts)).double() for name in self.counts[0]}
        self.totals = {name: max(1.0, total) for name, total in sum_over_processes(sums, run.world).items()}
        self.results = [run.objective(batch) for batch in self.batches]

    @property
    def count(self) -> float:
        """N of a loss without terms; 1 if nothing is labelled."""
        return self.totals[LOSS]

    def advance(self) -> bool:
        """Begin an optimizer step with the first micro-batch's loss. False if the objective has no more losses.

        Raises TypeError if it has more for other micro-batches: then there is no telling what belongs together.
        """
        self.first = self._next(0)
        if self.first is None and any(self._next(i) is not None for i in range(1, len(self.results))):
            raise TypeError(f"{type(self.run.objective).__name__} yields more losses for some batches than for others")
        return self.first is not None

    def __iter__(self) -> Iterator[Weighed]:
        """Yield one micro-batch after the other; the forward pass of the next follows the caller's backward pass."""
        for i in range(len(self.results)):
            yielded = self.first if i == 0 else self._next(i)
            self.first = None  # so that its graph can be freed
            if yielded is None:
                raise TypeError(f"{type(self.run.objective).__name__} yields fewer losses for some batches")
            yield self._weighed(i, *yielded)

    def means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Turn sums over the micro-batches of this process into means over those of all processes."""
        totals = sum_over_processes(sums, self.run.world)
        return {name: value / self.totals.get(name, self.count) for name, value in totals.items()}

    def _prepared(self, batch: Batch) -> Batch:
        run = self.run
        here = {name: tensor.to(run.world.device) for name, tensor in batch.items()}
        if type(run.objective).prepare is Objective.prepare:
            return here  # without gathering a sharded model for nothing
        with run.autocast(), torch.no_grad():
            return run.placement.with_whole_parameters(partial(run.objective.prepare, here))

    def _next(self, i: int) -> Yielded:
        self.run.last_batch = self.batches[i]
        with self.run.autocast():  # backward runs outside of autocast
            return self.run.placement.with_whole_parameters(partial(next, self.results[i], None))

    def _weighed(self, i: int, loss: Loss, metrics: Metrics) -> Weighed:
        """Multiply each term by n N_loss / N, so that dividing the sum by N_loss gives n / N."""
        terms, count = terms_of(loss), self.counts[i]
        shares = {k: count.get(k, count[LOSS]) * (self.count / self.totals.get(k, self.count)) for k in terms}
        sums = {LOSS: torch.stack([term.detach().double() * shares[k] for k, term in terms.items()]).sum()}
        sums |= {name: value.double() * count.get(name, count[LOSS]) for name, value in metrics.items()}
        return Weighed(torch.stack([term.float() * shares[k] for k, term in terms.items()]).sum(), sums)


def steps(run: TrainingState) -> Iterator[Step]:
    """Yield one entry per optimizer step. A `Step` comes again as often as the objective yields losses.

    Raises DataError if the data cannot be read on.
    """
    stream = iter(run.stream)
    while batches := read(stream, run.training.gradient_accumulation_steps, run.world):
        step = Step(run, batches)
        while step.advance():
            yield step


def read(stream: Iterator[Batch], number: int, world: World) -> list[Batch]:
    """The next batches of a stream. Raises DataError, in all processes, if one of them cannot read on."""
    batches, problem = [], None
    try:
        batches = list(islice(stream, number))
    except UserError as error:
        problem = str(error)
    if any_of(problem is not None, world):  # the others would wait for this one for ever
        raise DataError(next(text for text in gather(problem, world) if text is not None))
    return batches
