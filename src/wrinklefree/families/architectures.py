"""The model architectures that this package runs or exports by itself, and the names of their parts.

All of them are Llamas with small differences. Any other causal language model trains and runs in transformers.

| architecture | beyond Llama |
|---|---|
| Mistral | layers that see only a window of the last tokens |
| Qwen2 | biases; windows |
| Qwen3 | norms of the heads; windows |
| SmolLM3 | layers without positions |
| BitNet | two further norms per layer |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """One architecture: `model_type` is its name in config.json, its classes in transformers begin with `stem`."""

    model_type: str
    stem: str
    coreml: bool = False  # whether `--format coreml` writes it
    skips_positions: bool = False  # whether some layers have no RoPE
    window_everywhere: bool = False  # whether a window of the last tokens is that of every layer

    @property
    def causal_lm(self) -> str:
        """The name of its class with an output head in transformers, such as `LlamaForCausalLM`."""
        return f"{self.stem}ForCausalLM"


# MLPs and norms of these are fused in transformers. The native loop runs more: engine/layouts.py.
FAMILIES = (
    Family("llama", "Llama", coreml=True),
    Family("mistral", "Mistral", window_everywhere=True),
    Family("qwen2", "Qwen2", coreml=True),
    Family("qwen3", "Qwen3", coreml=True),
    Family("smollm3", "SmolLM3", skips_positions=True),
    Family("bitnet", "BitNet", coreml=True),
)

# Linear layers of a decoder layer by what they do. `self_attn` and `mlp` are the modules that hold them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# A layer whose input BitNet normalizes, and the name of that norm beside it.
SUB_NORMS = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}

POSITIONS = "max_position_embeddings"

# Rotary tables that do not depend on the length of the text.
FIXED_ROPES = ("default", "linear", "llama3", "yarn")


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has, by its config; None if it states none, as of Mamba, BLOOM and MPT."""
    text = config.get_text_config()
    # Some configs have another name for it, and say so: GPT-2's is `n_positions`.
    number: int | None = text.to_dict().get(text.attribute_map.get(POSITIONS, POSITIONS))
    return number or None


def head_dim(config: Mapping[str, Any]) -> int:
    """The width of an attention head, from a model's config as a dictionary."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
