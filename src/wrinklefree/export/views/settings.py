"""Refuses settings of a model's config that a format has no place for, and those that nobody knows."""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError

# What a decoder with RoPE, RMSNorm and a gated MLP is made of. Formats with metadata of their own write all of it.
SIZES = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "hidden_act",
        "tie_word_embeddings",
    ]
)

# Settings that change no logit: names, training, generation, and how transformers computes.
NEUTRAL = frozenset(
    [
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "name_or_path",
        "auto_map",
        "quantization_config",
        "initializer_range",
        "attention_dropout",
        "use_cache",
        "pretraining_tp",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "tokenizer_class",
        "task_specific_params",
        "is_llama_config",
        "transformers.js_config",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "layer_types",
    ]
)

# Settings of a window of the last tokens. They are neutral if no layer has one, which `layer_types` says.
WINDOW = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})


def refuse_settings(
    model: PreTrainedModel,
    target: str,
    written: Collection[str],
    rope: Collection[str] = (),
    layers: Collection[str] = ("full_attention",),
) -> None:
    """Raises UserError for the first setting that the format `target` has no place for, by its name.

    written   settings that it writes beside SIZES
    rope      settings of rotary positions that it writes beside their type and base
    layers    kinds of layers that it has
    """
    config = model.config.to_dict()
    default = type(model.config)().to_dict()
    odd = sorted(set(config.get("layer_types") or []) - set(layers))
    if odd:
        windowed = "sliding_attention" in odd
        raise _refused(target, "layer_types", "attention in a sliding window" if windowed else odd[0])
    known = SIZES | NEUTRAL | WINDOW | set(written)
    for name, value in config.items():
        if name not in known and value != default.get(name) and not _is_note(name, value, default):
            raise _refused(target, name, value)
    for positions in ropes(config):
        odd = sorted(positions.keys() - {"rope_type", "rope_theta", *rope})
        if odd:
            raise _refused(target, f"rope_parameters.{odd[0]}", positions[odd[0]])


def ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of each RoPE of a model: Gemma 3 has one for each kind of layer."""
    found = config["rope_parameters"]
    return [found] if "rope_type" in found else list(found.values())


def _is_note(name: str, value: Any, default: dict[str, Any]) -> bool:
    """Whether a setting is a note of some tool: it begins with an underscore, or no model reads it and it is off."""
    return name.startswith("_") or (name not in default and value in (None, False))


def _refused(target: str, name: str, value: Any) -> UserError:
    return UserError(
        f"--format {target}: the model's setting {name} ({value}) has no place there, and without it the logits would "
        f"differ: use --format dense or hf"
    )
