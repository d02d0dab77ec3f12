"""How many steps each block gets: on a machine that becomes slower, fewer, so that all blocks end in their minutes."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from wrinklefree.reconstruction.rebuild import Report

LEAST_STEPS = 8  # of a block, however late it is

TOLERANCE = 0.05  # of the seconds: so much later is not worth a change


@dataclass
class BlockPace:
    """The steps of the blocks that are still to do: `planned`, or fewer if the last block says that they take too long.

    `seconds` are for all of these blocks, from now on. There is no limit without minutes.
    """

    planned: int
    seconds: float = math.inf
    clock: Callable[[], float] = time.monotonic
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def steps(self, blocks: int, last: Report | None) -> int:
        """The steps of the next block, if `blocks` are left and `last` is the one that was done before."""
        if last is None or not last.steps or math.isinf(self.seconds):
            return self.planned
        left = (1 + TOLERANCE) * self.seconds - (self.clock() - self.began)
        fitting = (left / blocks - (last.seconds - last.training)) / (last.training / last.steps)
        return min(self.planned, max(LEAST_STEPS, math.floor(fitting)))
