"""What other tools make of the same weights. Each is there if its package is installed.

A tool is a function from `Asked` to the weights that its codes stand for. `references.py` lists them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rounded:
    """A weight that codes stand for, and the bits that the codes and their scales take."""

    weight: Tensor
    bits: float


@dataclass(frozen=True)
class Asked:
    """What a tool is given: a model, and the linear layers in its blocks by name.

    Their weights change as the tool tells them, so it has read what it needs of the others before it tells the first.
    """

    model: PreTrainedModel
    layers: Mapping[str, nn.Linear]
    tokenizer: PreTrainedTokenizerBase
    rows: Callable[[], Tensor]  # token ids [rows, length] of the training text, to calibrate on


Maker = Callable[[Asked], Iterator[tuple[str, Rounded]]]  # name and weight of each layer
