"""A model's own way from its last hidden states to its logits: with a bias, a scale, a cap, or whatever it has.

A model calls its body and computes the logits from what that returns. Here the body is replaced for one call by
something that returns given states, so the rest of the model's own forward pass is the formula.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from wrinklefree.core.errors import UserError
from wrinklefree.core.inputs import compute_dtype
from wrinklefree.core.method import QuantLinear
from wrinklefree.core.numbers import first_not_numbers
from wrinklefree.families.foreign import refused_in_one_line

TOKENS = 8  # on which a model is tried
REAL = 50.0  # the size of logits at which a cap shows; those of real models come close to it
CLOSE = 1e-2  # relative to the largest logit


class Formula:
    """The head of any model, by the model's own code."""

    def __init__(self, model: PreTrainedModel, body: nn.Module, outside: Sequence[nn.Module], words: int) -> None:
        """`body` is the module whose output the model turns into logits; `outside` are those that it does it with."""
        self.model, self.body, self.outside, self.words = model, body, outside, words

    def __len__(self) -> int:
        return self.words

    @property
    def parameters(self) -> list[Tensor]:
        """What the logits depend on. A quantized layer stands for its parameters by its effective weight."""
        dtype = compute_dtype(next(self.model.parameters()))
        found: dict[int, Tensor] = {}
        for module in self.outside:
            tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
            if isinstance(module, QuantLinear):
                tensors["weight"] = module.effective_weight(dtype)
            found |= {id(tensor): tensor for tensor in tensors.values()}
        return list(found.values())

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        return self.parameters

    def logits(self, states: Tensor, leaves: Sequence[Tensor] = ()) -> Tensor:
        """The logits [N, V] of states [N, D]."""
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        with _returning(self.body, states.unsqueeze(0)):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]


@contextlib.contextmanager
def _returning(body: nn.Module, states: Tensor) -> Iterator[None]:
    """Let `body` return `states` [1, N, D], whatever it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return Returned(states)

    body.forward = forward
    try:
        yield
    finally:
        del body.forward  # the class has its own


class Returned(tuple[Any, ...]):
    """What a body returns in transformers, by attribute or by position. All but the states is missing."""

    def __new__(cls, states: Tensor) -> "Returned":
        return super().__new__(cls, (states, None, None, None))

    @property
    def last_hidden_state(self) -> Tensor:
        states: Tensor = self[0]
        return states

    def __getattr__(self, name: str) -> None:
        return None


class Trace:
    """One forward pass of a model on a few tokens: which modules it called, what its body returned, and the logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UserError if the logits are not numbers, or if nothing in the model returns last hidden states."""
        self.calls: list[nn.Module] = []  # by the model itself, not by other modules
        self.outputs: list[tuple[nn.Module, Any]] = []  # those of `calls` that return last hidden states
        self.depth = 0
        handles = [
            handle
            for module in model.modules()
            if module is not model
            for handle in (module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave))
        ]
        ids = torch.arange(TOKENS, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
        try:
            self.logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
        finally:
            for handle in handles:
                handle.remove()
        if not self.logits.isfinite().all():
            name = first_not_numbers(model.state_dict().items()) or "its weights are finite, but its logits are not"
            raise UserError(f"{type(model).__name__}: {name}: the files are damaged, or the training has diverged")
        if not self.outputs:
            raise UserError(f"{type(model).__name__}: nothing in it returns last hidden states, which losses need")
        self.body, output = self.outputs[0]
        self.states: Tensor = output.last_hidden_state

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self.depth == 0:
            self.calls.append(module)
        self.depth += 1

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0 and isinstance(output, ModelOutput) and "last_hidden_state" in output:
            self.outputs.append((module, output))


@torch.no_grad()
def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model that turns tokens into last hidden states. Raises UserError if there is none."""
    return Trace(model).body


@torch.no_grad()
def split(model: PreTrainedModel) -> tuple[nn.Module | None, Formula]:
    """Return the output head if the logits are simply its product with the last hidden states, and the formula.

    The head is None if the logits are more than that. Raises UserError if they do not follow from the states, or are
    not numbers.
    """
    training = model.training
    model.eval()
    try:
        return _split(model)
    finally:
        model.train(training)


def _split(model: PreTrainedModel) -> tuple[nn.Module | None, Formula]:
    trace = Trace(model)
    outside = [module for called in trace.calls if called is not trace.body for module in called.modules()]
    formula = Formula(model, trace.body, [model, *dict.fromkeys(outside)], trace.logits.shape[-1])
    with refused_in_one_line(f"{type(model).__name__}: its logits need more than the last hidden state of its body"):
        found = formula.logits(trace.states[0])
    if not _close(found, trace.logits[0]):
        raise UserError(
            f"{type(model).__name__}: its logits do not follow from the last hidden state of its body alone, which is "
            f"not supported"
        )
    head = model.get_output_embeddings()
    return head if head is not None and _is_product(formula, head, trace.states[0]) else None, formula


def _is_product(formula: Formula, head: nn.Module, states: Tensor) -> bool:
    """Whether the logits are the head's product with the states, also if they are as large as those of real models."""
    own = [p for module in formula.outside if module is not head for p in module.parameters(recurse=False)]
    if own or head.bias is not None:
        return False
    largest = formula.logits(states).abs().max().clamp_min(1e-6)
    for scale in (1.0, REAL / largest):
        operand, weight = project(head, states * scale)
        if not _close(operand @ weight.to(operand.dtype).T, formula.logits(states * scale)):
            return False
    return True


def project(head: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operands of a head's product: states [N, D] as it sees them, and its weight [V, D].

    `head` is an nn.Linear, QuantLinear or PackedLinear.
    """
    dtype = compute_dtype(states)
    if type(head) is nn.Linear:
        return states.to(dtype), head.weight
    return head.inputs(states).to(dtype), head.effective_weight(dtype)


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= CLOSE * expected.float().abs().max().clamp_min(1.0))
