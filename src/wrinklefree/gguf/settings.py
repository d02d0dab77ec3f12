"""The settings of a model in a GGUF file, as the config of transformers that means the same."""

import math
from typing import Any

import numpy as np

from wrinklefree.core.errors import UserError
from wrinklefree.families.architectures import FAMILIES, Family
from wrinklefree.gguf.header import Header

ARCHITECTURES = {family.gguf: family for family in FAMILIES if family.gguf is not None}

LARGEST = 2**24  # of a size

# Keys without a setting of the same meaning in these classes, and the values that change nothing.
PLAIN: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
}

# Factors of Llama 3's rotary positions in use (Llama 3.1, 3.2), beside low 1, high 4 and 8192 old positions.
LLAMA3_FACTORS = (8.0, 32.0)


class Settings:
    """The settings of one file, each of the type and range that a model can have."""

    def __init__(self, header: Header) -> None:
        """Raises UserError if the architecture is none that is read here."""
        self.header, self.file = header, header.file
        name = header.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise UserError(
                f"{self.file}: architecture {str(name)[:99]!r} is none of {', '.join(ARCHITECTURES)}: transformers may "
                f"read it (gguf_file=), save it as a folder from there"
            )
        self.arch: str = name
        self.family: Family = ARCHITECTURES[name]

    def value(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.arch}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to LARGEST. Raises UserError if it is another, or missing without a default."""
        found = self.value(key, default)
        if isinstance(found, list) and found and len(set(map(str, found))) == 1:
            found = found[0]  # one for each layer, all the same
        if type(found) is not int or not 1 <= found <= LARGEST:
            raise UserError(f"{self.file}: {self.arch}.{key}={str(found)[:99]} is no size of a model")
        return found

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises UserError if it is another."""
        found = self.value(key, default)
        if not isinstance(found, (int, float)) or not math.isfinite(found) or found <= 0:
            raise UserError(f"{self.file}: {self.arch}.{key}={str(found)[:99]} is no positive number")
        return float(found)

    def config(self) -> dict[str, Any]:
        """Return config.json's values. Raises UserError for a setting that transformers' class has no place for."""
        for key, allowed in PLAIN.items():
            found = self.value(key)
            if found is not None and found not in allowed:
                raise UserError(f"{self.file}: {self.arch}.{key}={str(found)[:99]} is not read here")
        heads, hidden = self.size("attention.head_count"), self.size("embedding_length")
        width = self.size("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.size(key, width) != width:
                raise UserError(f"{self.file}: {self.arch}.{key}={self.size(key)}, heads have {width} columns")
        config = {
            "architectures": [self.family.causal_lm],
            "model_type": self.family.model_type,
            "vocab_size": self._rows("token_embd.weight"),
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length"),
            "num_hidden_layers": self._layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": width,
            "max_position_embeddings": self.size("context_length"),
            "rms_norm_eps": self.positive("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._positions(width),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self.header.tensors,
        }
        if self.family.model_type in ("llama", "qwen3", "bitnet"):
            config["attention_bias"] = "blk.0.attn_q.bias" in self.header.tensors
        if self.family.model_type == "llama":
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self.header.tensors
        return config

    def _layers(self) -> int:
        number = self.size("block_count")
        if number > len(self.header.tensors):
            raise UserError(f"{self.file}: {number:,} layers, and {len(self.header.tensors)} tensors in all")
        return number

    def _rows(self, name: str) -> int:
        if name not in self.header.tensors:
            raise UserError(f"{self.file}: {name} is missing")
        return self.header.tensors[name].shape[0]

    def _positions(self, width: int) -> dict[str, Any]:
        theta = self.positive("rope.freq_base", 10000.0)
        if "rope_freqs.weight" not in self.header.tensors:
            return {"rope_type": "default", "rope_theta": theta}
        tensor = self.header.tensors["rope_freqs.weight"]
        if (tensor.kind, tensor.shape) != ("F32", (width // 2,)):
            raise UserError(f"{self.file}: rope_freqs.weight is {tensor.kind} {list(tensor.shape)}")
        stored = self.header.data("rope_freqs.weight").reshape(-1).view(np.float32)
        for factor in LLAMA3_FACTORS:
            if np.allclose(stored, llama3_divisors(theta, width, factor), rtol=1e-4):
                return {"rope_type": "llama3", "rope_theta": theta, "factor": factor} | LLAMA3
        raise UserError(f"{self.file}: rope_freqs.weight: scaled rotary positions other than Llama 3's are not read")


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_divisors(theta: float, width: int, factor: float) -> Any:
    """By how much Llama 3 divides each rotary frequency [width / 2]: 1 for short waves, `factor` for long ones."""
    turns = 8192 / (2 * math.pi) * theta ** (-np.arange(0, width, 2) / width)  # in the old context
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
