"""Perplexity on held-out text, and a model's distance from a reference.

Perplexity is exp of the mean negative log-likelihood per token. Each sequence is scored alone, without text before it.
The distance is KL(reference || model) in nats per token, and the share of tokens that both rank first.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core.batch import Batch, labelled
from wrinklefree.core.errors import UserError
from wrinklefree.distributed.sharding import whole_layers
from wrinklefree.objectives.language_model import SplitModel, vocabulary_losses

LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Quality:
    """Means over `tokens` scored tokens. Without a reference, `kl` and `same_top1` are 0."""

    nll: float
    tokens: int
    kl: float
    same_top1: float

    @property
    def ppl(self) -> float:
        """Perplexity; infinite if it is beyond the range of floating-point numbers, as after a run that diverged."""
        return math.exp(self.nll) if self.nll < LARGEST_EXPONENT else math.inf


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    reference: PreTrainedModel | None = None,
    words: int | None = None,
) -> Quality:
    """Score `batches` (input_ids, labels, position_ids [B, L]) in the precision of the current autocast.

    `words` of the tokenizer are what the KL is over if the two heads are padded to different sizes.
    Raises UserError if there is no token to score.
    """
    student, teacher = SplitModel(model), None if reference is None else SplitModel(reference)
    config = DistillationConfig(name="logits", weight=1.0)
    tokens, sums = 0, torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        count = int(labelled(batch).sum())
        here = {name: tensor.to(model.device) for name, tensor in batch.items()}
        losses = vocabulary_losses(student, teacher, here, config, words)
        sums += count * torch.stack([losses.ce, losses.kl, losses.same_top1]).double().cpu()
        tokens += count
    if tokens == 0:
        raise UserError("nothing to evaluate on: the held-out text has no token to predict")
    nll, kl, same_top1 = (sums / tokens).tolist()
    return Quality(nll, tokens, kl, same_top1)


@torch.no_grad()
def quantization_error(model: torch.nn.Module) -> dict[str, float]:
    """Return the relative error |W - Q| / |W| (Frobenius) of each quantized layer by fqn, and their mean as `mean`."""
    errors = {}
    for fqn, layer in whole_layers(model):
        difference = layer.weight - layer.effective_weight(torch.float32)
        errors[fqn] = (difference.norm() / layer.weight.norm()).item()
    return errors | ({"mean": sum(errors.values()) / len(errors)} if errors else {})
