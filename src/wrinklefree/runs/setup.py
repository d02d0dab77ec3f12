"""What every training command sets up before `fit`: the run's folder, what `auto` means, the data, the evaluation."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.data.kd_cache.read import KDCache, KDStream
from wrinklefree.data.open import (
    IGNORE,
    Batch,
    BatchStream,
    Example,
    heldout_batches,
    heldout_examples,
    training_stream,
)
from wrinklefree.distributed.world import World
from wrinklefree.evaluate.accuracy import Accuracy, choose, measure_accuracy
from wrinklefree.evaluate.perplexity import Quality, measure, quantization_error
from wrinklefree.objectives.kinds.cached_kd import Objective as CachedKD
from wrinklefree.training.plan import Plan, sequence_length


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
        length=sequence_length(config),
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
        config.data, tokenizer, batch_size=t.batch_size, length=sequence_length(config), max_tokens=max_tokens
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
            model, tokenizer, examples, batch_size=4 * config.training.batch_size, length=sequence_length(config)
        )
