"""Rounds embedding and head to integers. In a small model they take a third to a half of the memory read per token.

Integers of 8 bits have one scale per row, those of 4 bits one per 32 columns. They are rounded to nearest when the
model is packed, not trained. So the certificate compares with the trained model under the same rounding, and the cost
of the rounding is measured separately.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.core.codes import Codes
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, QuantMethod, find
from wrinklefree.packed.layer import PackedEmbedding, PackedLinear, TiedEmbedding, scale_of
from wrinklefree.packed.pack import pack_layer

HeadBits = Literal[8, 4]

GROUP = 32


@dataclass(frozen=True)
class Head:
    """The codes of embedding and head by fqn; `tied` maps the embedding to the head if it shares the head's codes."""

    method: QuantMethod
    codes: dict[str, Codes]
    tied: dict[str, str]

    def put_into(self, packed: PreTrainedModel) -> None:
        """Replace a model's embedding and head by packed ones."""
        for fqn, codes in self.codes.items():
            replaced = packed.get_submodule(fqn)
            layer = pack_layer(
                PackedEmbedding if isinstance(replaced, nn.Embedding) else PackedLinear, self.method, codes
            )
            if isinstance(layer, PackedEmbedding):
                layer.scale = scale_of(replaced)
            layer.spec = dataclasses.replace(layer.spec, method=dataclasses.asdict(self.method))
            packed.set_submodule(fqn, layer)
        for fqn, head in self.tied.items():
            owner = packed.get_submodule(head)
            assert isinstance(owner, PackedLinear)
            tied = TiedEmbedding(owner)
            tied.scale = scale_of(packed.get_submodule(fqn))
            packed.set_submodule(fqn, tied)


def method_of(bits: HeadBits, width: int) -> QuantMethod:
    """Return the method that rounds an embedding or head with `width` columns."""
    settings: dict[str, Any] = {"name": "uniform", "bits": bits}
    if bits == 4 and width % GROUP == 0:
        settings |= {"granularity": "group", "group_size": GROUP}
    return find("uniform")(**settings)


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: HeadBits) -> Head:
    """Round a model's embedding and head. Raises UserError if either is quantized, has a bias, or is no plain table."""
    names = {id(module): fqn for fqn, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(embedding) is nn.Embedding or (isinstance(embedding, nn.Embedding) and scale_of(embedding) != 1)
    if type(head) is not nn.Linear or head.bias is not None or not plain:
        raise UserError(
            f"export.head_bits={bits}: the embedding or the head of {type(model).__name__} is quantized already, has a "
            f"bias, or is no plain table; leave it out"
        )
    method = method_of(bits, embedding.embedding_dim)
    codes = {names[id(head)]: encode(head.weight, method)}
    if head.weight is embedding.weight:
        return Head(method, codes, {names[id(embedding)]: names[id(head)]})
    codes[names[id(embedding)]] = encode(embedding.weight, method)
    return Head(method, codes, {})


def encode(weight: Tensor, method: QuantMethod) -> Codes:
    """Return the codes of a weight [rows, width]."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    layer: QuantLinear = method.layer(linear, method)
    return layer.encode()


@contextmanager
def rounded(model: PreTrainedModel, head: Head | None) -> Iterator[None]:
    """Let `model` compute with the rounded embedding and head while the block runs."""
    if head is None:
        yield
        return
    weights = {fqn: model.get_submodule(fqn).get_parameter("weight") for fqn in head.codes}
    kept = {fqn: weight.data for fqn, weight in weights.items()}
    try:
        for fqn, weight in weights.items():
            weight.data = head.method.layer.decode(head.codes[fqn]).to(weight.dtype)
        yield
    finally:
        for fqn, weight in weights.items():
            weight.data = kept[fqn]
