"""How long the pieces of a prompt are while other sequences wait for their token."""

import pytest

from wrinklefree.engine.pace import AGAIN, SHARE, Pace


def seconds(streams: int, read: int, per_token: float) -> float:
    """What a step takes on a machine whose time is linear."""
    return 0.01 + 0.001 * streams + per_token * read


@pytest.mark.parametrize("per_token", [1e-5, 2e-4, 1e-3, 0.1])
def test_a_piece_adds_the_share_of_a_plain_step(per_token: float) -> None:
    pace = Pace(256)
    for _ in range(100):
        read = pace.budget(2)
        pace.note(2, read, seconds(2, read, per_token))
    plain = seconds(2, 0, per_token)
    reads = [read for _ in range(20) if (read := pace.budget(2)) or pace.note(2, 0, plain)]
    wanted = min(max(SHARE * plain / per_token, 1), 256)
    assert all(0.5 * wanted <= read <= 1.5 * wanted for read in reads)


def test_without_waiting_sequences_the_whole_piece_is_read() -> None:
    assert Pace(256).budget(0) == 256


def test_a_plain_step_is_measured_for_each_number_of_sequences_and_now_and_then_again() -> None:
    pace = Pace(256)
    reads = []
    for _ in range(3 * AGAIN):
        reads.append(pace.budget(3))
        pace.note(3, reads[-1], seconds(3, reads[-1], 1e-3))
    assert reads[0] == 0
    assert reads.count(0) == 3
    assert pace.budget(4) == 0


def test_the_short_rest_of_a_prompt_does_not_make_pieces_short() -> None:
    pace = Pace(256)
    pace.note(1, 0, 0.01)
    for _ in range(20):
        pace.note(1, pace.budget(1), 0.012)  # always below what is allowed
    before = pace.budget(1)
    pace.note(1, 1, 0.0101)
    assert pace.budget(1) == before


def test_one_slow_step_is_forgotten() -> None:
    pace = Pace(256)
    for step in range(200):
        read = pace.budget(1)
        pace.note(1, read, 1.0 if step == 120 else seconds(1, read, 2e-4))
    assert pace.budget(1) >= 0.5 * SHARE * 0.011 / 2e-4
