"""Whether a model keeps the documents of one row apart, and whether it is causal, seen on a few tokens."""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.families.foreign import refused_in_one_line
from wrinklefree.objectives.formula import body_of

HALF = 4  # tokens in each of two documents
CLOSE = 1e-4  # relative to the largest number in a state


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model can be told the positions of its tokens."""
    parameters = inspect.signature(body_of(model).forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether a document's states do not depend on what is before it in a row, if positions restart with it.

    They must also be those of the model without positions: RoBERTa and others like it count from 2, not from 0.
    """
    if not takes_positions(model):
        return False
    ids, positions = _ids(model), torch.arange(HALF, device=model.device).repeat(2).unsqueeze(0)
    alone = _states(model, input_ids=ids[:, HALF:])
    told = _states(model, input_ids=ids[:, HALF:], position_ids=positions[:, HALF:])
    packed = _states(model, input_ids=ids, position_ids=positions)[:, HALF:]
    return _close(told, alone) and _close(packed, alone)


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raises UserError if a token's state depends on later tokens or on chance, or if the forward pass fails."""
    ids, name, training = _ids(model), type(model).__name__, model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with refused_in_one_line(f"{name}: its own forward pass fails on {2 * HALF} tokens"):
        # Some allow other lengths in training than in evaluation, and some cannot keep what they have read. BigBird
        # chooses its attention in its first pass.
        model.eval()(input_ids=ids, use_cache=True)
        with torch.random.fork_rng(devices):
            first, again = (_with_seed(model.train(), ids) for _ in range(2))
    model.train(training)
    if not _close(again, first):  # not equal: on a GPU, sums over experts have no fixed order
        raise UserError(f"{name}: it trains with random numbers that have no seed, so no run could be gone on with")
    if not _close(_states(model, input_ids=ids)[:, :HALF], _states(model, input_ids=ids[:, :HALF])):
        raise UserError(
            f"{name}: its tokens see those after them, so it is no causal language model (an encoder "
            f"becomes one by is_decoder=true in its config.json)"
        )


def _with_seed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    torch.manual_seed(0)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _ids(model: PreTrainedModel) -> Tensor:
    return torch.arange(5, 5 + 2 * HALF, device=model.device).unsqueeze(0)


def _states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    states: Tensor = body_of(model)(**inputs, use_cache=False).last_hidden_state
    return states.float()


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= CLOSE * expected.abs().max())
