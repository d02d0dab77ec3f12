"""What every training command sets up before `fit`: the run's folder, what `auto` means, the data, the evaluation."""

import itertools
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree import checkpoint, schedule, stages, storage
from wrinklefree.config import Config
from wrinklefree.core.errors import UserError
from wrinklefree.data import IGNORE, Batch, BatchStream, Example, heldout_batches, heldout_examples, training_stream
from wrinklefree.data.kd_cache import KDCache, KDStream, read_manifest
from wrinklefree.distributed import World
from wrinklefree.evaluate.accuracy import Accuracy, choose, measure_accuracy
from wrinklefree.evaluate.perplexity import Quality, measure, quantization_error
from wrinklefree.objectives import CachedKD

log = logging.getLogger("wrinklefree")

MAX_LENGTH = 2048  # tokens: what `training.max_seq_length: auto` comes to at most

# What a run leaves in its folder; `--force` removes these and nothing else.
OUTPUTS = ["checkpoints", "best", "final", "packed", "shipped", "plots", "training_log.csv", "results.json"]


@dataclass(frozen=True)
class Plan:
    """What `auto` came to."""

    max_steps: int
    lr: float
    dtype: torch.dtype  # of the matrix products; weights and optimizer state are fp32


def claim(config: Config, force: bool) -> Path | None:
    """The checkpoint to resume from, if any; nothing is written or removed before `clear`.

    Raises UserError when the folder already holds a run, neither `training.resume_from` nor `force` is given, and this
    one does not start from it.
    """
    out = Path(config.output_dir)
    if config.training.resume_from is not None:
        found = checkpoint.find(config.training.resume_from, out, storage.fetch)
        log.info("resuming from %s", found)
        return found
    if _outputs(out) and not force and not _starts_within(config):
        raise UserError(
            f"{out} already holds a run: go on with training.resume_from=latest, choose another output_dir=..., "
            f"or start over with --force"
        )
    return None


def clear(config: Config) -> None:
    """Make the run's folder, without what an earlier run left there: once nothing can be wrong with this one.

    A run that this one starts from is kept, in `earlier_1/` and so on.
    """
    out = Path(config.output_dir)
    if _starts_within(config):
        kept = next(path for n in itertools.count(1) if not (path := out / f"earlier_{n}").exists())
        kept.mkdir()
        for path in _outputs(out):
            path.rename(kept / path.name)
        log.info("%s: the run that this one starts from is now in %s", out, kept)
    for path in _outputs(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _starts_within(config: Config) -> bool:
    """Whether the model to start from belongs to the run that the output folder holds."""
    start = stages.start(config)
    held = [path.resolve() for path in _outputs(Path(config.output_dir))]
    return start is not None and any(path in (start.resolve(), *start.resolve().parents) for path in held)


def _outputs(out: Path) -> list[Path]:
    return [out / name for name in OUTPUTS if (out / name).exists()]


def make_plan(config: Config, model: PreTrainedModel, world: World) -> Plan:
    """Resolve `auto` and say in the log what was chosen and why."""
    t = config.training
    num_parameters = model.num_parameters()
    per_step = t.batch_size * length(config) * t.gradient_accumulation_steps * world.size
    lr = schedule.choose_lr(t.optimizer.lr, num_parameters)
    steps = schedule.choose_steps(t.max_steps, t.total_tokens, num_parameters, per_step)
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


def length(config: Config) -> int:
    """The sequence length, resolved."""
    assert not isinstance(config.training.max_seq_length, str)
    return config.training.max_seq_length


def open_stream(config: Config, tokenizer: PreTrainedTokenizerBase, world: World) -> BatchStream | KDStream:
    """The endless training batches of this process: of the KD cache where there is one, else of the data."""
    t = config.training
    if config.distillation.cache is not None:
        cache = open_cache(config.distillation.cache, tokenizer)
        return KDStream(cache, batch_size=t.batch_size, seed=config.seed, rank=world.rank, world_size=world.size)
    return training_stream(
        config.data,
        tokenizer,
        batch_size=t.batch_size,
        length=length(config),
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )


def open_cache(folder: str, tokenizer: PreTrainedTokenizerBase) -> KDCache:
    """A KD cache for a student of this tokenizer. Raises UserError where it is broken, or of another tokenizer."""
    cache = KDCache(Path(folder))
    cache.check_tokenizer(tokenizer)
    return cache


def heldout(config: Config, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> list[Batch]:
    """Held-out batches at the training context length."""
    t = config.training
    return heldout_batches(
        config.data, tokenizer, batch_size=t.batch_size, length=length(config), max_tokens=max_tokens
    )


def evaluator(config: Config, tokenizer: PreTrainedTokenizerBase) -> Callable[[nn.Module], dict[str, float]]:
    """What `fit` calls every `eval_interval` steps: held-out loss and quantization errors."""
    if config.distillation.cache is not None:
        return _cached_evaluator(config, open_cache(config.distillation.cache, tokenizer))
    batches = heldout(config, tokenizer, config.training.eval_tokens)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PreTrainedModel)
        errors = {f"quant_error/{name}": value for name, value in quantization_error(model).items()}
        return {"eval_loss": measure(model, batches).nll, **errors}

    return evaluate


def _cached_evaluator(config: Config, cache: KDCache) -> Callable[[nn.Module], dict[str, float]]:
    """The loss that is trained for, and its parts, on held-out sequences of the cache."""

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PreTrainedModel)
        objective, sums, count = CachedKD(model, config.distillation), torch.zeros(3, dtype=torch.float64), 0
        for batch in cache.heldout(config.training.batch_size, config.training.eval_tokens):
            here = {name: tensor.to(model.device) for name, tensor in batch.items()}
            losses, num = objective.compare(here), int((batch["labels"][:, 1:] != IGNORE).sum())
            sums += num * torch.stack([losses.loss, losses.ce, losses.kl]).double().cpu()
            count += num
        values = dict(zip(("eval_loss", "eval_ce", "eval_kl"), (sums / count).tolist(), strict=True))
        return values | {f"quant_error/{name}": value for name, value in quantization_error(model).items()}

    return evaluate


def quality(
    model: PreTrainedModel, batches: list[Batch], plan: Plan, reference: PreTrainedModel | None = None
) -> Quality:
    """Held-out quality in the precision of the run."""
    device = model.device.type
    with torch.autocast(device, plan.dtype, enabled=plan.dtype != torch.float32):
        return measure(model, batches, reference)


def examples(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Held-out examples of a task with a fixed set of answers; none for other data."""
    return choose(heldout_examples(config.data, tokenizer), config.training.eval_examples)


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], config: Config, plan: Plan
) -> Accuracy:
    """Accuracy in the precision of the run."""
    with torch.autocast(model.device.type, plan.dtype, enabled=plan.dtype != torch.float32):
        return measure_accuracy(
            model, tokenizer, examples, batch_size=4 * config.training.batch_size, length=length(config)
        )
