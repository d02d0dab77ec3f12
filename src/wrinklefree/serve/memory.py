"""The memory that a model takes at most, said before it is opened.

| part | bytes |
|---|---|
| weights | 2 for a number in bf16 in the native engine, 4 for every other float; codes as in the files |
| keys and values | slots x context x layers x heads of the keys x 2 x head_dim x 4, or x 2 for a half cache |

The program itself, some 0.5 GB, is not counted.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from wrinklefree.core.errors import UserError
from wrinklefree.families.architectures import head_dim, positions
from wrinklefree.models.headers import FLOATS, Stored, read_header, weight_files
from wrinklefree.models.load import open_config

SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
PAGE, ROUND = 64, 16  # positions of a page of the native cache; what a head's width is rounded up to


@dataclass(frozen=True)
class Need:
    """Bytes of a model."""

    weights: int
    cache: int  # keys and values of all slots, each full

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache


def needed(folder: Path, native: bool, slots: int, context: int, half_cache: bool, trust_remote_code: bool) -> Need:
    """What the model in `folder` takes at most. Raises UserError if the folder or its weights are not there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no local folder, so nothing tells how much memory it takes: download it first")
    config = open_config(str(folder), trust_remote_code)
    context = -(-min(context, positions(config) or context) // PAGE) * PAGE
    tensors = [tensor for file in weight_files(folder) for tensor in read_header(file).values()]
    stored = sum(2 * file.stat().st_size for file in folder.glob("pytorch_model*.bin")) if not tensors else 0
    cache = slots * context * _position(config.get_text_config()) // (2 if half_cache else 1)
    return Need(stored + sum(_bytes(tensor, native) for tensor in tensors), cache)


def _bytes(tensor: Stored, native: bool) -> int:
    """Bytes of a tensor in memory. The native engine keeps bf16; everything else is calculated in fp32."""
    wide = tensor.dtype in FLOATS and not (native and tensor.dtype == "BF16")
    return math.prod(tensor.shape) * (4 if wide else SIZES.get(tensor.dtype, 1))


def _position(config: PreTrainedConfig) -> int:
    """Bytes of one token's keys and values in fp32. Raises UserError if the config has other sizes than attention's."""
    values = config.to_dict()
    values |= {name: values[own] for name, own in config.attribute_map.items() if own in values}
    if missing := [name for name in ("num_hidden_layers", "num_attention_heads", "hidden_size") if name not in values]:
        raise UserError(f"the config has no {missing[0]}, so nothing tells how much memory the model takes")
    heads = values.get("num_key_value_heads") or values["num_attention_heads"]
    width = -(-head_dim(values) // ROUND) * ROUND
    return int(values["num_hidden_layers"]) * int(heads) * 2 * width * 4
