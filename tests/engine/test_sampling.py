"""Settings of sampling are checked as the engines read them: in fp32."""

import numpy as np
import pytest

from wrinklefree.core.errors import UserError
from wrinklefree.engine.sampling import LIMITS, Sampling, out_of_range


def test_values_that_fp32_does_not_know_count_as_the_nearest_that_means_the_same() -> None:
    assert Sampling(temperature=1e-40).temperature == Sampling(temperature=5e-324).temperature == 0
    assert Sampling(temperature=1e-3).temperature == 1e-3
    assert np.float32(Sampling(top_p=1e-46).top_p) > 0
    assert Sampling(top_p=0.5).top_p == 0.5


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_are_numbers_in_fp32_and_what_lies_beyond_is_refused(name: str) -> None:
    lowest, highest, words = LIMITS[name]
    for edge in (lowest, highest):
        assert np.isfinite(np.float32(getattr(Sampling(**{name: edge}), name)))
    for beyond in (np.nextafter(lowest, -np.inf), np.nextafter(highest, np.inf), float("nan"), float("inf"), 1e39):
        assert out_of_range({name: beyond}) == (name, words)
        with pytest.raises(UserError, match=f"{name}="):
            Sampling(**{name: float(beyond)})
