"""How tokens are chosen, with the limits of each setting, said once for every engine and interface.

The engines calculate in fp32. A number of Python may be 0 or infinity there, so the limits lie well inside fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from wrinklefree.core.errors import UserError

COLDEST = 1e-6  # lower temperatures count as 0: the likeliest token would win by far
LEAST_P = 1e-30  # a lower top_p counts as this: it keeps the likeliest token alone

# name: (lowest, highest, in words)
LIMITS: dict[str, tuple[float, float, str]] = {
    "max_new_tokens": (1, 2**31 - 1, "at least 1"),
    "temperature": (0, 1e6, "0 to 1e6"),
    "top_k": (0, 2**31 - 1, "0 or more"),
    "top_p": (5e-324, 1, "above 0 and at most 1"),
    "min_p": (0, 1, "0 to 1"),
    "repetition_penalty": (1e-6, 1e6, "1e-6 to 1e6"),
    "presence_penalty": (-2, 2, "-2 to 2"),
    "frequency_penalty": (-2, 2, "-2 to 2"),
}


class Constraint(Protocol):
    """Decides which tokens a text may go on with. It belongs to one sequence."""

    def allowed(self) -> NDArray[np.uint32]:
        """A bit for each token that may come next, the lowest first [at least vocab / 32]."""

    def accept(self, token: int) -> bool:
        """Take the next token. Returns whether the text is complete, so that nothing may follow."""

    def copy(self) -> Self:
        """Another constraint in the same state."""


def out_of_range(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """The name of the first value that is out of range, and the range in words; None if all are in range."""
    for name, (lowest, highest, words) in LIMITS.items():
        if name in values and not lowest <= values[name] <= highest:
            return name, words
    return None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    The order is: biases, repetition penalty, presence and frequency penalty, temperature, top-k, top-p, min-p.
    Temperature 0 always takes the likeliest token. top_p and repetition_penalty are off at 1, all others at 0.
    Raises UserError if a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()  # a sequence ends after one of these, which is its last token
    min_p: float = 0.0  # tokens with less than this share of the largest probability are left out
    presence_penalty: float = 0.0  # taken off the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # the same, as often as the answer has them
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # what is added to a token's logit
    logprobs: int | None = None  # tell each token's log-probability, with those of so many likeliest tokens
    constraint: Constraint | None = None  # which tokens are allowed at all
    score_prompt: bool = False  # with `logprobs`: tell the prompt's tokens, too

    def __post_init__(self) -> None:
        wrong = out_of_range(vars(self))
        if wrong is not None:
            raise UserError(f"{wrong[0]}={vars(self)[wrong[0]]}: must be {wrong[1]}")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        object.__setattr__(self, "top_p", max(self.top_p, LEAST_P))
