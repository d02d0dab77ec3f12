"""llama.cpp as a peer: the model's GGUF file, the importance matrix, and the process that quantizes and runs.

`llama_worker.py` runs in the Python of a venv that has `llama-cpp-python`.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real.measure import block_linears
from wrinklefree.export.formats import gguf as writing
from wrinklefree.gguf.names import gguf_names

WORKER = Path(__file__).with_name("llama_worker.py")


def write(model: Any, file: Path) -> None:
    """Write a Llama to a GGUF file with fp16 weights and no tokenizer, so that its size is that of the tensors."""
    import gguf

    writer = gguf.GGUFWriter(file, writing.architecture(model))
    writing.describe(writer, model, writing.FILE_TYPES["F16"])  # llama.cpp's quantizer replaces the type
    writer.add_tokenizer_model("no_vocab")
    kinds = {name: "F16" if tensor.ndim > 1 else "F32" for name, tensor in writing.tensors(model).items()}
    writing.write_tensors(writer, model, {}, kinds)


@torch.no_grad()
def importance(model: Any, rows: Tensor) -> dict[str, Tensor]:
    """The mean square of each input [in] of the block's linear layers over `rows`, by llama.cpp's tensor names."""
    sums: dict[str, Tensor] = {}

    def watch(fqn: str, linear: Any) -> Any:
        def see(_: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[fqn] = sums.get(fqn, torch.zeros(linear.in_features)) + inputs[0].square().flatten(0, -2).sum(0)

        return linear.register_forward_pre_hook(see)

    handles = [watch(fqn, linear) for fqn, linear in block_linears(model).items()]
    for row in rows:
        model.base_model(row.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    arch = writing.architecture(model)
    return {gguf_names(f"{fqn}.weight", arch)[0]: total / rows.numel() for fqn, total in sums.items()}


def quantize(python: Path, source: Path, target: Path, kind: str, matrix: dict[str, Tensor]) -> None:
    """Quantize a GGUF file to `kind`, with the embedding at 8 bits."""
    file = target.with_suffix(".npz")
    arrays: dict[str, Any] = {name: values.numpy() for name, values in matrix.items()}
    np.savez(file, **arrays)
    subprocess.run([python, WORKER, "quantize", source, target, kind, file], check=True)
    file.unlink()


def bits_per_block_weight(file: Path) -> float:
    """Stored bits per weight of the blocks' matrices."""
    import gguf

    tensors = [t for t in gguf.GGUFReader(file).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


class Runner:
    """A process with one GGUF file. Call it with token ids [length] to get logits [length, words]."""

    def __init__(self, python: Path, file: Path, words: int) -> None:
        self.words = words
        command = [str(python), str(WORKER), "logits", str(file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, ids: Tensor) -> Tensor:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(ids.tolist()).encode() + b"\n")
        self.process.stdin.flush()
        wanted = 4 * len(ids) * self.words
        read = bytearray(self.process.stdout.read(wanted))
        if len(read) < wanted:
            raise RuntimeError("llama.cpp ended early; its message is above")
        return torch.frombuffer(read, dtype=torch.float32).view(len(ids), self.words)

    def close(self) -> None:
        self.process.communicate()
