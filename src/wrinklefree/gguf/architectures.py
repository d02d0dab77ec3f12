"""The architectures of llama.cpp that are written and read here, and what it knows of them by their names alone.

| architecture | what it takes for granted |
|---|---|
| `smollm3` | every fourth layer has no positions |
| `gemma2` | every other layer sees a window, beginning with the first |
| `gemma3` | five of six layers see a window, with positions of base 10,000 |
| both | queries are scaled by the width of a head; in models of one number of layers, by hidden size / heads |
| `qwen2moe` | every layer has experts; probabilities are those of all experts |
| `qwen3moe` | every layer has experts; probabilities of the chosen ones are made to add up to 1 |

Mistral is a `llama` there, without a window.
"""

from dataclasses import dataclass

WINDOWED = {"gemma2": 2, "gemma3": 6}  # every how many-th layer sees everything
MIXTURES = ("qwen2moe", "qwen3moe")
SWA_BASE = 10000.0  # of the positions of Gemma 3's layers with a window


@dataclass(frozen=True)
class Architecture:
    """One architecture, as transformers has it."""

    stem: str  # of the names of its classes
    model_type: str
    activation: str = "silu"

    @property
    def causal_lm(self) -> str:
        """The name of its class with an output head."""
        return f"{self.stem}ForCausalLM"


_TANH = "gelu_pytorch_tanh"
ARCHITECTURES = {
    "llama": Architecture("Llama", "llama"),
    "qwen2": Architecture("Qwen2", "qwen2"),
    "qwen3": Architecture("Qwen3", "qwen3"),
    "bitnet": Architecture("BitNet", "bitnet"),
    "smollm3": Architecture("SmolLM3", "smollm3"),
    "phi3": Architecture("Phi3", "phi3"),
    "gemma2": Architecture("Gemma2", "gemma2", _TANH),
    "gemma3": Architecture("Gemma3", "gemma3_text", _TANH),
    "olmo2": Architecture("Olmo2", "olmo2"),
    "granite": Architecture("Granite", "granite"),
    "starcoder2": Architecture("Starcoder2", "starcoder2", _TANH),
    "qwen2moe": Architecture("Qwen2Moe", "qwen2_moe"),
    "qwen3moe": Architecture("Qwen3Moe", "qwen3_moe"),
}
# The class of a model in transformers -> its architecture in a file.
WRITTEN_AS = {each.causal_lm: name for name, each in ARCHITECTURES.items()} | {"MistralForCausalLM": "llama"}

_WIDE_QUERIES = {"gemma2": 46, "gemma3": 62}  # layers of the models with 27 billion parameters


def kinds_of_layers(arch: str, layers: int) -> list[str]:
    """transformers' `layer_types` of a model with windows."""
    return ["sliding_attention" if number % WINDOWED[arch] else "full_attention" for number in range(1, layers + 1)]


def query_scalar(arch: str, layers: int, hidden: int, heads: int, width: int) -> int:
    """By the root of which number llama.cpp divides the queries of a Gemma: transformers' `query_pre_attn_scalar`."""
    return hidden // heads if layers == _WIDE_QUERIES[arch] else width
