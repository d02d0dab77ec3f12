"""Which models the native decoder runs, and how it reads their configs."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from wrinklefree.engine.binding import ACTIVATIONS, Floats
from wrinklefree.families.architectures import FAMILIES, FIXED_ROPES, head_dim
from wrinklefree.packed.quantizer import QUANT_METHOD

MODEL_TYPES = {family.model_type: family for family in FAMILIES}
LARGEST_HEAD = 256  # native/decoder.cpp
LARGEST_GROUP = 32
LARGEST = 2**24  # of any size below
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def supports(config: PreTrainedConfig) -> str | None:
    """The reason why the native decoder cannot run a model with this config, or None if it can."""
    values = config.to_dict()
    if values["model_type"] not in MODEL_TYPES:
        return f"model_type {values['model_type']} is not one of {', '.join(MODEL_TYPES)}"
    quantization = values.get("quantization_config")
    if quantization is not None and quantization["quant_method"] != QUANT_METHOD:
        return f"quant_method {quantization['quant_method']} is not {QUANT_METHOD}"
    stated = {name: values[name] for name in COUNTS}
    stated |= {"head_dim": values["head_dim"]} if values.get("head_dim") is not None else {}
    odd = {name: value for name, value in stated.items() if type(value) is not int or not 1 <= value <= LARGEST}
    if odd:
        return f"{next(iter(odd))}={next(iter(odd.values()))!r} is no size"
    if values["hidden_act"] not in ACTIVATIONS:
        return f"hidden_act {values['hidden_act']} is not one of {', '.join(ACTIVATIONS)}"
    rope = values["rope_parameters"]
    if rope["rope_type"] not in FIXED_ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rope_type {rope['rope_type']} is not one of {', '.join(FIXED_ROPES)}, of whole heads"
    size, heads, groups = head_dim(values), values["num_attention_heads"], values["num_key_value_heads"]
    if size % 2 or size > LARGEST_HEAD or heads % groups or heads // groups > LARGEST_GROUP:
        return f"{heads} heads of {size} for {groups} of the keys are not what it was written for"
    return None


def sizes(values: dict[str, Any]) -> dict[str, int]:
    """The sizes of a model, by the names that the decoder gives them."""
    return {
        "vocab": values["vocab_size"],
        "hidden": values["hidden_size"],
        "intermediate": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "kv_heads": values["num_key_value_heads"],
        "head_dim": head_dim(values),
    }


def frequencies(config: PreTrainedConfig) -> tuple[Floats, float]:
    """RoPE's frequencies in radians per position [head_dim / 2], and the factor on sine and cosine."""
    rope = config.to_dict()["rope_parameters"]
    if rope["rope_type"] != "default":
        found, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return found.float().numpy(), float(scale)
    size = head_dim(config.to_dict())
    exponents = torch.arange(0, size, 2, dtype=torch.float) / size
    return (1.0 / rope["rope_theta"] ** exponents).numpy().astype(np.float32), 1.0


def has_positions(values: dict[str, Any], layer: int) -> bool:
    """Whether this layer uses RoPE. Some layers of SmolLM3 do not."""
    return not MODEL_TYPES[values["model_type"]].skips_positions or bool(values["no_rope_layers"][layer])


def window(values: dict[str, Any], layer: int) -> int:
    """How many of the last tokens this layer sees. 0 means all."""
    size = values.get("sliding_window") or 0
    if MODEL_TYPES[values["model_type"]].window_everywhere:
        return int(size)
    kinds = values.get("layer_types")
    return int(size) if kinds and kinds[layer] == "sliding_attention" else 0
