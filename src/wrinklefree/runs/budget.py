"""The minutes of a command: what `--budget` says, or else what a command on a CPU gets.

The stages that are still to run share what is left. It is split anew before each of them, so a stage that is done, or
that needs less than its share, gives the rest to the later ones.
"""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wrinklefree.config.compose import all_settings
from wrinklefree.config.groups import CONFIGS
from wrinklefree.config.schema import Config
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.distributed.world import own_device
from wrinklefree.tracking.terminal import spoken_time
from wrinklefree.training.budget import Clock, split
from wrinklefree.training.plan import CPU_MINUTES, MAX_LENGTH_IN_MINUTES

log = logging.getLogger("wrinklefree")

TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")

# Settings that say how long a stage is. A budget that nobody asked for leaves such a stage alone.
LENGTHS = ("training.max_steps", "training.total_tokens", "training.max_minutes")

# Some trainings have steps that take a GPU a second, and a CPU many minutes. A budget on a CPU makes them smaller.
STEP_SIZE = ("training.batch_size", "training.gradient_accumulation_steps")
MOST_TOKENS, TOKENS = 8192, 2048  # of a step: if there are more, it gets so many


def parse_minutes(text: str) -> float:
    """Read `2h`, `90m`, `1h30m` or `45s`, and return minutes. Raises UserError for anything else, and for no time."""
    found = TIME.fullmatch(text.strip().lower())
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0.0, 0.0, 0.0)
    total = 60 * hours + minutes + seconds / 60
    if not total:
        raise UserError(f"--budget {text}: not a length of time; write 2h, 90m, 1h30m or 45s")
    return total


@dataclass
class CommandBudget:
    """The minutes of a whole command. `asked` says whether the user gave them."""

    minutes: float
    asked: bool
    clock: Clock
    started: float

    def left(self) -> float:
        """The minutes that are left."""
        return self.minutes - (self.clock() - self.started) / 60

    def share(self, overrides: Sequence[str], config: Config) -> float:
        """The share of a stage: none if it trains nothing, or if a default would overrule what was set."""
        t = config.training
        if not t.takes_time or (not self.asked and (t.max_steps == 0 or says_how_long(overrides))):
            return 0.0
        return config.training.budget_share

    def settings(self, overrides: Sequence[str], config: Config, later: Sequence[float]) -> list[str]:
        """The settings that give a stage its minutes; `later` are the shares of the stages after it.

        Raises UserError if no time is left.
        """
        share = self.share(overrides, config)
        if not share:
            return []
        left = self.left()
        if left <= 0:
            raise UserError(
                f"--budget: the {spoken_time(60 * self.minutes)} are over before {config.training.stage}: the same "
                f"command goes on where it has stopped"
            )
        minutes = split(left, [share, *later])[0]
        if isinstance(config.training.max_minutes, float | int):
            minutes = min(minutes, config.training.max_minutes)
        ours = [setting("training.max_minutes", minutes), setting("training.budget_minutes", self.minutes)]
        return ours + smaller_steps(overrides, config)

    def say(self, shares: Mapping[str, float]) -> None:
        """Log the minutes of the stages that are still to run, whose shares are given by name."""
        if not any(shares.values()):
            return
        if not self.asked:
            log.info(
                "on a CPU this takes %s, unless you say otherwise: --budget 8h, training.total_tokens=N or "
                "training.max_steps=N",
                spoken_time(60 * self.minutes),
            )
        minutes = split(self.left(), list(shares.values()))
        parts = [f"{name} {spoken_time(60 * part)}" for name, part in zip(shares, minutes, strict=True) if part]
        log.info("budget of %s: %s", spoken_time(60 * self.minutes), ", ".join(parts))


def command_budget(text: str | None, model: Config, clock: Clock = time.monotonic) -> CommandBudget | None:
    """The budget of a command that starts now; `model` is the config of any of its stages.

    Without `--budget`, a command has one on a CPU, but not if the model's config says by itself how long a stage is.
    """
    if text is not None:
        return CommandBudget(parse_minutes(text), True, clock, clock())
    if own_device().type != "cpu" or model.model.auto_minutes is not None:
        return None
    return CommandBudget(CPU_MINUTES, False, clock, clock())


def smaller_steps(overrides: Sequence[str], config: Config) -> list[str]:
    """The settings for steps that suit a CPU, unless the user has set their size or this is no CPU."""
    t = config.training
    length = MAX_LENGTH_IN_MINUTES if isinstance(t.max_seq_length, str) else t.max_seq_length
    is_set = any(key in STEP_SIZE for key, _ in all_settings(list(overrides)))
    if is_set or own_device().type != "cpu" or t.batch_size * t.gradient_accumulation_steps * length <= MOST_TOKENS:
        return []
    return [setting(key, value) for key, value in zip(STEP_SIZE, (max(1, TOKENS // length), 1), strict=True)]


def says_how_long(overrides: Sequence[str]) -> bool:
    """Whether the user has set how long a stage is, by a setting or in a training file of their own."""
    settings = all_settings(list(overrides))
    trainings = [value for key, value in settings if key == "training"]
    own = bool(trainings) and not (CONFIGS / "training" / f"{trainings[-1]}.yaml").is_file()
    return own or any(key in LENGTHS for key, _ in settings)
