"""Statistics of paired answers: McNemar's test is the binomial one, quantiles lie in between."""

import random

import pytest

from wrinklefree.evaluate.paired import mcnemar, quantile


def test_mcnemar_is_the_binomial_test_of_the_differences() -> None:
    assert mcnemar([True] * 10, [True] * 10) == 1
    assert mcnemar([True] * 6 + [False] * 4, [False] * 6 + [False] * 4) == pytest.approx(2 / 64)
    assert mcnemar([True] * 5 + [False] * 5, [False] * 5 + [True] * 5) == 1
    generator = random.Random(0)
    first, second = ([generator.random() < p for _ in range(200)] for p in (0.5, 0.6))
    assert mcnemar(first, second) == mcnemar(second, first)


def test_quantiles_lie_in_between() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0, 0.5, 0.75, 1)] == [1.0, 2.0, 2.5, 3.0]
    assert quantile([4.0], 0.95) == 4.0
