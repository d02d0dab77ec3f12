"""`--format anemll`: the state dict that ANEMLL's converters read.

A quantized layer F is stored in fp16, with W = F.weight * (F.scale_A @ F.scale_B):

    F.weight [out, in]     entries of the table, lut[codes]        F.lut [2**bits]
    F.scale_A [out, r]     A, with the magnitudes multiplied in    F.scale_B [r, in]

All other tensors keep their names.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core import surgery
from wrinklefree.core.files import file_aside, write_json
from wrinklefree.core.method import quant_layers
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.dense import refuse_norms, unquantized_state
from wrinklefree.export.views.lut import Palette, palettes
from wrinklefree.families.architectures import ATTENTION
from wrinklefree.tracking.terminal import short_size

NEXT = "ANEMLL's converter, with {target}/model_state_dict.pt"
USE = """\
ANEMLL's converters take `{name}/model_state_dict.pt`, with the `config.json` beside it. The file is large: each table
entry takes 16 bits, until the converter makes an index of it. A quantized layer `F` stands for
`F.weight * (F.scale_A @ F.scale_B)`:

```python
import torch

state = torch.load("{name}/model_state_dict.pt", weights_only=True)
```
"""
LIBRARY = "anemll"
WEIGHTS = "*.pt"

FILE = "model_state_dict.pt"


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
) -> list[list[str]]:
    """Write `folder/model_state_dict.pt`, config.json and the tokenizer, and read the weights back.

    Raises UserError if a layer is not a table times scales, CertificateError if a weight differs when read back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_state(model, folder / FILE)
    tokenizer.save_pretrained(folder)
    count = len(quant_layers(model))
    return [
        ["file", f"{FILE}, {short_size((folder / FILE).stat().st_size)}"],
        ["layers with identical weights", f"{count} of {count}"],
    ]


@torch.no_grad()
def write_state(model: PreTrainedModel, file: Path) -> None:
    """Write the state dict, read every layer back, and put a config.json beside it."""
    refuse_norms(model, "anemll")
    layers = palettes(model, "anemll")
    state = {name: tensor.cpu() for name, tensor in unquantized_state(model, layers).items()}
    for fqn, layer in layers.items():
        parts = {"weight": layer.lut[layer.index.long()], "lut": layer.lut, "scale_A": layer.a, "scale_B": layer.b}
        state |= {f"{fqn}.{name}": tensor for name, tensor in parts.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(file) as aside:
        torch.save(state, aside)
        _check(torch.load(aside, weights_only=True), layers)
    write_json(file.parent / "config.json", described(model, layers))


def _check(state: Mapping[str, Tensor], layers: Mapping[str, Palette]) -> None:
    for fqn, layer in layers.items():
        part = {name: state[f"{fqn}.{name}"].float() for name in ("weight", "scale_A", "scale_B")}
        if not torch.equal(part["weight"] * (part["scale_A"] @ part["scale_B"]), layer.weight()):
            raise CertificateError(f"{fqn}: differs after reading the file back")


def described(model: PreTrainedModel, layers: Mapping[str, Palette]) -> dict[str, Any]:
    """Return the model's config with the keys that ANEMLL's tools look for."""
    sizes: dict[str, int] = {}
    for fqn, layer in layers.items():
        prefix = "attn_" if surgery.matches(fqn, list(ATTENTION)) else "mlp_"
        sizes |= {f"{prefix}lut_bits": layer.bits, f"{prefix}scale_rank": layer.rank}
    plain = {key: sizes[f"mlp_{key}"] for key in ("lut_bits", "scale_rank") if f"mlp_{key}" in sizes}
    fixed = {"version": "v2", "force_positive_scales": False, "magnitude_activation": "identity", "fp16": True}
    return model.config.to_dict() | fixed | sizes | plain
