"""Names of tensors in GGUF files, and the order of rows that llama.cpp wants."""

import re

from torch import Tensor

LAYER_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_BEHIND = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
# Parts of a layer, by llama.cpp's name of the architecture. Those that are missing here have LAYER_PARTS.
PARTS = {
    "phi3": LAYER_PARTS | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "gemma2": LAYER_PARTS | _BEHIND | {"pre_feedforward_layernorm": "ffn_norm"},
    "gemma3": LAYER_PARTS | _BEHIND | {"pre_feedforward_layernorm": "ffn_norm"},
    "olmo2": LAYER_PARTS | _BEHIND,
    "starcoder2": LAYER_PARTS | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
}
# llama.cpp pairs the rotary dimensions (i, i + 1) in these, transformers pairs (i, i + d/2).
PAIRED = ("llama", "smollm3", "granite")
# Files have 1 + the weight of these norms, with which llama.cpp multiplies.
ABOVE_ONE = ("gemma2", "gemma3")
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

OURS = {theirs: ours for ours, theirs in LAYER_PARTS.items()}
OURS_TOP = {theirs: ours for ours, theirs in TOP.items()}


def gguf_name(name: str, arch: str = "llama") -> str | None:
    """Return llama.cpp's name for a tensor that transformers calls `name`, or None if it has none."""
    parts = PARTS.get(arch, LAYER_PARTS)
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    number, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{parts[part]}.{kind}" if part in parts else None


def own_name(name: str) -> str | None:
    """Return transformers' name for a tensor that llama.cpp calls `name`, or None if it has none."""
    part, _, kind = name.rpartition(".")
    if part in OURS_TOP:
        return f"{OURS_TOP[part]}.{kind}"
    found = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", part)
    return f"model.layers.{found[1]}.{OURS[found[2]]}.{kind}" if found and found[2] in OURS else None


def heads_of(name: str, arch: str, heads: int, kv_heads: int) -> int | None:
    """How many heads the rows of the tensor `name` (transformers') belong to, if llama.cpp wants them in its order."""
    part = name.split(".")[-2]
    return {"q_proj": heads, "k_proj": kv_heads}.get(part) if arch in PAIRED else None


def above_one(name: str, arch: str) -> float:
    """What llama.cpp's tensor has more than that which transformers calls `name`."""
    return 1.0 if arch in ABOVE_ONE and name.endswith("norm.weight") else 0.0


def paired(rows: Tensor, heads: int | None) -> Tensor:
    """Put rows [out, ...] into llama.cpp's order. None leaves them as they are."""
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(rows: Tensor, heads: int | None) -> Tensor:
    """Undo `paired`."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
