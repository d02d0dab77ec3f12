"""Sizes that a user writes."""

import pytest

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import parse_bytes

SIZES = {
    **{"4GB": 4 * 10**9, "500 mb": 5 * 10**8, "1.5g": 15 * 10**8, "7": 7},
    **{"60MB": 60_000_000, "1.5GB": 1_500_000_000, "800kB": 800_000, "9": 9},
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text: str) -> None:
    assert parse_bytes("--max-memory", text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "4 PB", "1e9", "60 miles", "-1MB", "nanMB", "1e400MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--max-memory .*no size; write 500MB or 4GB"):
        parse_bytes("--max-memory", text)
