"""Steps of blocks: fewer if the machine has become slower, so that all blocks end in their minutes."""

from collections.abc import Callable

import pytest

from wrinklefree.reconstruction.pace import LEAST_STEPS, BlockPace
from wrinklefree.reconstruction.rebuild import Report

BLOCKS, PLANNED, SECONDS, FIXED = 30, 60, 1200.0, 10.0  # 30 blocks of 40 s: 10 s, and 60 steps of half a second


def total(slowness: Callable[[int], float]) -> tuple[list[int], float]:
    """The steps of all blocks and the seconds they took, on a machine that is `slowness(number)` times as slow."""
    now = 0.0
    pace = BlockPace(PLANNED, SECONDS, lambda: now)
    taken, report = list[int](), None
    for number in range(BLOCKS):
        steps = pace.steps(BLOCKS - number, report)
        training, fixed = (slowness(number) * seconds for seconds in (0.5 * steps, FIXED))
        now += training + fixed
        taken.append(steps)
        report = Report(number, 1.0, 0.5, training + fixed, steps, training)
    return taken, now


def test_on_a_steady_machine_all_blocks_get_what_was_planned() -> None:
    assert total(lambda number: 1.0 + 0.02 * (number % 2))[0] == [PLANNED] * BLOCKS


@pytest.mark.parametrize("slower", [1.5, 2.0, 2.5])
def test_a_machine_that_gets_slower_ends_in_time(slower: float) -> None:
    taken, seconds = total(lambda number: slower if number >= 5 else 1.0)
    assert seconds <= 1.1 * SECONDS
    assert taken[-1] < PLANNED


def test_a_machine_that_is_free_again_gets_back_to_what_was_planned() -> None:
    taken, seconds = total(lambda number: 2.0 if 5 <= number < 10 else 1.0)
    assert min(taken) < PLANNED
    assert taken[-1] >= 0.9 * PLANNED
    assert seconds <= 1.1 * SECONDS


def test_each_block_gets_a_few_steps_however_late_it_is() -> None:
    assert min(total(lambda number: 100.0)[0]) == LEAST_STEPS


def test_without_minutes_nothing_changes() -> None:
    assert BlockPace(PLANNED).steps(3, Report(0, 1.0, 0.5, 1e9, PLANNED, 1e9)) == PLANNED
