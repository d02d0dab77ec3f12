"""Learning rates by step: a linear warm-up, then the schedule that `training.scheduler.name` names."""

from collections.abc import Callable

from wrinklefree.config.schema import SchedulerConfig
from wrinklefree.core.find import SCHEDULES, find_named


def rates(settings: SchedulerConfig, max_steps: int) -> Callable[[int], float]:
    """Return a function from an optimizer step (0 to `max_steps` - 1) to its factor on the peak learning rate.

    Raises UserError if the schedule is unknown.
    """
    after: Callable[[float, SchedulerConfig], float] = find_named(SCHEDULES, settings.name)

    def rate(step: int) -> float:
        progress = (step + 0.5) / max_steps  # the middle of the step: at its ends the first or the last rate would be 0
        return progress / settings.warmup_ratio if progress < settings.warmup_ratio else after(progress, settings)

    return rate
