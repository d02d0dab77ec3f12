"""Batches from a fixed set of rows, without end and shuffled anew in each epoch, with an exact position to resume."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.data.identity import check_same


class ShuffledStream(Iterator[Batch]):
    """Batches of rows, without end; each epoch is shuffled by (seed, epoch).

    All processes follow one order. Process `rank` takes its own `batch_size` rows from each global batch.
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
        allow_changes: bool = False,
    ) -> None:
        """`batch` makes a batch from row numbers below `count`.

        `identity` says what the rows are, in plain values. A position under another is refused, unless `allow_changes`.
        """
        self._count, self._batch, self._batch_size = count, batch, batch_size
        self._rank, self._world_size = rank, world_size
        self._identity, self._allow_changes = {**identity, "seed": seed}, allow_changes
        self._epoch = self._place = 0
        self._order: list[int] = []  # of this epoch; empty until it is asked for

    @property
    def skipped(self) -> int:
        """How many bad rows were left out: none, since these rows were all written by this program."""
        return 0

    def __next__(self) -> Batch:
        """Return this process's rows of the next global batch. If they cannot be read, the position stays."""
        before = self._epoch, self._place
        rows = [self._next_row() for _ in range(self._world_size * self._batch_size)]
        first = self._rank * self._batch_size
        try:
            return self._batch(rows[first : first + self._batch_size])
        except UserError:
            self._epoch, self._place, self._order = *before, []
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position in plain values. It is the same in every process."""
        return {**self._identity, "epoch": self._epoch, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises UserError if it was saved with another identity or seed, unless changes are allowed. Then it goes to the
        same place in the new order, or to the next epoch if there are fewer rows.
        """
        check_same({key: state.get(key) for key in self._identity}, self._identity, self._allow_changes)
        # A position in data of another kind has no place.
        self._epoch, self._place, self._order = state.get("epoch", 0), min(state.get("place", 0), self._count), []

    def _next_row(self) -> int:
        if self._place == self._count:
            self._epoch, self._place, self._order = self._epoch + 1, 0, []
        if not self._order:
            self._order = list(range(self._count))
            random.Random(f"{self._identity['seed']} {self._epoch}").shuffle(self._order)
        self._place += 1
        return self._order[self._place - 1]
