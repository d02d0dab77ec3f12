"""What of a model's settings a GGUF file says, and which models llama.cpp's architectures have no place for.

llama.cpp knows some settings by the name of the architecture alone (gguf/architectures.py). A model that has others is
refused. If all layers see a window and the architecture has none, the file says a context that is no longer.
"""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from wrinklefree.core.errors import UserError
from wrinklefree.export.views.settings import refuse_settings, ropes
from wrinklefree.families.architectures import head_dim
from wrinklefree.gguf.architectures import (
    ARCHITECTURES,
    MIXTURES,
    SWA_BASE,
    WINDOWED,
    WRITTEN_AS,
    kinds_of_layers,
    query_scalar,
)

_GEMMA = ("hidden_activation", "query_pre_attn_scalar", "sliding_window")
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "mlp_only_layers",
    "decoder_sparse_step",
    "output_router_logits",
    "router_aux_loss_coef",
)
_SHARED = "shared_expert_intermediate_size"
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
    "Qwen2MoeForCausalLM": (*_EXPERTS, _SHARED, "qkv_bias"),
    "Qwen3MoeForCausalLM": _EXPERTS,
}
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
ROPE_DIVISORS = "rope_freqs.weight"  # where a file has those of Llama 3
FloatArray = np.ndarray[Any, np.dtype[np.float32]]
SHARE = "partial_rotary_factor"  # of a head; Phi-3 and others say that whole heads are rotated, too


def refuse_model(model: PreTrainedModel) -> None:
    """Raises UserError for the first setting of a model that its architecture has otherwise, or has no place for."""
    name, arch = type(model).__name__, WRITTEN_AS[type(model).__name__]
    values = model.config.to_dict()
    activation, own = values.get("hidden_activation") or values["hidden_act"], ARCHITECTURES[arch].activation
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
    layers = values["num_hidden_layers"]
    if arch == "smollm3":
        return {"no_rope_layers": [int(number % 4 != 0) for number in range(1, layers + 1)]}
    if arch in MIXTURES:
        return {"norm_topk_prob": arch == "qwen3moe", "mlp_only_layers": [], "decoder_sparse_step": 1}
    if arch not in WINDOWED:
        return {}
    sizes = values["hidden_size"], values["num_attention_heads"], head_dim(values)
    found = {
        "layer_types": kinds_of_layers(arch, layers),
        "query_pre_attn_scalar": query_scalar(arch, layers, *sizes),
    }
    if arch == "gemma3":
        window = {"rope_type": "default", "rope_theta": SWA_BASE}
        found["rope_parameters"] = values["rope_parameters"] | {"sliding_attention": window}
    return found


def longest_text(model: PreTrainedModel) -> int:
    """The context that a file says: in tokens, no longer than a window of all layers."""
    values = model.config.to_dict()
    longest: int = values["max_position_embeddings"]
    everywhere = not values.get("layer_types") and values.get("sliding_window")
    return min(values["sliding_window"], longest) if everywhere else longest


def describe_more(writer: Any, model: PreTrainedModel) -> None:
    """Write what differs between architectures: norms, positions, windows, caps and scales."""
    import gguf

    c, arch = model.config, WRITTEN_AS[type(model).__name__]
    writer.add_context_length(longest_text(model))
    if arch == "starcoder2":
        writer.add_layer_norm_eps(c.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    positions = c.rope_parameters["full_attention"] if arch == "gemma3" else c.rope_parameters
    writer.add_rope_freq_base(positions["rope_theta"])
    if positions["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(positions["factor"])
    if arch in WINDOWED:
        writer.add_sliding_window(c.sliding_window)
    if arch == "phi3":
        writer.add_sliding_window(0)  # llama.cpp asks for it, and computes without one
        writer.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if arch in MIXTURES:
        writer.add_expert_count(c.num_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    if positions["rope_type"] == "llama3":  # llama.cpp has it in the divisors; this is for whoever makes a config of it
        writer.add_rope_scaling_orig_ctx_len(positions["original_max_position_embeddings"])
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
    names = ["head_dim", "moe_intermediate_size", _SHARED]
    if WRITTEN_AS[type(model).__name__] in ("phi3", "starcoder2", *WINDOWED):
        names += ["pad_token_id", "layer_types", "rope_parameters", "query_pre_attn_scalar", "sliding_window", *_SOFT]
    if rope_divisors(model) is not None:
        names.append("rope_parameters")
    return {name: value for name, value in model.config.to_dict().items() if name in names}
