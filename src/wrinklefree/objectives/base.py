"""What an objective is, and how large a share of the loss each of its terms has."""

import logging
from collections.abc import Iterator

from torch import Tensor

from wrinklefree.config.schema import Config, DistillationConfig
from wrinklefree.core.batch import Batch

log = logging.getLogger("wrinklefree")


Metrics = dict[str, Tensor]


class Objective:
    """Base of what a batch is trained for."""

    @classmethod
    def needs_teacher(cls, config: DistillationConfig) -> bool:
        """Whether a teacher has to run beside the student."""
        return False

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        """One line for each setting that does not go together with this objective; by default, what none but a KD
        cache's reader reads."""
        d = config.distillation
        for key, value in {"cache": d.cache, "hard_top1": d.hard_top1, "hard_full": d.hard_full}.items():
            if value:
                yield f"distillation.{key}={value}: has no effect without training.objective=cached_kd"

    def on_step(self, step: int, max_steps: int) -> None:
        """Set what follows a schedule, before optimizer step `step` (from 0) of `max_steps`."""

    def __call__(self, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        """Yield a loss, which is a mean over the batch's labelled tokens, and any number of named metrics.

        Each yield is one backward pass. Deep supervision and policy gradients yield more than once per batch.
        """
        raise TypeError(f"{type(self).__name__} must define __call__()")


class Shares:
    """Which share of the loss each term has, over the first batches; says once where one is next to nothing."""

    BATCHES, LEAST = 20, 1e-3

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.seen = 0

    def add(self, terms: dict[str, Tensor]) -> None:
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
