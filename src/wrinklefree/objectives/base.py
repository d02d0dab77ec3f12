"""What an objective is, and how large a share of the loss each of its terms has."""

import logging
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from wrinklefree.core.batch import Batch

log = logging.getLogger("wrinklefree")


Metrics = dict[str, Tensor]

Objective = Callable[[nn.Module, Batch], Iterator[tuple[Tensor, Metrics]]]


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
