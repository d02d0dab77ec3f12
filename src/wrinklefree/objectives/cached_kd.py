"""Distillation from a KD cache: the answers of the teacher come with the batches."""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core.batch import Batch, labelled
from wrinklefree.objectives.base import Metrics, Shares
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.objectives.losses import CachedLosses, CachedTeacher, cached_losses, shifted


class CachedKD:
    """KL to the teacher whose answers come with the batches (`data.kd_cache`), cross entropy, and hard terms."""

    def __init__(self, student: PreTrainedModel, config: DistillationConfig, compiled: bool = False) -> None:
        self.student, self.config, self.shares = BodyAndHead(student, compiled), config, Shares()

    def on_step(self, step: int, max_steps: int) -> None:
        """No term follows a schedule."""

    def __call__(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        c = self.config
        result = self.compare(batch)
        hard = {"hard": result.hard} if c.hard_top1 or c.hard_full else {}
        weighted = {"ce": (c.ce_weight, result.ce), "kl": (c.weight, result.kl)}
        self.shares.add({name: weight * value for name, (weight, value) in weighted.items() if weight} | hard)
        yield result.loss, {"ce": result.ce, "kl": result.kl, **hard}

    def compare(self, batch: Batch) -> CachedLosses:
        """Losses of one batch of `KDCache`."""
        c, kept = self.config, labelled(batch)
        hidden, targets = shifted(self.student.states(batch), batch["labels"])
        states, head = self.student.project(hidden)
        rest = batch["kd_rest"][kept] if "kd_rest" in batch else None
        last = kept & (kept.flip(1).cumsum(1).flip(1) == 1)
        teacher = CachedTeacher(batch["kd_ids"][kept], batch["kd_logits"][kept], rest, last[kept])
        return cached_losses(
            states,
            head,
            targets,
            teacher,
            ce_weight=c.ce_weight,
            kl_weight=c.weight,
            temperature=c.temperature,
            tau_squared=c.tau_squared,
            hard_top1=c.hard_top1,
            hard_full=c.hard_full,
        )
