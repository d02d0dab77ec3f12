"""llama.cpp as a peer: the process that runs a GGUF file, and what the file takes.

The worker runs in the Python of a venv that has `llama-cpp-python`.
"""

import json
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from wrinklefree.compare.others.with_llama_cpp import WORKER


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
