"""Learning rates by step: a linear warm-up, then what the schedule of this name says."""

from collections.abc import Callable

from wrinklefree.config.schema import SchedulerConfig
from wrinklefree.core.find import SCHEDULES, find_named


def rates(settings: SchedulerConfig, max_steps: int) -> Callable[[int], float]:
    """The factor on the peak learning rate for each optimizer step (from 0) of `max_steps`.

    Progress counts half a step ahead, so that neither the first nor the last step has rate 0.
    Raises UserError for an unknown schedule.
    """
    after: Callable[[float, SchedulerConfig], float] = find_named(SCHEDULES, settings.name)

    def rate(step: int) -> float:
        progress = (step + 0.5) / max_steps
        return progress / settings.warmup_ratio if progress < settings.warmup_ratio else after(progress, settings)

    return rate
