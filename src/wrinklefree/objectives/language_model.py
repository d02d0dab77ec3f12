"""A causal language model as its body and its head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import OBJECTIVES, find_named
from wrinklefree.core.inputs import compute_dtype
from wrinklefree.objectives.base import Objective, Shares


class BodyAndHead:
    """A causal LM as its body and its head apart, so that losses can take the vocabulary in chunks."""

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        """Raises UserError where the logits are not simply the head's product with the last hidden state."""
        self.head: Any = model.get_output_embeddings()  # nn.Linear, QuantLinear or PackedLinear
        self.body = model.base_model
        _check_head(model, self)
        if compiled:
            self.body = torch.compile(self.body)

    def states(self, batch: Batch) -> Tensor:
        """Last hidden states [B, L, D]."""
        inputs = {k: batch[k] for k in ("input_ids", "position_ids") if k in batch}
        hidden: Tensor = self.body(**inputs, use_cache=False).last_hidden_state
        return hidden

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The operands of the last product: states [N, D] as the head sees them, and the head's weight [V, D]."""
        dtype = compute_dtype(states)
        if type(self.head) is nn.Linear:
            return states.to(dtype), self.head.weight
        return self.head.inputs(states).to(dtype), self.head.effective_weight(dtype)


@torch.no_grad()
def _check_head(model: PreTrainedModel, decoder: BodyAndHead) -> None:
    if decoder.head is None or decoder.head.bias is not None:
        raise UserError(f"{type(model).__name__}: not a causal language model with a plain output head")
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.vocab_size
    states, head = decoder.project(decoder.states({"input_ids": ids}))
    expected = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose((states @ head.to(states.dtype).T).float(), expected, atol=1e-2, rtol=1e-2):
        raise UserError(f"{type(model).__name__}: scales or caps its logits after the head, which is not supported yet")


def check_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises UserError where the two cannot have the same tokenizer."""
    mine, other = student.config.vocab_size, teacher.config.vocab_size
    if mine != other:
        raise UserError(
            f"distillation.teacher: vocabulary of {other} tokens, the model's has {mine}: "
            f"distillation needs the same tokenizer"
        )


class LanguageObjective(Objective):
    """Base of what `training.objective` names: it has a student, perhaps a teacher, and the distillation section."""

    def __init__(
        self,
        student: PreTrainedModel,
        config: DistillationConfig,
        teacher: PreTrainedModel | None = None,
        compiled: bool = False,
    ) -> None:
        """Raises UserError for a teacher that does not fit the student."""
        self.student = BodyAndHead(student, compiled)
        self.teacher = None if teacher is None else BodyAndHead(teacher, compiled)
        self.config, self.shares = config, Shares()
        if teacher is not None:
            check_vocabulary(student, teacher)


def find_objective(name: str) -> type[LanguageObjective]:
    """The class of an objective. Raises UserError for an unknown name."""
    found: type[LanguageObjective] = find_named(OBJECTIVES, name)
    return found
