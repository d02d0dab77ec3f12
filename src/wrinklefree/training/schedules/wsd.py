"""Stay at the peak, then fall linearly over the last `decay_ratio` of the steps."""

from wrinklefree.config.schema import SchedulerConfig


def rate(progress: float, settings: SchedulerConfig) -> float:
    """Return the learning rate, relative to the peak, at `progress` in [0, 1]. It is called after the warm-up."""
    floor, decay = settings.min_lr_ratio, settings.decay_ratio
    return 1.0 if progress <= 1 - decay else floor + (1 - floor) * (1 - progress) / decay
