"""Learning rates: a linear warm-up, then the schedule that `training.scheduler.name` names."""

from collections.abc import Callable

from wrinklefree.config.schema import SchedulerConfig
from wrinklefree.core.find import SCHEDULES, find_named


def rates(settings: SchedulerConfig) -> Callable[[float], float]:
    """Return a function from the share of the training that is done to a factor on the peak learning rate.

    After the end the factor stays at its last value.

    Raises UserError if the schedule is unknown.
    """
    after: Callable[[float, SchedulerConfig], float] = find_named(SCHEDULES, settings.name)

    def rate(progress: float) -> float:
        progress = min(progress, 1.0)
        return progress / settings.warmup_ratio if progress < settings.warmup_ratio else after(progress, settings)

    return rate
