"""Which models the native decoder runs, and how it reads their configs."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from wrinklefree.engine.binding import ACTIVATIONS, Floats
from wrinklefree.engine.layouts import LAYOUTS, Layout
from wrinklefree.families.architectures import FIXED_ROPES, head_dim
from wrinklefree.packed.quantizer import QUANT_METHOD

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


def layout_of(config: PreTrainedConfig) -> Layout:
    """The layout of a family that `supports` has accepted."""
    return LAYOUTS[config.model_type]


def settings(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as a dictionary, with Llama's names for what this family calls otherwise."""
    values: dict[str, Any] = config.to_dict()
    names = LAYOUTS[values["model_type"]].settings if values["model_type"] in LAYOUTS else {}
    values |= {ours: values.get(theirs) for ours, theirs in names.items()}
    if "intermediate_size" in names and values["intermediate_size"] is None:
        values["intermediate_size"] = 4 * values["hidden_size"]  # GPT-2's
    return values


def supports(config: PreTrainedConfig) -> str | None:
    """The reason why the native decoder cannot run a model with this config, or None if it can."""
    values = settings(config)
    if values["model_type"] not in LAYOUTS:
        return f"model_type {values['model_type']} is not one of {', '.join(LAYOUTS)}"
    layout = layout_of(config)
    quantization = values.get("quantization_config")
    if quantization is not None and quantization["quant_method"] != QUANT_METHOD:
        return f"quant_method {quantization['quant_method']} is not {QUANT_METHOD}"
    odd = _odd_size(values, layout)
    if odd:
        return f"{odd}={values[odd]!r} is no size"
    if values["hidden_act"] not in ACTIVATIONS:
        return f"hidden_act {values['hidden_act']} is not one of {', '.join(ACTIVATIONS)}"
    for name in layout.refused:
        if values[name]:
            return f"{name}={values[name]} is something that it does not compute"
    size, heads, groups = head_dim(values), values["num_attention_heads"], values["num_key_value_heads"]
    if size % 2 or size > LARGEST_HEAD or heads % groups or heads // groups > LARGEST_GROUP:
        return f"{heads} heads of {size} for {groups} of the keys are not what it was written for"
    return _odd_rope(values, layout)


def _odd_size(values: dict[str, Any], layout: Layout) -> str | None:
    """The name of a setting that should be a size and is none."""
    names = [*COUNTS, *(["head_dim"] if values.get("head_dim") is not None else [])]
    names += [layout.experts.count, layout.experts.width, "num_experts_per_tok"] if layout.experts else []
    for name in names:
        if type(values[name]) is not int or not 1 <= values[name] <= LARGEST:
            return name
    if layout.experts and values["num_experts_per_tok"] > values[layout.experts.count]:
        return "num_experts_per_tok"
    return None


def _odd_rope(values: dict[str, Any], layout: Layout) -> str | None:
    for rope in _ropes(values, layout):
        share = rope.get("partial_rotary_factor", 1.0)
        whole = share == 1.0 or (layout.partial_rotary and 0 < share < 1 and not int(head_dim(values) * share) % 2)
        if rope["rope_type"] not in FIXED_ROPES or not whole:
            return f"rope_type {rope['rope_type']} is not one of {', '.join(FIXED_ROPES)}, of whole heads"
    return None


def _ropes(values: dict[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """The settings of each RoPE, in the decoder's order; none if positions are an embedding."""
    if layout.positions:
        return []
    found = values["rope_parameters"]
    return [found[kind] for kind in layout.ropes] if layout.ropes else [found]


def sizes(values: dict[str, Any], layout: Layout) -> dict[str, int]:
    """The sizes of a model, by the names that the decoder gives them."""
    ropes, size = _ropes(values, layout), head_dim(values)
    found = {
        "vocab": values["vocab_size"],
        "hidden": values["hidden_size"],
        "intermediate": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "kv_heads": values["num_key_value_heads"],
        "head_dim": size,
        "rotary": int(size * ropes[0].get("partial_rotary_factor", 1.0)) if ropes else 0,
    }
    if layout.experts:
        found["num_experts"] = values[layout.experts.count]
        found["top_k"] = values["num_experts_per_tok"]
        found["expert_intermediate"] = values[layout.experts.width]
    return found


def frequencies(config: PreTrainedConfig) -> list[tuple[Floats, float]]:
    """Of each RoPE: its frequencies in radians per position [rotary / 2], and the factor on sine and cosine."""
    layout, values = layout_of(config), settings(config)
    kinds = [{"layer_type": kind} for kind in layout.ropes] or [{}]
    ropes = _ropes(values, layout)
    size = sizes(values, layout)["rotary"]
    return [_frequencies(config, rope, size, kind) for rope, kind in zip(ropes, kinds[: len(ropes)], strict=True)]


def _frequencies(
    config: PreTrainedConfig, rope: dict[str, Any], size: int, kind: dict[str, str]
) -> tuple[Floats, float]:
    if rope["rope_type"] != "default":
        found, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), **kind)
        return found.float().numpy(), float(scale)
    exponents = torch.arange(0, size, 2, dtype=torch.float) / size
    return (1.0 / rope["rope_theta"] ** exponents).numpy().astype(np.float32), 1.0


def rope(values: dict[str, Any], layout: Layout, layer: int) -> int:
    """The number of this layer's RoPE, from 1; 0 if it has none, as some of SmolLM3."""
    if layout.positions or (layout.skips_positions and not values["no_rope_layers"][layer]):
        return 0
    return 1 + layout.ropes.index(values["layer_types"][layer]) if layout.ropes else 1


def window(values: dict[str, Any], layout: Layout, layer: int) -> int:
    """How many of the last tokens this layer sees. 0 means all."""
    size = values.get("sliding_window") or 0
    if layout.window_everywhere:
        return int(size) if values.get("use_sliding_window", True) else 0
    kinds = values.get("layer_types")
    return int(size) if kinds and kinds[layer] == "sliding_attention" else 0


def scale(values: dict[str, Any]) -> float:
    """The factor of the products of queries and keys."""
    if values.get("scale_attn_weights") is False:
        return 1.0
    width = values.get("query_pre_attn_scalar")
    return float(width or head_dim(values)) ** -0.5


def has_experts(values: dict[str, Any], layout: Layout, layer: int) -> bool:
    """Whether this layer has experts in place of an MLP."""
    if layout.experts is None or layer in (values.get("mlp_only_layers") or []):
        return False
    return (layer + 1) % int(values.get("decoder_sparse_step") or 1) == 0


def shares(values: dict[str, Any], layout: Layout) -> bool:
    """Whether the probabilities of the experts chosen are made to add up to 1."""
    return layout.experts is not None and (layout.experts.always_shared or bool(values["norm_topk_prob"]))
