"""How much memory a run takes, from the shapes of its model alone. Scales are a few percent at most, and left out.

N parameters; of these E outside of the decoder layers, and n in the largest layer, whose linear layers are [out, in].
T tokens in a batch, V words. Bytes:

| a run that only rebuilds blocks | |
|---|---|
| embedding, head and norms, for both models | 4 E |
| calibrating a block: its masters, second moments of its inputs, a factorization | 4 n + 8 sum in^2 + 40 max in^2 |
| training it: master, copy, gradient, 2 moments, effective weight, its gradient | 28 n + 8 T sum (in + out) |
| measuring: one layer and its effective weight; the logits of `CHUNK` tokens | 8 n + 4 T sum (in + out) + 24 V CHUNK |
| packing: codes as they are written and as they are read, twice; one layer | bits / 2 (N - E) + 8 n |

Only one of the last four happens at a time.

| any other run | |
|---|---|
| the original, and the model that is trained | 8 N |
| gradients, and moments of AdamW; of Muon | 12 N; 8 N |
| effective weights | 4 N, or 2 N if matrices are multiplied in bf16 |
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from wrinklefree.config.schema import TrainingConfig
from wrinklefree.core import surgery
from wrinklefree.core.method import QuantMethod
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.objectives.losses import CHUNK
from wrinklefree.training.plan import MAX_LENGTH, choose_dtype

Parts = dict[str, float]  # bytes by what they are for; together they are the peak

PROCESS = 5e8  # Python, torch and transformers

AVAILABLE, LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def of_blocks(model: PreTrainedModel, method: QuantMethod, t: TrainingConfig) -> Parts:
    """The parts of the peak of a run that only rebuilds blocks."""
    plain = _count(model.parameters())
    blocks = decoder_layers(model)
    outside = plain - _count(blocks.parameters())
    largest = max(blocks, key=lambda block: _count(block.parameters()))
    n = _count(largest.parameters())
    inside = set(largest.modules())
    linears = [linear for _, linear in surgery.linears(model, method.exclude_names) if linear in inside]
    widths = sum(linear.in_features + linear.out_features for linear in linears)
    squares = [linear.in_features**2 for linear in linears]
    tokens = t.blockwise.batch_size * t.blockwise.max_seq_length
    words = model.config.get_text_config().vocab_size
    steps = {
        "a block's calibration": 4 * n + 8 * sum(squares) + 40 * max(squares, default=0),
        "a block's training": 28 * n + 8 * tokens * widths,
        "measuring": 8 * n + 4 * t.batch_size * _length(t, model) * widths + 24 * words * CHUNK,
        "packing": (method.weight_bits or 4) / 2 * (plain - outside) + 8 * n,
    }
    peak = max(steps, key=steps.__getitem__)
    return {"embedding and head": 4 * outside, peak: steps[peak], "the program": PROCESS}


def of_training(model: PreTrainedModel, t: TrainingConfig) -> Parts:
    """The parts of the peak of a run that trains `model` as a whole, without what a batch takes."""
    N = _count(model.parameters())
    dtype = choose_dtype(t.precision, torch.device("cpu"))
    moments = 8 if t.optimizer.name == "adamw" else 4
    steps = {} if t.max_steps == 0 else {"gradients and moments": (4 + moments) * N}
    return {"two models in fp32": 8 * N, "effective weights": dtype.itemsize * N, **steps, "the program": PROCESS}


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _length(t: TrainingConfig, model: PreTrainedModel) -> int:
    length = t.max_seq_length
    return min(MAX_LENGTH, model.config.max_position_embeddings) if isinstance(length, str) else length


def available() -> float | None:
    """The bytes that a process can still get, which a container may limit. None if the system does not say."""
    if not AVAILABLE.is_file():
        return None
    fields = dict(line.split(":") for line in AVAILABLE.read_text().splitlines())
    free = 1024 * sum(float(fields[key].split()[0]) for key in ("MemAvailable", "SwapFree"))
    limit = LIMIT.read_text().strip() if LIMIT.is_file() else "max"
    return free if limit == "max" else min(free, float(limit))
