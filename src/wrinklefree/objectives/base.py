"""The base class of objectives, and a check that no term of a loss is negligible."""

import logging
from collections.abc import Iterator

from torch import Tensor

from wrinklefree.config.schema import Config, DistillationConfig
from wrinklefree.core.batch import Batch, labelled

log = logging.getLogger("wrinklefree")


Metrics = dict[str, Tensor]

# A loss of one kind, or several terms by name. Each is a mean over what `Objective.counts` says of its name.
Loss = Tensor | dict[str, Tensor]

LOSS = "loss"  # the name of a loss without terms; every name that `counts` leaves out has its count


class Objective:
    """Base class of objectives. An objective turns a batch into losses."""

    losses_per_batch = 1  # an optimizer step each; a checkpoint is saved between batches alone

    @classmethod
    def needs_teacher(cls, config: DistillationConfig) -> bool:
        """Whether a teacher has to run beside the student; False unless a subclass says otherwise."""
        return False

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        """Yield one error line for each setting that this objective cannot use."""
        d = config.distillation
        # Only `cached_kd` reads these, and it overrides this function.
        for key, value in {"cache": d.cache, "hard_top1": d.hard_top1, "hard_full": d.hard_full}.items():
            if value:
                yield f"distillation.{key}={value}: has no effect without training.objective=cached_kd"

    def on_step(self, step: int, max_steps: int) -> None:
        """Update whatever follows a schedule. Called before optimizer step `step` (from 0) of `max_steps`."""

    def prepare(self, batch: Batch) -> Batch:
        """Add what has to be known before the loss, such as sampled answers; by default nothing.

        The loop calls this once per batch, without gradients, and passes the result to `counts` and `__call__`.
        """
        return batch

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many things each term and each metric is a mean over in this batch, from the batch alone.

        The loop adds the counts of all micro-batches and processes before it divides. So a step has the same loss and
        gradient however it is cut. `loss` serves every name that is not listed; by default it counts labelled tokens.
        """
        return {LOSS: labelled(batch).sum()}

    def __call__(self, batch: Batch) -> Iterator[tuple[Loss, Metrics]]:
        """Yield pairs of a loss and its named metrics. Each is a mean over as many things as `counts` says.

        The optimizer takes one step per yield. Deep supervision and policy gradients yield more than once per batch,
        and equally often for every batch.
        """
        raise TypeError(f"{type(self).__name__} must define __call__()")


def terms_of(loss: Loss) -> dict[str, Tensor]:
    """Return the terms of a loss by name."""
    return loss if isinstance(loss, dict) else {LOSS: loss}


class Shares:
    """Sums the terms of a loss over the first batches, and warns once about each term with almost no share."""

    BATCHES = 20  # summed before the report
    LEAST = 1e-3  # share of the loss below which a term is reported

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.seen = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add one batch's weighted terms (scalars). Once enough batches are in, calls have no effect."""
        if self.seen == self.BATCHES or len(terms) < 2:
            return
        self.seen += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()
        if self.seen == self.BATCHES:
            self._report()

    def _report(self) -> None:
        total = sum(self.sums.values())
        for name, value in self.sums.items():
            if value < self.LEAST * total:
                log.warning(
                    "the %s term is %.2g %% of the loss: raise its weight under distillation, or leave it out",
                    name,
                    100 * value / total,
                )
