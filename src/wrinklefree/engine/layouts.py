"""What the native decoder needs to know of each family: names of weights and settings, and what it does otherwise.

A family that computes what native/decoder.h can say needs a `Layout` here, and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from wrinklefree.families.architectures import ATTENTION, FAMILIES, MLP, SUB_NORMS

_SEPARATE = {name.removesuffix("_proj"): f"self_attn.{name}" for name in ATTENTION}
_SEPARATE |= {name.removesuffix("_proj"): f"mlp.{name}" for name in MLP}
_NORMS = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}

# Experts and their router, in a layer; and the matrices of an expert: in tensors of all experts, or each by itself.
ROUTER, EXPERTS = "mlp.gate.weight", "mlp.experts"
TOGETHER = {"gate": "gate_up_proj", "down": "down_proj"}
APART = {name.removesuffix("_proj"): name for name in MLP}


@dataclass(frozen=True)
class Experts:
    """A family some of whose layers have experts in place of an MLP."""

    count: str  # the settings of config.json that say how many there are,
    width: str  # how wide each is inside,
    always_shared: bool  # and whether probabilities are made to add up to 1 whatever `norm_topk_prob` says


@dataclass(frozen=True)
class Layout:
    """One family. Names are those of its own modules and settings."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None  # an embedding of positions
    layers: str = "model.layers"
    norm: str = "model.norm"
    linears: Mapping[str, str] = field(default_factory=lambda: _SEPARATE)  # by the decoder's names
    norms: Mapping[str, str] = field(default_factory=lambda: _NORMS)  # weights by the decoder's names
    settings: Mapping[str, str] = field(default_factory=dict)  # its names for settings of Llama, where they differ
    sub_norms: Mapping[str, str] = field(default_factory=dict)  # norms of the inputs of o and down, as of BitNet
    experts: Experts | None = None
    gated: bool = True  # its MLP has a gate
    layer_norm: bool = False  # LayerNorms, with biases, not RMSNorms
    turned: bool = False  # linear layers are stored as [in, out]
    gain_above_one: bool = False  # the gain of a norm is 1 + its weight
    scaled_embedding: bool = False  # the embedding is multiplied by the root of its width
    partial_rotary: bool = False  # `partial_rotary_factor` says how much of a head is rotated
    ropes: tuple[str, ...] = ()  # kinds of layers that have a RoPE each, in the decoder's order
    skips_positions: bool = False  # some layers have no RoPE
    window_everywhere: bool = False  # a window of the last tokens is that of every layer
    refused: tuple[str, ...] = ()  # settings that change what is computed, if they are set


_LLAMAS = {
    family.model_type: Layout(
        skips_positions=family.skips_positions,
        window_everywhere=family.window_everywhere,
        sub_norms={name.removesuffix("_proj"): norm for name, norm in SUB_NORMS.items()},
    )
    for family in FAMILIES
}

_GEMMA3 = Layout(
    norms=_NORMS
    | {
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "post_attention_norm": "post_attention_layernorm.weight",
        "post_mlp_norm": "post_feedforward_layernorm.weight",
    },
    settings={"hidden_act": "hidden_activation"},
    gain_above_one=True,
    scaled_embedding=True,
    ropes=("full_attention", "sliding_attention"),
    refused=("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
)

_PHI3 = Layout(
    linears={"q": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_up_proj", "down": "mlp.down_proj"},
    partial_rotary=True,
    window_everywhere=True,
)

_GPT2 = Layout(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    norm="transformer.ln_f",
    linears={"q": "attn.c_attn", "o": "attn.c_proj", "gate": "mlp.c_fc", "down": "mlp.c_proj"},
    norms={
        "attention_norm": "ln_1.weight",
        "attention_shift": "ln_1.bias",
        "mlp_norm": "ln_2.weight",
        "mlp_shift": "ln_2.bias",
    },
    settings={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    gated=False,
    layer_norm=True,
    turned=True,
    refused=("add_cross_attention", "scale_attn_by_inverse_layer_idx"),
)

LAYOUTS: Mapping[str, Layout] = _LLAMAS | {
    "gemma3_text": _GEMMA3,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "qwen3_moe": Layout(
        experts=Experts("num_local_experts", "moe_intermediate_size", always_shared=False), window_everywhere=True
    ),
    "mixtral": Layout(
        experts=Experts("num_local_experts", "intermediate_size", always_shared=True), window_everywhere=True
    ),
}
