"""Training on the next token, with or without a running teacher."""

from collections.abc import Iterator
from contextlib import ExitStack

from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core.batch import Batch, places
from wrinklefree.core.errors import UserError
from wrinklefree.objectives.base import LOSS, Loss, Metrics
from wrinklefree.objectives.language_model import LanguageObjective, vocabulary_losses
from wrinklefree.objectives.losses import TokenLosses, related
from wrinklefree.objectives.terms import AttentionRelations, HiddenStates, hidden_share


class Objective(LanguageObjective):
    """Cross entropy and KL to a teacher; `config` may add attention relations and hidden states."""

    def __init__(
        self,
        student: PreTrainedModel,
        config: DistillationConfig,
        teacher: PreTrainedModel | None = None,
        compiled: bool = False,
    ) -> None:
        """Raises UserError if the teacher's layers do not fit, or if a setting needs one that is missing."""
        super().__init__(student, config, teacher, compiled)
        self.hidden_share = config.hidden.initial_weight
        self.attention = self.hidden = None
        if config.attention.weight:
            self.attention = AttentionRelations(
                student, _needed(teacher, "attention.weight", compiled), config.attention
            )
        if config.hidden.enabled:
            self.hidden = HiddenStates(student, _needed(teacher, "hidden.enabled", compiled), config.hidden)

    @classmethod
    def needs_teacher(cls, config: DistillationConfig) -> bool:
        """Whether the distillation preset has a teacher, which all but `none` do."""
        return config.name != "none"

    def on_step(self, step: int, max_steps: int) -> None:
        """Update the share that hidden states have in the loss."""
        self.hidden_share = hidden_share(self.config.hidden, step, max_steps)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count labelled tokens; for attention relations and hidden states, the tokens that are not padding."""
        counts = super().counts(batch)
        if self.attention is None and self.hidden is None:
            return counts
        return counts | dict.fromkeys(("attention", "hidden", "cosine"), related(places(batch)).sum())

    def __call__(self, batch: Batch) -> Iterator[tuple[Loss, Metrics]]:
        parts = [part for part in (self.attention, self.hidden) if part is not None]
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.watching())
            result = vocabulary_losses(self.student, self.teacher, batch, self.config, self.words)
        metrics = {"ce": result.ce} | ({"kl": result.kl} if self.teacher else {})
        shares, terms = self._vocabulary_terms(result), {LOSS: result.loss}
        if self.hidden is not None:
            distance = self.hidden(batch)
            shares = {name: (1 - self.hidden_share) * value for name, value in shares.items()}
            terms = {LOSS: (1 - self.hidden_share) * result.loss, "hidden": self.hidden_share * distance}
            metrics["cosine"] = 1 - distance.detach() / 2
        if self.attention is not None:
            relation = self.attention(batch)
            terms["attention"] = self.config.attention.weight * relation
            metrics["attention"] = relation.detach()
        self.shares.add(shares | {name: term.detach() for name, term in terms.items() if name != LOSS})
        yield terms if parts else result.loss, metrics

    def _vocabulary_terms(self, result: TokenLosses) -> dict[str, Tensor]:
        """Return cross entropy and KL times their weights, without those of weight 0."""
        c = self.config
        terms = {"ce": c.ce_weight * result.ce} if c.ce_weight else {}
        return terms | ({"kl": c.weight * result.kl} if self.teacher and c.weight else {})


def _needed(teacher: PreTrainedModel | None, setting: str, compiled: bool) -> PreTrainedModel:
    """Return the teacher. Raises UserError if there is none, or if the model is compiled: hooks need plain modules."""
    if teacher is None:
        raise UserError(f"distillation.{setting}: needs a teacher, and distillation=none has none")
    if compiled:
        raise UserError(f"distillation.{setting}: watches layers inside of the model; set training.compile=false")
    return teacher
