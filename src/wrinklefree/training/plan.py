"""What `auto` comes to: steps, learning rate, precision, sequence length.

The tables are the training guide's, by parameter count: learning rate 1e-4 below 500 M, 5e-5 to 2 B, 2e-5 to 7 B,
1e-5 above; tokens at the lower end of its ranges.
"""

import logging
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from wrinklefree.config.schema import ModelConfig, TrainingConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.manifest import read_manifest
from wrinklefree.distributed.world import World

log = logging.getLogger("wrinklefree")

MAX_LENGTH = 2048  # tokens: what `training.max_seq_length: auto` comes to at most
# (parameters below, learning rate, tokens)
TABLE = [
    (500e6, 1e-4, 500_000_000),
    (2e9, 5e-5, 1_000_000_000),
    (7e9, 2e-5, 2_000_000_000),
    (math.inf, 1e-5, 5_000_000_000),
]


@dataclass(frozen=True)
class Resolved:
    """A value and where it came from, for the log."""

    value: float
    reason: str


def choose_lr(given: float | str, num_parameters: int) -> Resolved:
    """The peak learning rate: as given, or for `auto` by the guide's table."""
    if not isinstance(given, str):
        return Resolved(given, "set")
    value = next(lr for limit, lr, _ in TABLE if num_parameters < limit)
    return Resolved(value, f"table, {num_parameters / 1e6:.0f} M parameters")


def choose_tokens(given: int | str, num_parameters: int, model: ModelConfig, slow: bool) -> Resolved:
    """The tokens to train on: as given, or for `auto` what the model's config says, or else the guide's table."""
    if not isinstance(given, str):
        return Resolved(given, "total_tokens set")
    if slow and model.auto_tokens_slow is not None:
        return Resolved(
            model.auto_tokens_slow,
            f"fewer because this processor has no bf16; training.total_tokens={model.auto_tokens} trains on all",
        )
    if model.auto_tokens is not None:
        return Resolved(model.auto_tokens, f"model={model.name}")
    value = next(tokens for limit, _, tokens in TABLE if num_parameters < limit)
    return Resolved(value, f"table, {num_parameters / 1e6:.0f} M parameters")


def choose_steps(max_steps: int | None, tokens: Resolved, tokens_per_step: int) -> Resolved:
    """The number of optimizer steps: `max_steps`, else what `tokens` are enough for."""
    if max_steps is not None:
        return Resolved(max_steps, "max_steps set")
    total = int(tokens.value)
    if total < tokens_per_step:
        raise UserError(f"training.total_tokens={total} is less than one step ({tokens_per_step} tokens)")
    return Resolved(total // tokens_per_step, f"{total:,} tokens, {tokens.reason}")


@dataclass(frozen=True)
class Plan:
    """What `auto` came to."""

    max_steps: int
    lr: float
    dtype: torch.dtype  # of the matrix products; weights and optimizer state are fp32
    length: int  # tokens in a sequence
    tokens_per_step: int  # of all processes

    def autocast(self, device: torch.device, cached: bool = True) -> AbstractContextManager[Any]:
        """Matrix products in `dtype` while the block runs; `cached` keeps a copy of each plain weight in it."""
        on = self.dtype != torch.float32
        return torch.autocast(device.type, self.dtype, enabled=on, cache_enabled=cached)


def make_plan(t: TrainingConfig, config: ModelConfig, model: PreTrainedModel, length: int, world: World) -> Plan:
    """Resolve `auto` and say in the log what was chosen and why."""
    num_parameters = model.num_parameters()
    per_step = t.batch_size * length * t.gradient_accumulation_steps * world.size
    lr = choose_lr(t.optimizer.lr, num_parameters)
    tokens = choose_tokens(t.total_tokens, num_parameters, config, slow=not has_bf16(world.device))
    steps = choose_steps(t.max_steps, tokens, per_step)
    dtype = choose_dtype(t.precision, world.device)
    log.info("learning rate %g (%s)", lr.value, lr.reason)
    log.info("%d steps of %s tokens (%s)", steps.value, f"{per_step:,}", steps.reason)
    log.info("precision %s on %s", str(dtype).removeprefix("torch."), world.device)
    return Plan(int(steps.value), lr.value, dtype, length, per_step)


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """As given; `auto` is bf16 if the processor has it, which is twice as fast, else fp32."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def choose_length(given: int | str, model: PreTrainedModel, cache: str | None) -> int:
    """The sequence length: as given, or for `auto` the model's positions, at most `MAX_LENGTH`; a KD cache has its own.

    Raises UserError for sequences longer than the positions or of another length than the cache's, and for a cache of
    words that the model does not have.
    """
    longest: int = model.config.max_position_embeddings
    if cache is not None:
        given = _length_of_cache(given, model, cache)
    length = min(longest, MAX_LENGTH) if isinstance(given, str) else given
    if length > longest:
        raise UserError(f"training.max_seq_length={length}: the model has {longest} positions")
    return length


def _length_of_cache(given: int | str, model: PreTrainedModel, cache: str) -> int:
    manifest = read_manifest(Path(cache))
    if manifest.vocab_size > model.config.vocab_size:  # one tokenizer, but a head that is padded further
        raise UserError(
            f"{cache}: of a vocabulary of {manifest.vocab_size} words, the model has {model.config.vocab_size}"
        )
    if given not in ("auto", manifest.length):
        raise UserError(
            f"training.max_seq_length={given}: the sequences of {cache} have {manifest.length} tokens; leave it at auto"
        )
    return manifest.length
