"""A causal language model split into body and head, and the base class of the objectives that train one."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core.batch import Batch, model_inputs
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import OBJECTIVES, find_named
from wrinklefree.core.inputs import compute_dtype
from wrinklefree.core.numbers import first_not_numbers
from wrinklefree.objectives.base import Objective, Shares
from wrinklefree.objectives.losses import TokenLosses, shifted, token_losses


class BodyAndHead:
    """A causal LM split into body and head, so that a loss never needs the logits of all tokens at once."""

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        """Raises UserError if the logits are not simply the head's product with the last hidden state."""
        self.head: Any = model.get_output_embeddings()  # nn.Linear, QuantLinear or PackedLinear
        self.body = model.base_model
        _check_head(model, self)
        if compiled:
            self.body = torch.compile(self.body)

    def states(self, batch: Batch) -> Tensor:
        """Run the body and return the last hidden states [B, L, D]."""
        hidden: Tensor = self.body(**model_inputs(batch), use_cache=False).last_hidden_state
        return hidden

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of the last product: states [N, D] as the head sees them, and its weight [V, D]."""
        dtype = compute_dtype(states)
        if type(self.head) is nn.Linear:
            return states.to(dtype), self.head.weight
        return self.head.inputs(states).to(dtype), self.head.effective_weight(dtype)


@torch.no_grad()
def _check_head(model: PreTrainedModel, decoder: BodyAndHead) -> None:
    if decoder.head is None or decoder.head.bias is not None:
        raise UserError(f"{type(model).__name__}: not a causal language model with a plain output head")
    # Try it on four tokens: no setting tells for all architectures whether they scale or cap their logits.
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.vocab_size
    states, head = decoder.project(decoder.states({"input_ids": ids}))
    expected = model(input_ids=ids, use_cache=False).logits.float()
    if not expected.isfinite().all():
        name = first_not_numbers(model.state_dict().items()) or "its weights are finite, but its logits are not"
        raise UserError(f"{type(model).__name__}: {name}: the files are damaged, or the training has diverged")
    if not torch.allclose((states @ head.to(states.dtype).T).float(), expected, atol=1e-2, rtol=1e-2):
        raise UserError(f"{type(model).__name__}: scales or caps its logits after the head, which is not supported yet")


def vocabulary_losses(
    student: BodyAndHead,
    teacher: BodyAndHead | None,
    batch: Batch,
    config: DistillationConfig,
    words: int | None = None,
) -> TokenLosses:
    """Return the losses of one batch. Logits are computed in chunks of tokens and summed in fp32."""
    other = None
    if teacher is not None:
        with torch.no_grad():
            hidden, _ = shifted(teacher.states(batch), batch["labels"])
            states, head = teacher.project(hidden)
            other = states, head.to(states.dtype)
    hidden, targets = shifted(student.states(batch), batch["labels"])
    states, head = student.project(hidden)
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
        """Raises UserError if the logits of a model are not simply its head's product with the last hidden state."""
        self.student = BodyAndHead(student, compiled)
        self.teacher = None if teacher is None else BodyAndHead(teacher, compiled)
        self.config, self.shares = config, Shares()


def find_objective(name: str) -> type[LanguageObjective]:
    """Return the objective's class. Raises UserError if the name is unknown."""
    objective: type[LanguageObjective] = find_named(OBJECTIVES, name)
    return objective
