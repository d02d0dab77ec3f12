"""Fall linearly from the warm-up to the end."""

from wrinklefree.config.schema import SchedulerConfig


def rate(progress: float, settings: SchedulerConfig) -> float:
    """Return the learning rate, relative to the peak, at `progress` in [0, 1]. It is called after the warm-up."""
    floor, warmup = settings.min_lr_ratio, settings.warmup_ratio
    return floor + (1 - floor) * (1 - progress) / (1 - warmup)
