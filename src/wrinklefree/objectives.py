"""Objectives: what a batch is trained for. An objective yields one or more (loss, metrics) per batch.

Yielding more than once lets deep supervision and policy gradients share the one training loop.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.config import DistillationConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import compute_dtype
from wrinklefree.losses import TokenLosses, shifted, token_losses

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch], Iterator[tuple[Tensor, Metrics]]]


class Decoder:
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
        return self.head.config.activation(states).to(dtype), self.head.effective_weight(dtype)


@torch.no_grad()
def _check_head(model: PreTrainedModel, decoder: Decoder) -> None:
    if decoder.head is None or decoder.head.bias is not None:
        raise UserError(f"{type(model).__name__}: not a causal language model with a plain output head")
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.vocab_size
    states, head = decoder.project(decoder.states({"input_ids": ids}))
    expected = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose((states @ head.to(states.dtype).T).float(), expected, atol=1e-2, rtol=1e-2):
        raise UserError(f"{type(model).__name__}: scales or caps its logits after the head, which is not supported yet")


class LanguageModelling:
    """Cross entropy, KL to a teacher, or both, on next tokens."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        config: DistillationConfig,
        compiled: bool = False,
    ) -> None:
        self.student = Decoder(student, compiled)
        self.teacher = None if teacher is None else Decoder(teacher, compiled)
        self.config = config
        if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
            raise UserError(
                f"distillation.teacher: vocabulary of {teacher.config.vocab_size} tokens, the model's has "
                f"{student.config.vocab_size}: distillation needs the same tokenizer"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Metrics]]:
        result = compare(self.student, self.teacher, batch, self.config)
        yield result.loss, {"ce": result.ce} | ({"kl": result.kl} if self.teacher else {})


def compare(student: Decoder, teacher: Decoder | None, batch: Batch, config: DistillationConfig) -> TokenLosses:
    """Losses of one batch, in fp32 sums over chunks of the vocabulary's logits."""
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
    )
