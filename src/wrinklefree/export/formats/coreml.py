"""`--format coreml`: a model package for Core ML (iOS 18, macOS 15) that keeps codes and tables as they were trained.

    folder/model.mlpackage     functions `prefill` (64 ids at a time) and `decode` (one id), which share their weights
                               and the states for keys and values; export/coreml/program.py writes the program
    folder/tokenizer files     as transformers writes them

A quantized layer stays codes and a table, with a product by its scales before and after the convolution. If its rank
is above `factored_rank`, it is baked: stored as its effective weight in fp16. Everything else is fp16.

The package is read back with coremltools, and has to pass these checks:
- codes are equal, and tables and scales are equal in fp16;
- the weights file is not larger than predicted;
- the logits of the stored program, which torch computes, are close to the trained model's.
"""

import contextlib
import io
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.method import quant_layers, rounds_inputs
from wrinklefree.export.proof.agreement import Agreement, compare, judge
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.decoder import Sizes, attention_sizes, refuse_other_decoders
from wrinklefree.export.views.lut import Palette, palettes
from wrinklefree.tracking.terminal import short_size

NEEDS = "coremltools"
NEXT = "on macOS 15, coremltools.models.MLModel('{target}/model.mlpackage', function_name='prefill')"
USE = """\
On macOS 15, iOS 18 or newer; in Python with coremltools:

```python
import coremltools

prefill = coremltools.models.MLModel("{name}/model.mlpackage", function_name="prefill")  # 64 ids at a time
decode = coremltools.models.MLModel("{name}/model.mlpackage", function_name="decode")  # one id
```

Inputs are `input_ids` int32 `[1, 64]` or `[1, 1]`, and `position` int32 `[1]`, the position of the first id. The output
is `logits`. Keys and values are the states `k_cache` and `v_cache`. The tokenizer beside it is read by transformers.
"""
LIBRARY = "coreml"
WEIGHTS = "*.mlpackage"
OPTIONS = {
    "factored_rank": {
        "min": 0,
        "help": "Core ML, Core AI: layers with more scale products than this (default 8) become fp16 weights.",
    }
}

PREFILL = 64  # ids at a time
SEQUENCES, TOKENS = 4, 256  # texts that are compared, and tokens of each
KL_CONSTANTS = 1e-5  # nats allowed for embeddings, norms and rotary tables in fp16; measured on `tiny`: 1e-7
KL_ACTIVATIONS = 0.05  # nats allowed for activations that are no longer rounded to int8


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
    factored_rank: int = 8,
) -> list[list[str]]:
    """Write `folder/model.mlpackage`, read it back and compare. Returns rows of a table.

    Raises UserError if the program cannot express the model, CertificateError if the package is not the trained model.
    """
    require_coremltools()
    refuse_other_decoders(model, "coreml")
    layers = palettes(model, "coreml")
    sizes = attention_sizes(model)
    package = folder / "model.mlpackage"
    save(model, layers, sizes, package, factored_rank)
    tokenizer.save_pretrained(folder)
    functions = read(package)
    check_constants(functions, layers, factored_rank)
    expected, found = predicted_bytes(model, layers, sizes, factored_rank), weights_bytes(package)
    if found > expected:
        raise CertificateError(f"{package.name}: {found} bytes of weights instead of {expected}: some are stored twice")
    exact, rounded = (agreement(model, functions, batches, fp16) for fp16 in (False, True))
    judge(exact, KL_ACTIVATIONS if rounds_inputs(model) else KL_CONSTANTS, "--format coreml")
    baked = [layer.rank > factored_rank for layer in layers.values()].count(True)
    folded = [layer.rank == 1 <= factored_rank for layer in layers.values()].count(True)
    return [
        ["package", f"{package.name}, {short_size(_package_bytes(package))}"],
        ["weights, bytes found (predicted)", f"{found:,} ({expected:,})"],
        ["layers with identical codes", f"{len(layers) - baked} of {len(layers)}"],
        ["of these as one convolution, of rank 1", str(folded)],
        [f"layers baked in fp16, above rank {factored_rank}", str(baked)],
        ["context", f"{sizes.context:,} ids"],
        *exact.rows(),
        ["KL with all results rounded to fp16, nats", f"{rounded.kl_mean:.1e}"],
        ["run by Core ML", "no, that takes macOS 15: torch followed the stored program"],
    ]


def require_coremltools() -> None:
    """Import coremltools without its warnings. Raises UserError if it is not installed."""
    # On import it warns that this torch was not tested (with its tracer, which is not used) and that it cannot predict
    # on Linux.
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools  # noqa: F401


def save(model: PreTrainedModel, layers: Mapping[str, Palette], sizes: Sizes, package: Path, factored: int) -> None:
    """Write a package with the functions `prefill` and `decode`, which share one copy of the weights."""
    import coremltools as ct

    from wrinklefree.export.coreml.program import build_program

    both = ct.utils.MultiFunctionDescriptor()
    parts = {"prefill": min(PREFILL, sizes.context), "decode": 1}
    with _no_progress_bars():
        for name, length in parts.items():
            part = package.with_name(f"{name}.mlpackage")
            ct.convert(
                build_program(model, layers, sizes, length, factored),
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,  # leaves the program's types as they are, fp16
                skip_model_load=True,
            ).save(str(part))
            both.add_function(str(part), src_function_name="main", target_function_name=name)
        both.default_function_name = "decode"
        ct.utils.save_multifunction(both, str(package))
    for name in parts:
        shutil.rmtree(package.with_name(f"{name}.mlpackage"))


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide stderr while the block runs: coremltools draws progress bars there, and has no setting to turn them off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def read(package: Path) -> dict[str, Any]:
    """Return the functions of a package by name."""
    from wrinklefree.export.coreml.interpreter import functions

    return functions(package)


def check_constants(functions: Mapping[str, Any], layers: Mapping[str, Palette], factored: int) -> None:
    """Raises CertificateError if a code, table or scale differs in any function of the package."""
    from wrinklefree.export.coreml.program import op_name

    for function in functions.values():
        operations = {operation.name: operation for operation in function.operations}
        for fqn, layer in layers.items():
            same = _same_baked if layer.rank > factored else _same_palette
            if not same(operations, op_name(fqn), layer):
                raise CertificateError(f"{fqn}: codes, table or scales differ after reading the package back")


def _same_baked(operations: Mapping[str, Any], name: str, layer: Palette) -> bool:
    return np.array_equal(operations[name].weight.val[:, :, 0, 0], layer.weight().half().numpy())


def _same_palette(operations: Mapping[str, Any], name: str, layer: Palette) -> bool:
    """Whether the layer's operations hold its codes, table and scales.

    `name` is the convolution, `name_out` the product after it, `name_in` the one before it, absent if b is all ones.
    """
    table = operations[name].weight.op
    b = operations[f"{name}_in"].y.val[:, :, 0, 0] if layer.has_b() else np.ones(layer.b.shape)
    return (
        table.op_type == "constexpr_lut_to_dense"
        and np.array_equal(table.indices.val[:, :, 0, 0], layer.index.numpy())
        and np.array_equal(table.lut.val.flatten(), layer.lut.numpy())
        and np.array_equal(operations[f"{name}_out"].y.val[:, :, 0, 0], layer.a.T.numpy())
        and np.array_equal(b, layer.b.numpy())
    )


def predicted_bytes(model: PreTrainedModel, layers: Mapping[str, Palette], sizes: Sizes, factored: int) -> int:
    """Return the size of the weights file in bytes. It may be smaller, because equal constants are stored once."""
    # The file has a header of 64 bytes. Each constant has one too, and is padded to a multiple of 64 (except the last).
    # Constants of fewer than 10 entries are in the program instead.
    baked = {fqn for fqn, layer in layers.items() if layer.rank > factored}
    constants = [constant for fqn, layer in layers.items() if fqn not in baked for constant in layer.constants()]
    halves = [layers[fqn].index.numel() for fqn in baked] + _unquantized(model)
    halves += [sizes.head_dim * sizes.context] * 2  # cosines and sines
    constants += [(entries, 2 * entries) for entries in halves]
    constants += [(entries, 4 * entries) for entries in (sizes.context, min(PREFILL, sizes.context))]  # column numbers
    return 64 + sum(64 + -(-size // 64) * 64 for entries, size in constants if entries >= 10)


def _unquantized(model: PreTrainedModel) -> list[int]:
    """Return the number of entries of each bias, gain, embedding and head that is not quantized."""
    quantized = {
        f"{fqn}.{name}"
        for fqn, layer in quant_layers(model).items()
        for name, _ in layer.named_parameters(recurse=False)
        if name != "bias"
    }
    kept = [(name, p) for name, p in model.named_parameters() if name not in quantized]  # a tied head is not named
    # A gain is twice as long in the program, which applies it to (x, -x).
    return [p.numel() * (2 if p.ndim == 1 and not name.endswith("bias") else 1) for name, p in kept]


def weights_bytes(package: Path) -> int:
    """Return the size of the package's weights file in bytes."""
    return (package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").stat().st_size


def _package_bytes(package: Path) -> int:
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())


def agreement(
    model: PreTrainedModel, functions: Mapping[str, Any], batches: Iterable[Mapping[str, Tensor]], rounded: bool
) -> Agreement:
    """Compare the stored program's logits with the trained model's, for texts that begin at position 0."""
    from wrinklefree.export.coreml.interpreter import Decoder

    rows = (row.unsqueeze(0)[:, :TOKENS] for batch in batches for row in batch["input_ids"])
    texts = [{"input_ids": row} for row in islice(rows, SEQUENCES)]
    return compare(model, cast(PreTrainedModel, Decoder(functions, rounded)), texts)
