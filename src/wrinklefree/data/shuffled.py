"""Rows of a fixed set in batches without end, each epoch in a new order, from any exact position."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError


class ShuffledStream(Iterator[Batch]):
    """Batches of rows, each epoch shuffled by (seed, epoch).

    All processes walk one order, and process `rank` keeps its `batch_size` rows of each global batch, as `BatchStream`.
    """

    def __init__(
        self,
        count: int,
        batch: Callable[[list[int]], Batch],
        *,
        identity: dict[str, Any],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch` makes one of row numbers below `count`; a position means something under one `identity` alone."""
        self._count, self._batch, self._batch_size = count, batch, batch_size
        self._rank, self._world_size = rank, world_size
        self._identity = {**identity, "seed": seed}
        self._epoch = self._place = 0
        self._order: list[int] = []  # of this epoch; empty until it is asked for

    def __next__(self) -> Batch:
        rows = [self._next_row() for _ in range(self._world_size * self._batch_size)]
        first = self._rank * self._batch_size
        return self._batch(rows[first : first + self._batch_size])

    def state_dict(self) -> dict[str, Any]:
        """The exact position, in plain values, the same in every process."""
        return {**self._identity, "epoch": self._epoch, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises UserError where it was saved under another identity or seed."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise UserError(
                    f"data position was saved with {key}={state.get(key)!r}, this run has {value!r}: "
                    f"resume with the same data and seed, or start anew from the checkpoint's weights"
                )
        self._epoch, self._place, self._order = state["epoch"], state["place"], []

    def _next_row(self) -> int:
        if self._place == self._count:
            self._epoch, self._place, self._order = self._epoch + 1, 0, []
        if not self._order:
            self._order = list(range(self._count))
            random.Random(f"{self._identity['seed']} {self._epoch}").shuffle(self._order)
        self._place += 1
        return self._order[self._place - 1]
