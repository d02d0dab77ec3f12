"""Runs a causal language model one decoder block at a time.

A block is called as the model's own forward calls it: with the masks and rotary positions that the model makes for it.
They are found by a pass in which every block is replaced by one that only writes down what it is called with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.core.batch import model_inputs
from wrinklefree.core.surgery import decoder_layers

Arguments = dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with, and returns its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Models look at attributes of their blocks, such as the kind of their attention.
        self.__dict__.update({name: value for name, value in vars(block).items() if not name.startswith("_")})

    def forward(self, hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        self.hidden, self.others, self.named = hidden, others, named
        return hidden


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[_Recorder]]:
    blocks = decoder_layers(model)
    kept, recorders = list(blocks), [_Recorder(block) for block in blocks]
    for i, recorder in enumerate(recorders):
        blocks[i] = recorder
    try:
        yield recorders
    finally:
        for i, block in enumerate(kept):
            blocks[i] = block


@torch.no_grad()
def first_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The hidden states that the first block gets: [B, L, hidden]."""
    with _recording(model) as recorders:
        model.base_model(**model_inputs(batch), use_cache=False)
    return recorders[0].hidden


@torch.no_grad()
def arguments(model: PreTrainedModel, batch: Mapping[str, Tensor], number: int) -> tuple[tuple[Any, ...], Arguments]:
    """What block `number` is called with besides the hidden states: positional and named arguments."""
    with _recording(model) as recorders:
        model.base_model(**model_inputs(batch), use_cache=False)
    return recorders[number].others, recorders[number].named


def call(block: nn.Module, hidden: Tensor, arguments: tuple[tuple[Any, ...], Arguments]) -> Tensor:
    """The block's output hidden states [B, L, hidden]."""
    others, named = arguments
    out = block(hidden, *others, **named)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
