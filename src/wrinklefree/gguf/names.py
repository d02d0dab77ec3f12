"""Names of tensors in GGUF files, and the order of rows that llama.cpp wants."""

from torch import Tensor

from wrinklefree.gguf.architectures import MIXTURES

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
# The router of experts, and the shared expert of Qwen2 with its gate.
_ROUTER = {"mlp.gate": "ffn_gate_inp"}
_SHARED = {"mlp.shared_expert_gate": "ffn_gate_inp_shexp"}
_SHARED |= {f"mlp.shared_expert.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")}
_BEHIND = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
# Parts of a layer, by llama.cpp's name of the architecture. Those that are missing here have LAYER_PARTS.
PARTS = {
    "phi3": LAYER_PARTS | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "gemma2": LAYER_PARTS | _BEHIND | {"pre_feedforward_layernorm": "ffn_norm"},
    "gemma3": LAYER_PARTS | _BEHIND | {"pre_feedforward_layernorm": "ffn_norm"},
    "olmo2": LAYER_PARTS | _BEHIND,
    "starcoder2": LAYER_PARTS | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    "qwen2moe": LAYER_PARTS | _ROUTER | _SHARED,
    "qwen3moe": LAYER_PARTS | _ROUTER,
}
# Tensors of experts [E, out, in]. llama.cpp has the rows of gate and up in two tensors.
STACKS = {"mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "mlp.experts.down_proj": ("ffn_down_exps",)}
IN_FULL = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")  # what chooses experts: fp32 in files
# llama.cpp pairs the rotary dimensions (i, i + 1) in these, transformers pairs (i, i + d/2).
PAIRED = ("llama", "smollm3", "granite")
# Files have 1 + the weight of these norms, with which llama.cpp multiplies.
ABOVE_ONE = ("gemma2", "gemma3")
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_names(name: str, arch: str) -> tuple[str, ...]:
    """Return llama.cpp's names for the parameter that transformers calls `name`; none if it has no place for it.

    If there are several, each has as many of its rows as the others, in this order.
    """
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return (f"{TOP[module]}.{kind}",)
    number, _, part = name.removeprefix("model.layers.").partition(".")
    if part in STACKS and arch in MIXTURES:
        return tuple(f"blk.{number}.{each}.weight" for each in STACKS[part])
    part, parts = part.removesuffix(f".{kind}"), PARTS.get(arch, LAYER_PARTS)
    return (f"blk.{number}.{parts[part]}.{kind}",) if part in parts else ()


def stored_shape(place: str, shape: tuple[int, ...], pieces: int) -> tuple[int, ...]:
    """The shape of llama.cpp's tensor `place`, which is one of `pieces` of a parameter of this shape."""
    if place.endswith("ffn_gate_inp_shexp.weight"):
        return shape[1:]  # one output
    return shape if pieces == 1 else (*shape[:-2], shape[-2] // pieces, shape[-1])


def piece(rows: Tensor, experts: int, number: int, pieces: int) -> Tensor:
    """Of rows [experts * out, ...] those of one piece: [experts * out / pieces, ...]."""
    return rows if pieces == 1 else rows.unflatten(0, (experts, pieces, -1))[:, number].flatten(0, 1)


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
