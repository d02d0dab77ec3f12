"""What one could have without any training: the original, integers, and the one-shot quantizers of others.

Each puts other weights into the decoder layers of a copy of the original. The embedding has 8 bits, as ours have.
"""

import copy
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.compare import formulas
from wrinklefree.compare.others import Asked, Maker, Rounded, with_auto_round, with_llama_cpp, with_torchao
from wrinklefree.compare.quality import Test
from wrinklefree.compare.rows import Row
from wrinklefree.core import products
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import find
from wrinklefree.evaluate.speed import decoding_speed, weight_bytes
from wrinklefree.export.rounded import head

ORIGINAL = "original"
GROUP = 64
EXCLUDED = ("embed_tokens", "lm_head")  # as our methods leave them


def integers(bits: int, weight: Tensor) -> Rounded:
    """Our method `uniform`: 8 bits with a scale per row, fewer with one per group."""
    settings: dict[str, Any] = {"name": "uniform", "bits": bits}
    if bits < 8:
        settings |= {"granularity": "group", "group_size": group_of(weight)}
    method = find("uniform")(**settings)
    codes = head.encode(weight, method)
    return Rounded(method.decode(codes), codes.num_bits())


def one_shot(quantizer: formulas.Quantizer, bits: Callable[[int], float], weight: Tensor) -> Rounded:
    """A quantizer of `formulas.py` with 2 bits."""
    group = group_of(weight)
    return Rounded(quantizer(weight, group), bits(group) * weight.numel())


def group_of(weight: Tensor) -> int:
    """The largest group of at most `GROUP` columns that divides a row."""
    return math.gcd(GROUP, weight.shape[1])


def alone(rounding: Callable[[Tensor], Rounded], asked: Asked) -> Iterator[tuple[str, Rounded]]:
    """Round each weight [out, in] by itself."""
    for name, linear in asked.layers.items():
        yield name, rounding(linear.weight.data.float())


@dataclass(frozen=True)
class Reference:
    """How the weights are made, and the packages that this needs."""

    make: Maker
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Those of its packages that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


LLAMA = ("llama_cpp", "gguf")
PACKAGES = {"torchao": "torchao", "auto_round": "auto-round", "llama_cpp": "llama-cpp-python", "gguf": "gguf"}

REFERENCES: dict[str, Reference] = {
    "int8": Reference(partial(alone, partial(integers, 8))),
    "int4": Reference(partial(alone, partial(integers, 4))),
    "rtn_2bit": Reference(partial(alone, partial(one_shot, formulas.rtn, formulas.rtn_bits))),
    "hqq_2bit": Reference(partial(alone, partial(one_shot, formulas.hqq, formulas.hqq_bits))),
    "torchao_int8": Reference(partial(with_torchao.integers, 8), ("torchao",)),
    "torchao_int4": Reference(partial(with_torchao.integers, 4), ("torchao",)),
    "auto_round_2bit": Reference(with_auto_round.asymmetric, ("auto_round",)),
    "llama_q4_0": Reference(partial(with_llama_cpp.kind, "Q4_0"), LLAMA),
    "llama_q2_k": Reference(partial(with_llama_cpp.kind, "Q2_K"), LLAMA),
    "llama_iq2_xs": Reference(partial(with_llama_cpp.kind, "IQ2_XS"), LLAMA),
}


def installed() -> list[str]:
    """The names of `REFERENCES` whose packages are installed."""
    return [name for name, reference in REFERENCES.items() if not reference.missing()]


def check(names: list[str]) -> None:
    """Raises UserError if a name is none of `REFERENCES`, or lacks its package."""
    for name in names:
        if name not in REFERENCES:
            raise UserError(f"--references {name}: there are {', '.join(REFERENCES)}, and none")
        if missing := REFERENCES[name].missing():
            raise UserError(f"--references {name}: needs the package {PACKAGES[missing[0]]}: pip install it")


def original(test: Test) -> Row:
    """The row of the original, whose file has 16 bits a parameter. It decodes as it is loaded, on a CPU in fp32."""
    model = test.original
    dtype = str(model.dtype).removeprefix("torch.")
    return Row(
        method=ORIGINAL,
        bits=16.0,
        bits_per_parameter=16.0,
        coverage=0.0,
        bytes=2 * model.num_parameters(),
        tokens_per_second=decoding_speed(model, test.run.tokenizer),
        engine=f"transformers, {dtype}",
        memory=weight_bytes(model),
        **asdict(test.measure(model)),
    )


@torch.no_grad()
def reference(name: str, test: Test) -> Row:
    """The row of one of `REFERENCES`."""
    began = time.perf_counter()
    model = copy.deepcopy(test.original)
    linears = products.open_products(model, EXCLUDED)
    asked = Asked(model, linears, test.run.tokenizer, test.training_rows)
    bits = 0.0
    for fqn, rounded in REFERENCES[name].make(asked):
        linear = linears[fqn]
        linear.weight.data = rounded.weight.to(linear.weight.dtype)
        bits += rounded.bits
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
