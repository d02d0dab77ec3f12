"""The minutes of a stage, and how many steps they suffice for.

    | loading, first evaluations | steps, evaluations, saves      | last evaluations, packing |
    start                        the training: `seconds`          `reserved`                  end of the minutes

The training may be interrupted: its seconds are counted over all processes that have worked on it. What a resumed run
loads and evaluates again before it goes on is not counted.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from wrinklefree.training.plan import Plan

Clock = Callable[[], float]  # seconds, from any beginning

STEP, EVALUATION, SAVE = "step", "evaluation", "save"


def split(minutes: float, shares: Sequence[float]) -> list[float]:
    """Split minutes between stages, in proportion to their shares. A stage without a share gets none."""
    total = sum(shares)
    return [minutes * share / total if total else 0.0 for share in shares]


@dataclass
class Pace:
    """How long steps, evaluations and saves take: the mean seconds of each."""

    clock: Clock = time.monotonic
    means: dict[str, float] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)  # since the last `settle`

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Measure the block, which does `work` once."""
        began = self.clock()
        yield
        self.recent.setdefault(work, []).append(self.clock() - began)

    def settle(self) -> None:
        """Let the means be those since the last call. Work that was not done since then keeps its mean."""
        self.means |= {work: sum(seconds) / len(seconds) for work, seconds in self.recent.items()}
        self.recent.clear()


@dataclass(frozen=True)
class Intervals:
    """Steps between evaluations and between saves."""

    evaluation: int
    save: int


@dataclass
class Budget:
    """The minutes of a stage, which began at `started`. `on_plan` is called with every plan that is chosen."""

    minutes: float
    clock: Clock
    started: float
    command: float | None = None  # minutes of the whole command, of which `minutes` are a share
    on_plan: Callable[[Plan], None] = lambda plan: None
    reserved: float = 0.0  # seconds for the work after the training
    seconds: float = math.inf  # for the training, over all processes
    before: float = 0.0  # seconds of training in earlier processes
    last_step: int = 0  # the end by the number of steps or tokens that was set; the minutes may end it earlier
    kept: bool = False  # whether a checkpoint's plan goes on
    rebuilt: bool = False  # whether blocks were rebuilt, so that a training without a step leaves something, too
    mark: int = 0  # tenths of the training after which the plan was last looked at
    began: float = 0.0  # the training, in this process

    def begin(self) -> None:
        """The training begins: it gets what is left of the minutes, unless a checkpoint said how much it gets."""
        self.began = self.clock()
        if not self.kept:
            self.seconds = 60 * self.minutes - (self.began - self.started) - self.reserved

    def spent(self) -> float:
        """The seconds since the stage started, in this process."""
        return self.clock() - self.started

    def trained(self) -> float:
        """The seconds of training so far, over all processes."""
        return self.before + self.clock() - self.began

    def state(self, plan: Plan, means: Mapping[str, float]) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "minutes": self.minutes,
            "command": self.command,
            "seconds": self.seconds,
            "trained": self.trained(),
            "last_step": self.last_step,
            "tokens_per_step": plan.tokens_per_step,
            "max_steps": plan.max_steps,
            "bend": list(plan.bend),
            "means": dict(means),
        }

    def resumed(self, plan: Plan, saved: Mapping[str, Any] | None, pace: Pace) -> Plan:
        """Take over what a checkpoint kept, and return the plan that goes on.

        If the minutes, the set number of steps and the size of a step are as they were, that is the saved plan. Else
        the rest of the steps is chosen anew, once the training begins. A share of the same command's minutes is what it
        was, although less of the command is left.
        """
        self.last_step = plan.max_steps
        if saved is None:
            return plan
        self.before = saved["trained"]
        pace.means = dict(saved["means"])
        pace.means[STEP] *= plan.tokens_per_step / saved["tokens_per_step"]
        if self.command is not None and self.command == saved["command"]:
            self.minutes = saved["minutes"]
        asked = (self.minutes, self.last_step, plan.tokens_per_step)
        self.kept = asked == (saved["minutes"], saved["last_step"], saved["tokens_per_step"])
        if self.kept:
            self.seconds = saved["seconds"]
        step, progress = saved["bend"]
        return replace(plan, max_steps=min(saved["max_steps"], self.last_step), bend=(step, progress))


def rest(step: int, last: int, means: Mapping[str, float], every: Intervals) -> float:
    """Forecast the seconds from `step` to the end of a training whose last step is `last`."""
    evaluations = _times(step, last, every.evaluation)
    saves = 1 + _times(step, last, every.save)  # and the model in final/
    return (last - step) * means[STEP] + evaluations * means[EVALUATION] + saves * means[SAVE]


def fitting(step: int, seconds: float, means: Mapping[str, float], every: Intervals) -> int:
    """The last step of a training that has `seconds` left after `step`: the largest whose `rest` fits, or else `step`.

    One more step may take less time, since evaluations and saves come at the end too, unless they are due there anyway.
    """
    average = means[STEP] + means[EVALUATION] / every.evaluation + means[SAVE] / every.save
    last = step + max(0, math.floor((seconds + means[EVALUATION] + means[SAVE]) / average))  # no more can fit
    while last > step and rest(step, last, means, every) > seconds:
        last -= 1
    return last


def _times(step: int, last: int, interval: int) -> int:
    """How often something is due after `step`, if it is due every `interval` steps and at the last one."""
    return last // interval - step // interval + (last % interval > 0)
