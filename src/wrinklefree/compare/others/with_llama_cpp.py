"""llama.cpp's own low-bit types, with an importance matrix of the training text.

The model is written as GGUF in fp16, quantized by llama.cpp in a process of its own (`llama_worker.py`), and read back.
Types of 256 weights a block do not divide every width, and llama.cpp takes one of 4 bits or more where they do not.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.compare.others import Asked, Rounded
from wrinklefree.core.errors import UserError
from wrinklefree.export.formats import gguf as writing
from wrinklefree.gguf.header import read_header
from wrinklefree.gguf.names import gguf_names
from wrinklefree.gguf.values import read_weight

WORKER = Path(__file__).with_name("llama_worker.py")


def kind(name: str, asked: Asked) -> Iterator[tuple[str, Rounded]]:
    """Quantize the model to a type such as Q2_K. Raises UserError if GGUF has no such model, or llama.cpp fails."""
    arch = writing.architecture(asked.model)
    with TemporaryDirectory() as place:
        plain, target = Path(place, "f16.gguf"), Path(place, "made.gguf")
        write(asked.model, plain)
        quantize(Path(sys.executable), plain, target, name, importance(asked.model, asked.layers, asked.rows()))
        header = read_header(target)
        for fqn in asked.layers:
            parameter = f"{fqn}.weight"
            stored = [header.tensors[place].nbytes for place in gguf_names(parameter, arch)]
            yield (
                fqn,
                Rounded(read_weight(header, parameter, writing.heads_in(parameter, asked.model)), 8 * sum(stored)),
            )


def write(model: PreTrainedModel, file: Path) -> None:
    """Write a model to a GGUF file with fp16 weights and no tokenizer, so that its size is that of the tensors."""
    import gguf

    writer = gguf.GGUFWriter(file, writing.architecture(model))
    writing.describe(writer, model, writing.FILE_TYPES["F16"])  # llama.cpp's quantizer replaces the type
    writer.add_tokenizer_model("no_vocab")
    kinds = {name: "F16" if tensor.ndim > 1 else "F32" for name, tensor in writing.tensors(model).items()}
    writing.write_tensors(writer, model, {}, kinds)


@torch.no_grad()
def importance(model: PreTrainedModel, layers: Mapping[str, nn.Linear], rows: Tensor) -> dict[str, Tensor]:
    """The mean square of each input [in] of `layers` over `rows`, by llama.cpp's tensor names."""
    sums: dict[str, Tensor] = {}

    def watch(fqn: str, linear: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[fqn] = sums.get(fqn, torch.zeros(linear.in_features)) + inputs[0].square().flatten(0, -2).sum(0)

        return linear.register_forward_pre_hook(see)

    handles = [watch(fqn, linear) for fqn, linear in layers.items()]
    for row in rows:
        model.base_model(row.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    arch = writing.architecture(model)
    return {gguf_names(f"{fqn}.weight", arch)[0]: total / rows.numel() for fqn, total in sums.items()}


def quantize(python: Path, source: Path, target: Path, kind: str, matrix: Mapping[str, Tensor]) -> None:
    """Quantize a GGUF file to `kind`, with the embedding at 8 bits. Raises UserError if llama.cpp fails."""
    file = target.with_suffix(".npz")
    np.savez(file, **{name: values.numpy() for name, values in matrix.items()})  # type: ignore[arg-type]
    command = [str(part) for part in (python, WORKER, "quantize", source, target, kind, file)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"llama.cpp could not make {kind}; its message is above. Leave it out with --references")
    file.unlink()
