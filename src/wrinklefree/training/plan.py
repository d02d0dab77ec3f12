"""What `auto` comes to: steps, learning rate, precision, sequence length.

The tables are the training guide's, by parameter count: learning rate 1e-4 below 500 M, 5e-5 to 2 B, 2e-5 to 7 B,
1e-5 above; tokens at the lower end of its ranges.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from wrinklefree.config.schema import Config
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


def choose_steps(max_steps: int | None, total_tokens: int | str, num_parameters: int, tokens_per_step: int) -> Resolved:
    """The number of optimizer steps: `max_steps`, else `total_tokens`' worth, for `auto` by the guide's table."""
    if max_steps is not None:
        return Resolved(max_steps, "max_steps set")
    if not isinstance(total_tokens, str):
        tokens, reason = total_tokens, "total_tokens set"
    else:
        tokens = next(tokens for limit, _, tokens in TABLE if num_parameters < limit)
        reason = f"table, {num_parameters / 1e6:.0f} M parameters"
    if tokens < tokens_per_step:
        raise UserError(f"training.total_tokens={tokens} is less than one step ({tokens_per_step} tokens)")
    return Resolved(tokens // tokens_per_step, f"{tokens:,} tokens, {reason}")


@dataclass(frozen=True)
class Plan:
    """What `auto` came to."""

    max_steps: int
    lr: float
    dtype: torch.dtype  # of the matrix products; weights and optimizer state are fp32


def make_plan(config: Config, model: PreTrainedModel, world: World) -> Plan:
    """Resolve `auto` and say in the log what was chosen and why."""
    t = config.training
    num_parameters = model.num_parameters()
    per_step = t.batch_size * sequence_length(config) * t.gradient_accumulation_steps * world.size
    lr = choose_lr(t.optimizer.lr, num_parameters)
    steps = choose_steps(t.max_steps, t.total_tokens, num_parameters, per_step)
    dtype = choose_dtype(t.precision, world.device)
    log.info("learning rate %g (%s)", lr.value, lr.reason)
    log.info("%d steps of %s tokens (%s)", steps.value, f"{per_step:,}", steps.reason)
    log.info("precision %s on %s", str(dtype).removeprefix("torch."), world.device)
    return Plan(int(steps.value), lr.value, dtype)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the processor multiplies it natively (twice as fast), else fp32."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    cuda = device.type == "cuda"
    native = torch.cuda.is_bf16_supported() if cuda else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def choose_length(config: Config, model: PreTrainedModel) -> None:
    """Resolve `training.max_seq_length: auto` in place; of a KD cache, its own length.

    Raises UserError for sequences longer than the positions, or of another length than the cache's, and for a cache of
    words that the model does not have.
    """
    longest = model.config.max_position_embeddings
    if config.distillation.cache is not None:
        manifest = read_manifest(Path(config.distillation.cache))
        cached = manifest.length
        if manifest.vocab_size > model.config.vocab_size:  # one tokenizer, but a head that is padded further
            raise UserError(
                f"{config.distillation.cache}: of a vocabulary of {manifest.vocab_size} words, "
                f"{config.model.name} has {model.config.vocab_size}"
            )
        if config.training.max_seq_length not in ("auto", cached):
            raise UserError(
                f"training.max_seq_length={config.training.max_seq_length}: the sequences of "
                f"{config.distillation.cache} have {cached} tokens; leave it at auto"
            )
        config.training.max_seq_length = cached
    if config.training.max_seq_length == "auto":
        config.training.max_seq_length = min(longest, MAX_LENGTH)
    if config.training.max_seq_length > longest:
        raise UserError(
            f"training.max_seq_length={config.training.max_seq_length}: {config.model.name} has {longest} positions"
        )


def sequence_length(config: Config) -> int:
    """The sequence length, resolved."""
    assert not isinstance(config.training.max_seq_length, str)
    return config.training.max_seq_length
