"""Two ways of answering the same questions: is one of them better, or was it chance?"""

import math
from collections.abc import Sequence


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The two-sided exact McNemar p of two lists of right answers to the same questions.

    Of the questions that only one of the two got right, each is a coin toss where both are equally good.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    tosses = only_first + only_second
    tail = sum(math.comb(tosses, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, in between two of them where need be."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
