"""Resolves the settings that may be `auto`: steps, learning rate, precision, sequence length."""

import logging
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from wrinklefree.config.base import LARGEST
from wrinklefree.config.schema import ModelConfig, TrainingConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.manifest import read_manifest
from wrinklefree.distributed.world import World, has_bf16
from wrinklefree.families.architectures import positions
from wrinklefree.tracking.terminal import spoken_time

log = logging.getLogger("wrinklefree")

MAX_LENGTH = 2048  # tokens, the most that `training.max_seq_length: auto` chooses
MAX_LENGTH_IN_MINUTES = 512  # the same if minutes end the training: shorter steps, and so more of them

CPU_MINUTES = 120.0  # of a training on a CPU, if neither the user nor the model's config says how long

UNLIMITED = LARGEST - 1  # steps of a plan that nothing but its minutes ends

# The training guide's table: (fewer parameters than, learning rate, tokens). It gives ranges of tokens; these are
# their lower ends.
TABLE = [
    (500e6, 1e-4, 500_000_000),
    (2e9, 5e-5, 1_000_000_000),
    (7e9, 2e-5, 2_000_000_000),
    (math.inf, 1e-5, 5_000_000_000),
]


@dataclass(frozen=True)
class Resolved:
    """A value, and for the log the reason why it was chosen."""

    value: float
    reason: str


def choose_lr(setting: float | str, num_parameters: int) -> Resolved:
    """Return the peak learning rate: `setting`, or if that is `auto`, the one in `TABLE`."""
    if not isinstance(setting, str):
        return Resolved(setting, "set")
    value = next(lr for limit, lr, _ in TABLE if num_parameters < limit)
    return Resolved(value, f"table, {num_parameters / 1e6:.0f} M parameters")


def choose_tokens(setting: int | str, num_parameters: int, model: ModelConfig) -> Resolved:
    """Return the number of tokens to train on.

    That is `setting`; if it is `auto`, what the model's config says; if that says nothing, the number in `TABLE`.
    """
    if not isinstance(setting, str):
        return Resolved(setting, "total_tokens set")
    if model.auto_tokens is not None:
        return Resolved(model.auto_tokens, f"model={model.name}")
    value = next(tokens for limit, _, tokens in TABLE if num_parameters < limit)
    return Resolved(value, f"table, {num_parameters / 1e6:.0f} M parameters")


def choose_minutes(t: TrainingConfig, model: ModelConfig, device: torch.device) -> Resolved | None:
    """Return how many minutes the stage may take, or None if only steps or tokens end it.

    That is `training.max_minutes`. If it is `auto`, a stage on a CPU has a limit if nothing says how many steps or
    tokens it trains on: what the model's config says, or else `CPU_MINUTES`.
    """
    if not t.takes_time or t.max_minutes is None:
        return None
    if not isinstance(t.max_minutes, str):
        return Resolved(t.max_minutes, "max_minutes set")
    if device.type != "cpu" or t.max_steps is not None or t.total_tokens != "auto":
        return None
    if model.auto_minutes is not None:
        return Resolved(model.auto_minutes, f"model={model.name} on a CPU")
    return Resolved(CPU_MINUTES, "on a CPU")


def choose_steps(max_steps: int | None, tokens: Resolved, tokens_per_step: int) -> Resolved:
    """Return the number of optimizer steps: `max_steps`, or if that is None, as many as `tokens` suffice for.

    Raises UserError if they do not suffice for one.
    """
    if max_steps is not None:
        return Resolved(max_steps, "max_steps set")
    total = int(tokens.value)
    if total < tokens_per_step:
        raise UserError(f"training.total_tokens={total} is less than one step ({tokens_per_step} tokens)")
    return Resolved(total // tokens_per_step, f"{total:,} tokens, {tokens.reason}")


@dataclass(frozen=True)
class Plan:
    """The settings of a training after `auto` was resolved."""

    max_steps: int
    lr: float
    dtype: torch.dtype  # of the matrix products; weights and optimizer state are fp32
    length: int  # tokens in a sequence
    tokens_per_step: int  # all processes together
    total_tokens: int | None = None  # if the user gave tokens: the training ends with them, however a step is cut
    minutes: float | None = None  # of the whole stage; `max_steps` may be lowered to fit them
    bend: tuple[int, float] = (0, 0.0)  # the step at which the end was last changed, and the progress there

    def resumed(self, step: int, tokens: int) -> "Plan":
        """The plan of a run that has taken `step` steps over `tokens` tokens, which may have been of another size."""
        if self.total_tokens is None:
            return self
        left = max(0, self.total_tokens - tokens) // self.tokens_per_step
        return replace(self, max_steps=step + left)

    def progress(self, step: int, tokens: int) -> float:
        """The share of the training that is done in the middle of the step after `step` steps over `tokens` tokens.

        In the middle, because at the ends of a step the first or the last learning rate would be 0.
        """
        if self.total_tokens is None or self.minutes is not None:
            return self._progress_at(step + 0.5)
        end = tokens + (self.max_steps - step) * self.tokens_per_step
        return (tokens + 0.5 * self.tokens_per_step) / end

    def ending(self, step: int, max_steps: int) -> "Plan":
        """The plan that goes on from `step` with another end. The progress is the same there, and 1 at the new end."""
        return replace(self, max_steps=max_steps, bend=(step, self._progress_at(step)))

    def _progress_at(self, place: float) -> float:
        step, done = self.bend
        return done + (1 - done) * (place - step) / (self.max_steps - step)

    def autocast(self, device: torch.device, cached: bool = True) -> AbstractContextManager[Any]:
        """Compute matrix products in `dtype` while the block runs; `cached` keeps a copy of each plain weight in it."""
        on = self.dtype != torch.float32
        return torch.autocast(device.type, self.dtype, enabled=on, cache_enabled=cached)


def make_plan(t: TrainingConfig, config: ModelConfig, model: PreTrainedModel, length: int, world: World) -> Plan:
    """Resolve every `auto`, and log what was chosen and why."""
    num_parameters = model.num_parameters()
    per_step = t.batch_size * length * t.gradient_accumulation_steps * world.size
    minutes = choose_minutes(t, config, world.device)
    lr = choose_lr(t.optimizer.lr, num_parameters)
    log.info("learning rate %g (%s)", lr.value, lr.reason)
    if minutes is not None:
        told = (spoken_time(60 * minutes.value), minutes.reason)
        log.info("%s for this stage (%s); others: --budget 8h, or training.max_minutes=480", *told)
    steps, total = UNLIMITED, None
    if minutes is None or t.max_steps is not None or t.total_tokens != "auto":
        tokens = choose_tokens(t.total_tokens, num_parameters, config)
        chosen = choose_steps(t.max_steps, tokens, per_step)
        steps, total = int(chosen.value), int(tokens.value) if t.max_steps is None else None
        at_most = "" if minutes is None else "at most "
        log.info("%s%d steps of %s tokens (%s)", at_most, steps, f"{per_step:,}", chosen.reason)
    dtype = choose_dtype(t.precision, world.device)
    log.info("precision %s on %s", str(dtype).removeprefix("torch."), world.device)
    return Plan(steps, lr.value, dtype, length, per_step, total, None if minutes is None else minutes.value)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for `precision`: `bf16`, `fp32`, or `auto`, which is bf16 if the device multiplies it."""
    if precision == "auto":  # bf16 is twice as fast
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def choose_length(
    setting: int | str, model: PreTrainedModel, cache: str | None, minutes: Resolved | None = None
) -> int:
    """Return the sequence length: the KD cache's if there is one, else `setting`.

    `auto` is the model's number of positions, at most `MAX_LENGTH`, or less if the training has `minutes`. A model that
    states no such number has no limit.
    Raises UserError if the length is above the model's positions, or if it is set and the cache has another one.
    """
    longest = positions(model.config) or LARGEST
    if cache is not None:
        setting = _length_of_cache(setting, cache)
    most = MAX_LENGTH if minutes is None else MAX_LENGTH_IN_MINUTES
    length = min(longest, most) if isinstance(setting, str) else setting
    if length > longest:
        raise UserError(f"training.max_seq_length={length}: the model has {longest} positions")
    return length


def _length_of_cache(setting: int | str, cache: str) -> int:
    manifest = read_manifest(Path(cache))
    if setting not in ("auto", manifest.length):
        raise UserError(
            f"training.max_seq_length={setting}: the sequences of {cache} have {manifest.length} tokens; "
            f"leave it at auto"
        )
    return manifest.length
