"""A causal language model split into body and head, and the base class of the objectives that train one."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core.batch import Batch, model_inputs
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import OBJECTIVES, find_named
from wrinklefree.objectives.base import Objective, Shares
from wrinklefree.objectives.formula import project, split
from wrinklefree.objectives.losses import Head, Product, TokenLosses, shifted, token_losses


class SplitModel:
    """A causal LM split into body and head, so that a loss never needs the logits of all tokens at once."""

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        """Raises UserError if the logits do not follow from the last hidden states, or are no numbers."""
        self.product, self.formula = split(model)
        self.body: Any = self.formula.body
        if compiled:
            self.body = torch.compile(self.body)

    def states(self, batch: Batch) -> Tensor:
        """Run the body and return the last hidden states [B, L, D]."""
        hidden: Tensor = self.body(**model_inputs(batch), use_cache=False).last_hidden_state
        return hidden

    def output(self, states: Tensor) -> tuple[Tensor, Head]:
        """Return states [N, D] as the head sees them, and the head."""
        if self.product is None:
            return states, self.formula
        operand, weight = project(self.product, states)
        return operand, Product(weight)


class BodyAndHead(SplitModel):
    """A split model whose logits are one product. Its weight has to be known to those who work with states alone."""

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        """Raises UserError if the logits are not simply the head's product with the last hidden state."""
        super().__init__(model, compiled)
        if self.product is None:
            raise UserError(
                f"{type(model).__name__}: its logits are more than a product with the last hidden state (a bias, a "
                f"scale, a cap), and thinkers work with such products alone"
            )

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of the last product: states [N, D] as the head sees them, and its weight [V, D]."""
        return project(self.product, states)


def vocabulary_losses(
    student: SplitModel,
    teacher: SplitModel | None,
    batch: Batch,
    config: DistillationConfig,
    words: int | None = None,
) -> TokenLosses:
    """Return the losses of one batch. Logits are computed in chunks of tokens and summed in fp32."""
    other = None
    if teacher is not None:
        with torch.no_grad():
            hidden, _ = shifted(teacher.states(batch), batch["labels"])
            other = teacher.output(hidden)
    hidden, targets = shifted(student.states(batch), batch["labels"])
    states, head = student.output(hidden)
    return token_losses(
        states,
        head,
        targets,
        teacher=other,
        ce_weight=config.ce_weight,
        kl_weight=config.weight,
        temperature=config.temperature,
        tau_squared=config.tau_squared,
        words=words,
    )


class LanguageObjective(Objective):
    """Base class of everything that `training.objective` names: holds the student, its teacher, and the settings."""

    words: int | None = None  # of the tokenizer; if heads are padded to different sizes, the KL is over these words

    def __init__(
        self,
        student: PreTrainedModel,
        config: DistillationConfig,
        teacher: PreTrainedModel | None = None,
        compiled: bool = False,
    ) -> None:
        """Raises UserError if the logits of a model do not follow from its last hidden states."""
        self.student = SplitModel(student, compiled)
        self.teacher = None if teacher is None else SplitModel(teacher, compiled)
        self.config, self.shares = config, Shares()


def find_objective(name: str) -> type[LanguageObjective]:
    """Return the objective's class. Raises UserError if the name is unknown."""
    objective: type[LanguageObjective] = find_named(OBJECTIVES, name)
    return objective
