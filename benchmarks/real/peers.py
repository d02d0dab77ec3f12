"""What one would pick instead, measured: each peer is a function from the set-up to a row of the table.

| peer | stored bits per block weight | what it needs |
|---|---|---|
| rtn, rtn_uniform | 2 and an integer zero, or our `uniform`: 3 levels around 0; groups of 64 | nothing |
| hqq | 2, an fp16 scale and a real zero for 64 | nothing: the published formula (`compare/formulas.py`) |
| auto_round_asym, _sym | 2, an fp16 scale for 64, and an integer zero if asymmetric | a venv with `auto-round` |
| ..._rows | the same with one scale for a row: about the bytes of our W2 | as above |
| llama_* | what llama.cpp makes of the type; rows that are no multiple of 256 get 4 bits or more | `llama-cpp-python` |

All see the same calibration tokens, and have the embedding at 8 bits. Minutes are CPU minutes of one thread.
The venvs of the last two, given by --auto-round-python and --llama-python:

    python3 -m venv A && A/bin/pip install torch==2.13.0 auto-round==0.16.1
    python3 -m venv L && L/bin/pip install numpy llama-cpp-python==0.3.36
"""

import copy
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.real import llama
from benchmarks.real.measure import Test, block_linears, measure, of_model
from benchmarks.real.rows import Row
from wrinklefree.compare import formulas
from wrinklefree.compare.others import with_auto_round, with_llama_cpp
from wrinklefree.compare.references import file_bytes
from wrinklefree.core.codes import Codes
from wrinklefree.export.rounded import head
from wrinklefree.methods.uniform import Config as Uniform

GROUP = 64
ROWS = -1  # a group is a whole row, as AutoRound says it


@dataclass(frozen=True)
class Setup:
    """The original, what is measured, and where peers keep their files."""

    folder: Path  # of the original
    model: Any  # the original in fp32
    test: Test
    rows: Tensor  # calibration tokens [rows, length]
    out: Path
    auto_round_python: Path
    auto_round_iters: int
    llama_python: Path

    def place(self, name: str) -> Path:
        """The folder of one peer's files."""
        place = self.out / "peers" / name
        place.mkdir(parents=True, exist_ok=True)
        return place


Peer = Callable[[Setup, str], Row]
Bits = Callable[[int], float]  # the columns of a group -> bits per weight
Rounded = Callable[[str, Tensor], Tensor]  # fqn and weight [out, in] -> the weight that the codes stand for


def cpu_minutes() -> float:
    """CPU minutes of this process and of the children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used) / 60


def dense_row(setup: Setup, name: str, rounded: Rounded, bits: float, source: str, minutes: float = 0.0) -> Row:
    """Measure the original with its block weights replaced, and the embedding at 8 bits."""
    before = cpu_minutes()
    model = copy.deepcopy(setup.model)
    layers = block_linears(model)
    for fqn, linear in layers.items():
        linear.weight.data = rounded(fqn, linear.weight.data)
    minutes += cpu_minutes() - before
    with head.rounded(model, head.quantize(model, 8)):
        quality = measure(of_model(model), setup.test)
    size = file_bytes(model, layers, bits * sum(linear.weight.numel() for linear in layers.values()))
    return Row.of(name, quality, bits=bits, bytes=size, minutes=minutes, source=source)


def original(setup: Setup, name: str) -> Row:
    """The original as it is. Its bytes are those of a file in 16 bits."""
    quality = measure(of_model(setup.model), setup.test)
    size = 2 * setup.model.num_parameters()
    return Row.of(name, quality, bits=16.0, bytes=size, minutes=0.0, source=str(setup.folder))


def original_int8_embedding(setup: Setup, name: str) -> Row:
    """The original with the embedding at 8 bits: what that alone costs all others."""
    return dense_row(setup, name, lambda _, weight: weight, 16.0, "embedding at 8 bits")


def formula(setup: Setup, name: str, quantizer: formulas.Quantizer, bits: Bits, group: int = GROUP) -> Row:
    """A one-shot quantizer of `compare/formulas.py`."""

    def rounded(_: str, weight: Tensor) -> Tensor:
        return quantizer(weight, columns(weight, group))

    return dense_row(setup, name, rounded, mean_bits(setup, bits, group), told(group))


def columns(weight: Tensor, group: int) -> int:
    """The columns of a group."""
    return weight.shape[1] if group == ROWS else group


def mean_bits(setup: Setup, bits: Bits, group: int) -> float:
    """Bits per weight over all layers."""
    weights = [linear.weight for _, linear in linears(setup)]
    return sum(bits(columns(w, group)) * w.numel() for w in weights) / sum(w.numel() for w in weights)


def told(group: int) -> str:
    return "whole rows" if group == ROWS else f"groups of {group}"


def uniform(setup: Setup, name: str) -> Row:
    """Our method `uniform`, rounded to nearest."""
    method = Uniform(bits=formulas.BITS, granularity="group", group_size=GROUP)
    codes: dict[str, Codes] = {fqn: head.encode(linear.weight, method) for fqn, linear in linears(setup)}
    bits = sum(c.num_bits() for c in codes.values()) / sum(c.index.numel() for c in codes.values())
    return dense_row(setup, name, lambda fqn, _: method.decode(codes[fqn]), bits, f"uniform, groups of {GROUP}")


def linears(setup: Setup) -> list[tuple[str, Any]]:
    return list(block_linears(setup.model).items())


def auto_round(setup: Setup, name: str, symmetric: bool, group: int = GROUP) -> Row:
    """AutoRound, run once in its own venv; its weights are kept."""
    place = setup.place(name)
    chosen = {"bits": formulas.BITS, "group_size": group, "sym": symmetric}
    chosen |= {"iters": setup.auto_round_iters, "batch_size": 8}
    if not (place / "cost.json").exists():
        with_auto_round.run(setup.auto_round_python, setup.folder, place, chosen, setup.rows)
    weights = load_file(place / "model.safetensors")
    minutes = json.loads((place / "cost.json").read_text())["cpu_seconds"] / 60
    source = f"{json.dumps(chosen)} on {list(setup.rows.shape)} tokens"
    bits = mean_bits(setup, partial(formulas.rtn_bits, zeros=not symmetric), group)
    return dense_row(setup, name, lambda fqn, _: weights[f"{fqn}.weight"].float(), bits, source, minutes)


def llama_cpp(setup: Setup, name: str, kind: str) -> Row:
    """llama.cpp's own quantizer with an importance matrix of the calibration tokens."""
    place, before, wall = setup.place(name), cpu_minutes(), time.perf_counter()
    plain, target = place / "f16.gguf", place / f"{kind}.gguf"
    with_llama_cpp.write(setup.model, plain)
    matrix = with_llama_cpp.importance(setup.model, block_linears(setup.model), setup.rows)
    with_llama_cpp.quantize(setup.llama_python, plain, target, kind, matrix)
    plain.unlink()
    minutes = cpu_minutes() - before
    print(f"{name}: {(time.perf_counter() - wall) / 60:.1f} minutes on the clock")
    runner = llama.Runner(setup.llama_python, target, setup.model.config.vocab_size)
    quality = measure(runner, setup.test)
    runner.close()
    figures = {"bits": llama.bits_per_block_weight(target), "bytes": target.stat().st_size}
    source = f"importance of {list(setup.rows.shape)} tokens, embedding Q8_0"
    return Row.of(name, quality, **figures, minutes=minutes, source=source)


PEERS: dict[str, Peer] = {
    "original_embedding8": original_int8_embedding,
    "rtn": partial(formula, quantizer=formulas.rtn, bits=formulas.rtn_bits),
    "rtn_rows": partial(formula, quantizer=formulas.rtn, bits=formulas.rtn_bits, group=ROWS),
    "rtn_uniform": uniform,
    "hqq": partial(formula, quantizer=formulas.hqq, bits=formulas.hqq_bits),
    "hqq_rows": partial(formula, quantizer=formulas.hqq, bits=formulas.hqq_bits, group=ROWS),
    "llama_q4_0": partial(llama_cpp, kind="Q4_0"),
    "llama_q2_k": partial(llama_cpp, kind="Q2_K"),
    "llama_iq2_s": partial(llama_cpp, kind="IQ2_S"),
    "llama_iq2_xs": partial(llama_cpp, kind="IQ2_XS"),
    "auto_round_asym": partial(auto_round, symmetric=False),
    "auto_round_sym": partial(auto_round, symmetric=True),
    "auto_round_asym_rows": partial(auto_round, symmetric=False, group=ROWS),
    "auto_round_sym_rows": partial(auto_round, symmetric=True, group=ROWS),
}
