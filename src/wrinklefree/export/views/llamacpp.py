"""Models as llama.cpp's architectures: which have a place there, and what of their settings a GGUF file says.

llama.cpp knows some settings by the name of the architecture alone. A model that has others is refused.

| architecture | what it takes for granted |
|---|---|
| `smollm3` | every fourth layer has no positions |
| `gemma2` | every other layer sees a window, beginning with the first; queries are scaled by the width of a head |
| `gemma3` | five of six layers see a window, with positions of base 10,000; queries as of `gemma2` |

Mistral is a `llama` there, without a window: its file says a context that is no longer than the window.
"""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from wrinklefree.core.errors import UserError
from wrinklefree.export.views.settings import refuse_settings, ropes
from wrinklefree.families.architectures import FAMILIES, head_dim

ARCHITECTURES = {family.causal_lm: family.gguf for family in FAMILIES if family.gguf is not None} | {
    "MistralForCausalLM": "llama",
    "SmolLM3ForCausalLM": "smollm3",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Olmo2ForCausalLM": "olmo2",
    "GraniteForCausalLM": "granite",
    "Starcoder2ForCausalLM": "starcoder2",
}
ACTIVATIONS = dict.fromkeys(("gemma2", "gemma3", "starcoder2"), "gelu_pytorch_tanh")  # of others: silu

_GEMMA = ("hidden_activation", "query_pre_attn_scalar", "sliding_window")
_SOFT = ("attn_logit_softcapping", "final_logit_softcapping")
# Settings that a file says, or that were compared with what llama.cpp takes for granted.
WRITTEN = {
    "LlamaForCausalLM": ("attention_bias", "mlp_bias"),
    "BitNetForCausalLM": ("attention_bias",),
    "SmolLM3ForCausalLM": ("no_rope_layers", "no_rope_layer_interval"),
    "Phi3ForCausalLM": ("original_max_position_embeddings",),
    "Gemma2ForCausalLM": (*_GEMMA, *_SOFT),
    "Gemma3ForCausalLM": _GEMMA,
    "GraniteForCausalLM": ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
    "Starcoder2ForCausalLM": ("norm_epsilon",),
}
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
ROPE_DIVISORS = "rope_freqs.weight"  # where a file has those of Llama 3
FloatArray = np.ndarray[Any, np.dtype[np.float32]]
WINDOWED = ("gemma2", "gemma3")
SHARE = "partial_rotary_factor"  # of a head; Phi-3 and others say that whole heads are rotated, too
SWA_BASE = 10000.0  # of the positions of Gemma 3's layers with a window


def refuse_model(model: PreTrainedModel) -> None:
    """Raises UserError for the first setting of a model that its architecture has otherwise, or has no place for."""
    name, arch = type(model).__name__, ARCHITECTURES[type(model).__name__]
    values = model.config.to_dict()
    activation, own = values.get("hidden_activation") or values["hidden_act"], ACTIVATIONS.get(arch, "silu")
    if activation != own:
        raise UserError(f"--format gguf: activation {activation}; llama.cpp's {arch} has {own}")
    layers = ("full_attention", "sliding_attention") if arch in WINDOWED else ("full_attention",)
    positions = [] if any(rope.get(SHARE, 1.0) != 1.0 for rope in ropes(values)) else [SHARE]
    positions += ["factor"] if arch == "gemma3" else LLAMA3 if arch == "llama" else []
    refuse_settings(model, "gguf", WRITTEN.get(name, ()), positions, layers)
    for setting, wanted in _granted(arch, values).items():
        if values[setting] != wanted:
            raise UserError(
                f"--format gguf: the model's setting {setting} is {values[setting]}, and llama.cpp's {arch} has "
                f"{wanted}: use --format dense or hf"
            )
    kinds = {rope["rope_type"] for rope in ropes(values)} - {"default"}
    if kinds - ({"linear"} if arch == "gemma3" else {"llama3"} if arch == "llama" else set()):
        raise UserError(
            f"--format gguf: rotary positions of type {min(kinds)} are not written: "
            f"use --format dense and llama.cpp's own converter"
        )


def _granted(arch: str, values: dict[str, Any]) -> dict[str, Any]:
    """Settings that llama.cpp knows by the architecture's name, and their values there."""
    numbers = range(1, values["num_hidden_layers"] + 1)
    if arch == "smollm3":
        return {"no_rope_layers": [int(number % 4 != 0) for number in numbers]}
    if arch not in WINDOWED:
        return {}
    every = 2 if arch == "gemma2" else 6
    kinds = ["sliding_attention" if number % every else "full_attention" for number in numbers]
    found = {"layer_types": kinds, "query_pre_attn_scalar": head_dim(values)}
    if arch == "gemma3":
        window = {"rope_type": "default", "rope_theta": SWA_BASE}
        found["rope_parameters"] = values["rope_parameters"] | {"sliding_attention": window}
    return found


def describe_more(writer: Any, model: PreTrainedModel) -> None:
    """Write what differs between architectures: norms, positions, windows, caps and scales."""
    import gguf

    c, arch = model.config, ARCHITECTURES[type(model).__name__]
    window = c.to_dict().get("sliding_window") or 0
    longest = c.max_position_embeddings
    if window and type(model).__name__ == "MistralForCausalLM":
        longest = min(window, longest)
    writer.add_context_length(longest)
    if arch == "starcoder2":
        writer.add_layer_norm_eps(c.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    positions = c.rope_parameters["full_attention"] if arch == "gemma3" else c.rope_parameters
    writer.add_rope_freq_base(positions["rope_theta"])
    if positions["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(positions["factor"])
    if arch in ("phi3", *WINDOWED):
        writer.add_sliding_window(window)
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if arch == "granite":
        writer.add_attention_scale(c.attention_multiplier)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_logit_scale(c.logits_scaling)


def rope_divisors(model: PreTrainedModel) -> FloatArray | None:
    """By how much Llama 3 divides each rotary frequency [width / 2], fp32; None if the model's are as they are."""
    values = model.config.to_dict()
    if {rope["rope_type"] for rope in ropes(values)} != {"llama3"}:
        return None
    width, theta = head_dim(values), values["rope_parameters"]["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    found: FloatArray = (plain / scaled).numpy()
    return found


def told_by_hand(model: PreTrainedModel) -> dict[str, Any]:
    """Settings that transformers does not read from a GGUF file, though the file or the architecture says them."""
    names = ["head_dim"]
    if ARCHITECTURES[type(model).__name__] in ("phi3", "starcoder2", *WINDOWED):
        names += ["pad_token_id", "layer_types", "rope_parameters", "query_pre_attn_scalar", "sliding_window", *_SOFT]
    if rope_divisors(model) is not None:
        names.append("rope_parameters")
    return {name: value for name, value in model.config.to_dict().items() if name in names}
