"""Learning-rate schedules as pure functions of progress, and what `auto` means for steps and learning rate.

The tables are the training guide's, by parameter count: learning rate 1e-4 below 500 M, 5e-5 to 2 B, 2e-5 to 7 B,
1e-5 above; tokens at the lower end of its ranges.
"""

import math
from dataclasses import dataclass

from wrinklefree.core.errors import UserError

# (parameters below, learning rate, tokens)
TABLE = [
    (500e6, 1e-4, 500_000_000),
    (2e9, 5e-5, 1_000_000_000),
    (7e9, 2e-5, 2_000_000_000),
    (math.inf, 1e-5, 5_000_000_000),
]


def wsd(progress: float, warmup: float, decay: float, floor: float) -> float:
    """Warm up linearly, stay at 1, then fall linearly to `floor` over the last `decay` of the steps."""
    if progress < warmup:
        return progress / warmup
    return 1.0 if progress <= 1 - decay else floor + (1 - floor) * (1 - progress) / decay


def cosine(progress: float, warmup: float, decay: float, floor: float) -> float:
    """Warm up linearly, then half a cosine down to `floor`."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def linear(progress: float, warmup: float, decay: float, floor: float) -> float:
    """Warm up linearly, then fall linearly to `floor`."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * (1 - progress) / (1 - warmup)


SCHEDULES = {"wsd": wsd, "cosine": cosine, "linear": linear}


def rate(name: str, step: int, max_steps: int, *, warmup: float, decay: float, floor: float) -> float:
    """The factor on the peak learning rate for optimizer step `step` (from 0) of `max_steps`.

    Progress counts half a step ahead, so that neither the first nor the last step has rate 0.
    """
    return SCHEDULES[name]((step + 0.5) / max_steps, warmup, decay, floor)


@dataclass(frozen=True)
class Choice:
    """A value and where it came from, for the log."""

    value: float
    reason: str


def choose_lr(given: float | str, num_parameters: int) -> Choice:
    """The peak learning rate: as given, or for `auto` by the guide's table."""
    if not isinstance(given, str):
        return Choice(given, "set")
    value = next(lr for limit, lr, _ in TABLE if num_parameters < limit)
    return Choice(value, f"table, {num_parameters / 1e6:.0f} M parameters")


def choose_steps(max_steps: int | None, total_tokens: int | str, num_parameters: int, tokens_per_step: int) -> Choice:
    """The number of optimizer steps: `max_steps`, else `total_tokens`' worth, for `auto` by the guide's table."""
    if max_steps is not None:
        return Choice(max_steps, "max_steps set")
    if not isinstance(total_tokens, str):
        tokens, reason = total_tokens, "total_tokens set"
    else:
        tokens = next(tokens for limit, _, tokens in TABLE if num_parameters < limit)
        reason = f"table, {num_parameters / 1e6:.0f} M parameters"
    if tokens < tokens_per_step:
        raise UserError(f"training.total_tokens={tokens} is less than one step ({tokens_per_step} tokens)")
    return Choice(tokens // tokens_per_step, f"{tokens:,} tokens, {reason}")
