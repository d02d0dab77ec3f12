"""`--format coreai`: an asset for Core AI (iOS 27, macOS 27) that keeps codes and tables as they were trained.

    folder/model.aimodel       functions `prefill` (64 ids at a time) and `decode` (one id), which share their weights;
                               the caller owns the states for keys and values. export/coreai/program.py is the program
    folder/tokenizer files     as transformers writes them

A quantized layer stays packed codes and a table, with a product by its scales before and after the matrix product. If
its rank is above `factored_rank`, it is baked: stored as its effective weight in fp16. Everything else is fp16.

The asset is read back with coreai-core, and has to pass these checks:
- packed codes, tables and scales of every layer are among the constants of both functions;
- no constant is stored twice;
- the logits that Core AI's own runtime computes on this CPU are close to the trained model's.
"""

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.codes import pack
from wrinklefree.core.method import rounds_inputs
from wrinklefree.export.proof.agreement import Agreement, compare, judge
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.decoder import Sizes, attention_sizes, refuse_other_decoders
from wrinklefree.export.views.lut import Palette, palettes
from wrinklefree.tracking.terminal import short_size

NEEDS = "coreai_torch"
NEXT = "on macOS 27, coreai.runtime.AIModel.load('{target}/model.aimodel')"
USE = """\
On macOS 27, iOS 27 or newer; in Python with coreai-core, in an async function:

```python
from coreai.runtime import AIModel

model = await AIModel.load("{name}/model.aimodel")  # functions `prefill`, 64 ids at a time, and `decode`, one id
```

Inputs are `input_ids` int32 `[1, 64]` or `[1, 1]`, and `position` int32 `[1]`, the position of the first id. The output
is `logits`. The caller owns the states `k_cache` and `v_cache`, and hands them to each call. The tokenizer beside it is
read by transformers.
"""
LIBRARY = "coreai"
WEIGHTS = "*.aimodel"
OPTIONS = {
    "factored_rank": {
        "min": 0,
        "help": "Core ML, Core AI: layers with more scale products than this (default 8) become fp16 weights.",
    }
}

PREFILL = 64  # ids at a time
SEQUENCES, TOKENS = 4, 128  # texts that are compared, and tokens of each
KL_HALF = 1e-3  # nats allowed for arithmetic in fp16
KL_ACTIVATIONS = 0.05  # nats allowed for activations that are no longer rounded to int8


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
    factored_rank: int = 8,
) -> list[list[str]]:
    """Write `folder/model.aimodel`, read it back and compare. Returns rows of a table.

    Raises UserError if the program cannot express the model, CertificateError if the asset is not the trained model.
    """
    refuse_other_decoders(model, "coreai")
    layers = palettes(model, "coreai")
    sizes = attention_sizes(model)
    asset = folder / "model.aimodel"
    with _quiet():
        save(model, layers, sizes, asset, factored_rank)
        tokenizer.save_pretrained(folder)
        stored = check_constants(asset, layers, factored_rank)
        found = agreement(model, asset, sizes, batches)
    judge(found, KL_ACTIVATIONS if rounds_inputs(model) else KL_HALF, "--format coreai")
    baked = [layer.rank > factored_rank for layer in layers.values()].count(True)
    return [
        ["asset", f"{asset.name}, {short_size(_asset_bytes(asset))}, of these constants {short_size(stored)}"],
        ["layers with identical codes", f"{len(layers) - baked} of {len(layers)}"],
        [f"layers baked in fp16, above rank {factored_rank}", str(baked)],
        ["context", f"{sizes.context:,} ids"],
        *found.rows(),
        ["run by Core AI", "yes, by its own runtime on this CPU, in fp16; on Apple's devices: no"],
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what coreai-torch prints, and its warning about torch's local version ("2.13.0+cpu" is above "2.13.0")."""
    hidden = io.StringIO()
    with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coreai-torch has only been validated")
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)  # torch.export, of itself
        yield


def save(model: PreTrainedModel, layers: Mapping[str, Palette], sizes: Sizes, asset: Path, factored: int) -> None:
    """Write an asset with the functions `prefill` and `decode`, which share one copy of the weights."""
    from coreai_torch import TorchConverter, get_decomp_table

    from wrinklefree.export.coreai.program import Decoder, cache_shape

    decoder = Decoder(model, layers, sizes, factored).eval()
    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    for name, length in {"prefill": min(PREFILL, sizes.context), "decode": 1}.items():
        caches = [torch.zeros(cache_shape(sizes), dtype=torch.half) for _ in range(2)]
        example = (torch.zeros(1, length, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), *caches)
        with torch.no_grad():
            exported = torch.export.export(decoder, example).run_decompositions(get_decomp_table())
        converter.add_exported_program(
            exported,
            input_names=["input_ids", "position"],
            output_names=["logits"],
            state_names=["k_cache", "v_cache"],
            entrypoint_name=name,
        )
    converter.to_coreai().save_asset(asset)


def check_constants(asset: Path, layers: Mapping[str, Palette], factored: int) -> int:
    """Return the bytes of all constants of the asset.

    Raises CertificateError if a code, table or scale is missing from a function, or functions do not share constants.
    """
    from wrinklefree.export.coreai.asset import constants

    functions = constants(asset)
    for function in functions.values():
        for fqn, layer in layers.items():
            if not _expected(layer, factored) <= function:
                raise CertificateError(f"{fqn}: codes, table or scales differ after reading the asset back")
    sizes = [sum(len(data) for _, data in function) for function in functions.values()]
    stored = sum(len(data) for _, data in set.union(*functions.values()))
    if stored > 1.1 * max(sizes):
        raise CertificateError(
            f"{asset.name}: {stored} bytes of constants instead of {max(sizes)}: some are stored twice"
        )
    return stored


def _expected(layer: Palette, factored: int) -> set[tuple[str, bytes]]:
    """Return the constants that the program holds for a layer."""
    if layer.rank > factored:
        return {_half(layer.weight())}
    from wrinklefree.export.coreai.program import stored_bits

    bits = stored_bits(layer.bits)
    table = torch.nn.functional.pad(layer.lut, (0, 2**bits - len(layer.lut)))
    scales = [table, layer.a.T, *([layer.b] if layer.has_b() else [])]
    return {(f"ui{bits}", pack(layer.index.flatten(), bits).numpy().tobytes()), *map(_half, scales)}


def _half(tensor: Tensor) -> tuple[str, bytes]:
    return "f16", tensor.half().contiguous().numpy().tobytes()


def _asset_bytes(asset: Path) -> int:
    return sum(file.stat().st_size for file in asset.rglob("*") if file.is_file())


def agreement(model: PreTrainedModel, asset: Path, sizes: Sizes, batches: Iterable[Mapping[str, Tensor]]) -> Agreement:
    """Compare the logits of Core AI's runtime with the trained model's, for texts that begin at position 0."""
    from wrinklefree.export.coreai.asset import Runner

    rows = (row.unsqueeze(0)[:, :TOKENS] for batch in batches for row in batch["input_ids"])
    texts = [{"input_ids": row} for row in islice(rows, SEQUENCES)]
    with Runner(asset, sizes, min(PREFILL, sizes.context)) as runner:
        return compare(model, cast(PreTrainedModel, runner), texts)
