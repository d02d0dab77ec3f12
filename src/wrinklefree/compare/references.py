"""What one could have without any training: the original, integers, and the one-shot quantizers of others.

Each puts other weights into the decoder layers of a copy of the original. The embedding has 8 bits, as ours have.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.compare import formulas
from wrinklefree.compare.quality import Test
from wrinklefree.compare.rows import Row
from wrinklefree.core import products
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import find
from wrinklefree.export.rounded import head

ORIGINAL = "original"
GROUP = 64
EXCLUDED = ("embed_tokens", "lm_head")  # as our methods leave them


@dataclass(frozen=True)
class Rounded:
    """A weight that codes stand for, and the bits that the codes and their scales take."""

    weight: Tensor
    bits: float


Rounding = Callable[[Tensor], Rounded]  # of a weight [out, in]


def integers(bits: int, weight: Tensor) -> Rounded:
    """Our method `uniform`: 8 bits with a scale per row, fewer with one per group."""
    settings: dict[str, Any] = {"name": "uniform", "bits": bits}
    if bits < 8:
        settings |= {"granularity": "group", "group_size": group_of(weight)}
    method = find("uniform")(**settings)
    codes = head.encode(weight, method)
    return Rounded(method.decode(codes), codes.num_bits() / weight.numel())


def one_shot(quantizer: formulas.Quantizer, bits: Callable[[int], float], weight: Tensor) -> Rounded:
    """A quantizer of `formulas.py` with 2 bits."""
    group = group_of(weight)
    return Rounded(quantizer(weight, group), bits(group))


def group_of(weight: Tensor) -> int:
    """The largest group of at most `GROUP` columns that divides a row."""
    return math.gcd(GROUP, weight.shape[1])


REFERENCES: dict[str, Rounding] = {
    "int8": partial(integers, 8),
    "int4": partial(integers, 4),
    "rtn_2bit": partial(one_shot, formulas.rtn, formulas.rtn_bits),
    "hqq_2bit": partial(one_shot, formulas.hqq, formulas.hqq_bits),
}


def check(names: list[str]) -> None:
    """Raises UserError if a name is none of `REFERENCES`."""
    unknown = [name for name in names if name not in REFERENCES]
    if unknown:
        raise UserError(f"--references {unknown[0]}: there are {', '.join(REFERENCES)}, and none")


def original(test: Test) -> Row:
    """The row of the original, whose file has 16 bits a parameter."""
    parameters = test.original.num_parameters()
    size = {"bits": 16.0, "bits_per_parameter": 16.0, "coverage": 0.0, "bytes": 2 * parameters}
    return Row(method=ORIGINAL, **size, **asdict(test.measure(test.original)))


@torch.no_grad()
def reference(name: str, test: Test) -> Row:
    """The row of one of `REFERENCES`."""
    began = time.perf_counter()
    model = copy.deepcopy(test.original)
    linears = products.open_products(model, EXCLUDED)
    bits = 0.0
    for linear in linears.values():
        rounded = REFERENCES[name](linear.weight.data.float())
        linear.weight.data = rounded.weight.to(linear.weight.dtype)
        bits += rounded.bits * linear.weight.numel()
    minutes = (time.perf_counter() - began) / 60
    weights = sum(linear.weight.numel() for linear in linears.values())
    size = file_bytes(model, linears, bits)
    with head.rounded(model, head.quantize(model, 8)):
        figures = test.measure(model)
    return Row(
        method=name,
        bits=bits / weights,
        bits_per_parameter=8 * size / model.num_parameters(),
        coverage=weights / sum(p.numel() for p in products.blocks(model).values()),
        bytes=size,
        minutes=minutes,
        **asdict(figures),
    )


def file_bytes(model: PreTrainedModel, linears: Mapping[str, nn.Module], bits: float, head_bits: int = 8) -> int:
    """The bytes of a file with `bits` in all for its `linears`, and `head_bits` a number of embedding and head.

    With 8 bits these have an fp16 scale per row, with 4 one per 32 columns. Everything else is bf16. The header is not
    counted.
    """
    inside = {id(linear.get_parameter("weight")) for linear in linears.values()}
    tables = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    total = bits / 8
    for parameter in model.parameters():  # a tied head comes once
        if id(parameter) in tables:
            scales = {8: parameter.shape[0], 4: parameter.numel() / 32}.get(head_bits, 0)
            total += parameter.numel() * head_bits / 8 + 2 * scales
        elif id(parameter) not in inside:
            total += 2 * parameter.numel()
    return math.ceil(total)
