"""Makes any config of transformers small, by what its numbers mean.

A number's role is known by its name: a width becomes 64, a count of layers 2, a context 64. Lists with an entry for
each layer keep one layer of each kind. `EXCEPTIONS` holds what the names do not tell.
"""

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WORDS = 136  # of the vocabulary; no other size of these models is this one

MOST_KINDS = 3  # of layers: a list with more different entries does not name kinds

LAYERS = r"(.*_)?(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_.*coder_layers)"

# The first pattern that matches a number's whole name says what it becomes.
SIZES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_.*)?", WORDS),
    (r"max_position_embeddings|n_positions|max_seq_len|model_max_length|n_ctx|context_length|max_target_positions", 64),
    (r"sliding_window(_size)?|(attention_)?window_size|local_attention|attention_chunk_size", 32),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups", 2),
    (r"(.*_)?(attention_heads|n_heads?|num_heads|mamba_heads)|linear_num_.*heads", 4),
    (r"(qk|swa)_head_dim", 32),
    (r"(.*_)?head_dim|d_head|attention_head_size|kv_channels|rotary_dim|dim_head", 16),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"(.*_)?(rank|lowrank)", 16),
    (r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|dim_ff|dff|n_inner|ffn_hidden_size|feed_forward_size)", 128),
    (
        r"(.*_)?(hidden_size(_global)?|n_embd|d_model|embedding_(size|dim)|emb_dim|hidden_dim|lru_width|embed_proj_dim|adapter_(in_dim|input_size|out_dim|output_size))",
        64,
    ),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k", 2),
    (r"(moe_)?num_experts|num_local_experts|n_routed_experts", 4),
    (r"n_group|num_expert_group|topk_group|(mamba_)?n_?groups", 1),
    (r"mamba_d_state|(ssm_)?state_size", 4),
    (r"(mamba_)?chunk_size|block_size", 16),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_kv_shared_layers", 0),
]

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}

# What the names do not tell, by model type.
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
ZAMBA = {"attention_hidden_size": 128, "attention_head_dim": 32}  # attention sees two hidden states side by side
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SPARSE_QWEN = {
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 32, "num_key_value_heads": 4},  # widths with and without positions, together
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 128},
    "gemma4_assistant": {"text_config": None},
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hrm_text": {"num_layers_per_stack": None},  # made from the number of layers
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mpt": {"max_seq_len": 256},  # its biases end there, and samples are longer than 64
    "phi4_multimodal": {
        "audio_config": {"hidden_size": 64, "intermediate_size": 128, "num_blocks": 1, "nemo_conv_channels": 64}
    },
    "recurrent_gemma": {"num_hidden_layers": 3},  # the third has attention
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False},  # which train on one length alone
    "xlstm": {"qk_dim_factor": 1.0, "num_blocks": 2},  # its cache rounds widths of keys up to 64
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp_text": SPARSE_QWEN,
    "zamba": ZAMBA
    | {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": None},
    "zamba2": ZAMBA
    | {"n_mamba_heads": 8, "mamba_headdim": 16, "num_hidden_layers": 4, "num_mem_blocks": 1}
    | {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
}


def families() -> list[str]:
    """The names of all families: the model types of transformers' causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str) -> PreTrainedConfig:
    """The small config of a family."""
    return CONFIG_MAPPING[model_type](**shrunk(CONFIG_MAPPING[model_type]().to_dict()))


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with small numbers, also in the configs inside them."""
    layers = next((v for k, v in values.items() if type(v) is int and re.fullmatch(LAYERS, k)), 0)
    kept = kept_layers(values, layers)
    small = {key: small_value(key, value, layers, kept) for key, value in values.items() if key not in DERIVED}
    if "is_decoder" in small:
        small["is_decoder"] = True
    if "head_dim" in small and small["head_dim"] is None:
        small["head_dim"] = 16
    if "num_key_value_heads" in small and (small["num_key_value_heads"] is None or "kv_lora_rank" in small):
        small["num_key_value_heads"] = small.get("num_attention_heads", 4)  # latent attention has as many of both
    return small | EXCEPTIONS.get(values.get("model_type", ""), {})


DERIVED = ("id2label", "label2id", "model_type", "transformers_version", "architectures", "num_labels", "dtype")


def kept_layers(values: dict[str, Any], layers: int) -> list[int]:
    """The numbers of the layers that stay: the first of each kind, and at least two."""
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == layers > 0]
    lists = [v for v in lists if len(set(map(str, v))) <= MOST_KINDS]
    seen: dict[str, int] = {}
    for number in range(layers):
        seen.setdefault(str([entries[number] for entries in lists]), number)
    kept = sorted(seen.values())
    return kept if len(kept) > 1 else list(range(min(2, layers)))


def small_value(key: str, value: Any, layers: int, kept: list[int]) -> Any:
    """One setting, made small by its name."""
    if isinstance(value, dict):
        return shrunk(value) if key.endswith("_config") and key != "per_layer_config" else by_layer(value, kept)
    if isinstance(value, list) and len(value) == layers > 0:
        inside = [value[number] for number in kept]
        if value == list(range(layers)):
            return list(range(len(kept)))
        return [small_value(key, entry, 0, []) for entry in inside]
    if key in IDS and value is not None:
        return IDS[key]
    if type(value) is not int or value == 0:
        return value
    if re.fullmatch(LAYERS, key):
        return len(kept) if value == layers else min(value, 2)
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), value)
    return min(value, size, WORDS - 1) if key.endswith(("_token_id", "_token_index")) else min(value, size)


def by_layer(values: dict[Any, Any], kept: list[int]) -> dict[Any, Any]:
    """A dictionary whose keys are numbers of layers, for the layers that stay; any other as it is."""
    if not values or not all(str(key).isdigit() for key in values):
        return values
    by_number = {int(key): value for key, value in values.items()}
    return {new: shrunk(by_number[old]) for new, old in enumerate(kept) if old in by_number}


def small_model(model_type: str) -> PreTrainedModel:
    """The small model with random weights, in eval mode."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(small_config(model_type)).eval()
    return model
