"""Distillation from a KD cache: the batches carry the teacher's answers, and no teacher runs."""

from collections.abc import Iterator

from torch import Tensor

from wrinklefree.config.schema import Config
from wrinklefree.core.batch import Batch, labelled
from wrinklefree.objectives.base import Loss, Metrics
from wrinklefree.objectives.language_model import LanguageObjective
from wrinklefree.objectives.losses import CachedLosses, CachedTeacher, cached_losses, shifted, within


class Objective(LanguageObjective):
    """KL to a teacher whose answers come with the batches (`data.kd_cache`), plus cross entropy and hard terms."""

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        """Yield an error line if the cache is missing or unused, and for each setting that needs a running teacher."""
        d = config.distillation
        if d.cache is None:
            yield "distillation.cache: training.objective=cached_kd needs a folder that `wf cache` wrote"
        if not (d.weight or d.hard_top1 or d.hard_full):
            yield "distillation.weight=0: training.objective=cached_kd has nothing to learn from the cache; try 1"
        running = {"teacher": d.teacher, "attention.weight": d.attention.weight, "hidden.enabled": d.hidden.enabled}
        for key, value in running.items():
            if value:
                yield f"distillation.{key}={value}: needs a running teacher, and training.objective=cached_kd has none"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count labelled tokens; for `hard_full`, sequences that have one."""
        return {**super().counts(batch), "hard_full": labelled(batch).any(1).sum()}

    def __call__(self, batch: Batch) -> Iterator[tuple[Loss, Metrics]]:
        c = self.config
        result = self.compare(batch)
        hard = {"hard_top1": result.hard_top1} if c.hard_top1 else {}
        if result.hard_full is not None:
            hard["hard_full"] = result.hard_full.detach()
        weighted = {"ce": (c.ce_weight, result.ce), "kl": (c.weight, result.kl)}
        self.shares.add({name: weight * value for name, (weight, value) in weighted.items() if weight} | hard)
        yield result.loss if result.hard_full is None else result.terms(), {"ce": result.ce, "kl": result.kl, **hard}

    def compare(self, batch: Batch) -> CachedLosses:
        """Return the losses of one batch from `KDCache`."""
        c, kept = self.config, labelled(batch)
        hidden, targets = shifted(self.student.states(batch), batch["labels"])
        states, head = self.student.output(hidden)
        rest = batch["kd_rest"][kept] if "kd_rest" in batch else None
        # Counted from the right, the last label of a row is its first.
        last = kept & (kept.flip(1).cumsum(1).flip(1) == 1)
        known = within(batch["kd_ids"][kept], batch["kd_logits"][kept], len(head))
        teacher = CachedTeacher(*known, rest, last[kept])
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
