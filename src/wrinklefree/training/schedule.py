"""Learning-rate schedules as pure functions of progress."""

import math


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
