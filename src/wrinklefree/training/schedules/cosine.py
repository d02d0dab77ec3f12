"""Fall along half a cosine from the warm-up to the end."""

import math

from wrinklefree.config.schema import SchedulerConfig


def rate(progress: float, settings: SchedulerConfig) -> float:
    """Return the learning rate, relative to the peak, at `progress` in [0, 1]. It is called after the warm-up."""
    floor, warmup = settings.min_lr_ratio, settings.warmup_ratio
    return floor + (1 - floor) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
