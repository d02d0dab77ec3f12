"""Show the progress of long work: a bar on a terminal, lines in a file or pipe."""

import logging
import math
import time

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from wrinklefree.tracking.terminal import console, short_time

log = logging.getLogger("wrinklefree")


# Seconds between progress lines if standard output is not a terminal.
_LINE_INTERVAL = 10.0


class Clock:
    """Estimates the remaining time from the mean speed of this process since its first step."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.total_steps = total_steps
        self.first: tuple[int, float] | None = None if start_step else (0, time.monotonic())

    def remaining(self, step: int) -> str:
        """The remaining time after `step` steps as h:mm:ss, or `-:--:--` before the first step is done."""
        now = time.monotonic()
        if self.first is None or step <= self.first[0]:
            self.first = self.first or (step, now)
            return "-:--:--"
        return short_time((now - self.first[1]) / (step - self.first[0]) * (self.total_steps - step))


class Bar:
    """A progress bar on one line, which fits into 80 columns. Log lines appear above it."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        columns = (TextColumn("{task.completed}/{task.total}"), _stretching_bar(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=console(), expand=True, refresh_per_second=4)
        self.task = self.progress.add_task("starting", total=total_steps, completed=start_step)
        self.progress.start()

    def show(self, step: int, text: str) -> None:
        self.progress.update(self.task, completed=step, description=text)

    def set_total(self, total_steps: int) -> None:
        self.progress.update(self.task, total=total_steps)

    def close(self) -> None:
        self.progress.stop()


def _stretching_bar() -> BarColumn:
    return BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6))


class Lines:
    """Prints progress as a plain line about every ten seconds, and at the last step."""

    def __init__(self, total_steps: int, unit: str = "step") -> None:
        self.total_steps, self.unit = total_steps, unit
        self.printed = -math.inf

    def show(self, step: int, text: str) -> None:
        now = time.monotonic()
        if now - self.printed < _LINE_INTERVAL and step < self.total_steps:
            return
        self.printed = now
        print(f"{self.unit} {step}/{self.total_steps}  {text}", flush=True)

    def set_total(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def close(self) -> None:
        """Nothing is held open."""
