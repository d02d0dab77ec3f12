"""The settings of a model in a GGUF file, as the config of transformers that means the same."""

import math
from typing import Any

import numpy as np

from wrinklefree.core.errors import UserError
from wrinklefree.gguf.architectures import ARCHITECTURES, MIXTURES, SWA_BASE, WINDOWED, kinds_of_layers, query_scalar
from wrinklefree.gguf.header import Header

LARGEST = 2**24  # of a size

# Keys without a setting of the same meaning in these classes, and the values that change nothing.
PLAIN: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
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

# Settings that an architecture has a place for.
_SOFT = ("attn_logit_softcapping", "final_logit_softcapping")
READ: dict[str, tuple[str, ...]] = {
    "phi3": ("attention.sliding_window",),
    "gemma2": ("attention.sliding_window", *_SOFT),
    "gemma3": ("attention.sliding_window", "rope.scaling.type", "rope.scaling.factor", *_SOFT),
    "granite": ("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
    "qwen2moe": ("expert_count",),
    "qwen3moe": ("expert_count",),
}

# Llama 3's rotary positions in use (Llama 3.1, 3.2): factors beside low 1, high 4, and how long texts were before.
LLAMA3_FACTORS, LLAMA3_LENGTH = (8.0, 32.0), 8192


class Settings:
    """The settings of one file, each of the type and range that a model can have."""

    def __init__(self, header: Header) -> None:
        """Raises UserError if the architecture is none that is read here."""
        self.header, self.file = header, header.file
        name = header.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise UserError(
                f"{self.file}: architecture {str(name)[:99]!r} is none of {', '.join(ARCHITECTURES)}: transformers may "
                f"read it (gguf_file=), save it as a folder from there"
            )
        self.arch: str = name

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

    def whole(self, key: str, default: int) -> int:
        """A whole number from 0 to LARGEST. Raises UserError if it is another."""
        return 0 if self.value(key, default) == 0 else self.size(key, default)

    def has(self, name: str) -> bool:
        return name in self.header.tensors

    def config(self) -> dict[str, Any]:
        """Return config.json's values. Raises UserError for a setting that transformers' class has no place for."""
        for key, allowed in PLAIN.items():
            found = self.value(key)
            if found is not None and found not in allowed and key not in READ.get(self.arch, ()):
                raise UserError(f"{self.file}: {self.arch}.{key}={str(found)[:99]} is not read here")
        heads, hidden = self.size("attention.head_count"), self.size("embedding_length")
        width = self.size("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.size(key, width) != width:
                raise UserError(f"{self.file}: {self.arch}.{key}={self.size(key)}, heads have {width} columns")
        if width % 2:
            raise UserError(f"{self.file}: heads have {width} columns, which rotary positions cannot pair")
        kind = ARCHITECTURES[self.arch]
        config = {
            "architectures": [kind.causal_lm],
            "model_type": kind.model_type,
            "vocab_size": self._rows("token_embd.weight"),
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length"),
            "num_hidden_layers": self._layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": width,
            "max_position_embeddings": self.size("context_length"),
            "rope_parameters": self._positions(width),
            "tie_word_embeddings": not self.has("output.weight"),
        }
        activation = "hidden_activation" if self.arch in WINDOWED else "hidden_act"
        norm = ("norm_epsilon", "epsilon") if self.arch == "starcoder2" else ("rms_norm_eps", "rms_epsilon")
        config |= {activation: kind.activation, norm[0]: self.positive(f"attention.layer_norm_{norm[1]}")}
        return config | self._biases() | self._special(config)

    def _biases(self) -> dict[str, bool]:
        attention, mlp = self.has("blk.0.attn_q.bias"), self.has("blk.0.ffn_up.bias")
        if self.arch in ("llama", "qwen3", "qwen3moe", "bitnet", "smollm3", "granite", "olmo2"):
            return {"attention_bias": attention} | ({"mlp_bias": mlp} if self.arch in ("llama", "granite") else {})
        return {"qwen2moe": {"qkv_bias": attention}, "starcoder2": {"use_bias": mlp}}.get(self.arch, {})

    def _special(self, config: dict[str, Any]) -> dict[str, Any]:
        """Settings of one architecture, or of a few."""
        if self.arch in WINDOWED:
            return self._windows(config)
        if self.arch in MIXTURES:
            return self._experts()
        if self.arch == "phi3":  # llama.cpp asks for the window and does not use it; the model has it
            return {"sliding_window": self.whole("attention.sliding_window", 0) or None}
        if self.arch == "granite":
            names = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale"}
            names |= {"residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
            return {name: self.positive(key) for name, key in names.items()}
        return {}

    def _windows(self, config: dict[str, Any]) -> dict[str, Any]:
        layers, heads, width = config["num_hidden_layers"], config["num_attention_heads"], config["head_dim"]
        kinds = kinds_of_layers(self.arch, layers)
        pattern = [kind == "sliding_attention" for kind in kinds]
        if self.value("attention.sliding_window_pattern", pattern) not in (pattern, WINDOWED[self.arch]):
            raise UserError(f"{self.file}: {self.arch}.attention.sliding_window_pattern: only that of Gemma is read")
        found = {
            "layer_types": kinds,
            "sliding_window": self.size("attention.sliding_window"),
            "query_pre_attn_scalar": query_scalar(self.arch, layers, config["hidden_size"], heads, width),
        }
        for key in _SOFT:
            found[key] = None if self.value(key) in (None, 0.0) else self.positive(key)
        if self.arch == "gemma3":
            window = {"rope_type": "default", "rope_theta": self.positive("rope.freq_base_swa", SWA_BASE)}
            found["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": window}
        return found

    def _experts(self) -> dict[str, Any]:
        number, used = self.size("expert_count"), self.size("expert_used_count")
        if used > number:
            raise UserError(f"{self.file}: {used} of {number} experts are used")
        found = {
            "num_experts": number,
            "num_experts_per_tok": used,
            "moe_intermediate_size": self._inside("ffn_gate_exps"),
            "norm_topk_prob": self.arch == "qwen3moe",
        }
        if self.arch == "qwen2moe":
            found["shared_expert_intermediate_size"] = self._inside("ffn_gate_shexp")
        return found

    def _inside(self, part: str) -> int:
        """The width of an expert, which older files do not say."""
        name = f"blk.0.{part}.weight"
        if not self.has(name):
            raise UserError(f"{self.file}: {name} is missing")
        return self.header.tensors[name].shape[-2]

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
        if self.arch == "gemma3" and self.value("rope.scaling.type", "none") != "none":
            if self.value("rope.scaling.type") != "linear":
                raise UserError(f"{self.file}: rotary positions of type {str(self.value('rope.scaling.type'))[:99]!r}")
            return {"rope_type": "linear", "rope_theta": theta, "factor": self.positive("rope.scaling.factor")}
        if "rope_freqs.weight" not in self.header.tensors:
            return {"rope_type": "default", "rope_theta": theta}
        tensor = self.header.tensors["rope_freqs.weight"]
        if (tensor.kind, tensor.shape) != ("F32", (width // 2,)):
            raise UserError(f"{self.file}: rope_freqs.weight is {tensor.kind} {list(tensor.shape)}")
        stored = self.header.data("rope_freqs.weight").reshape(-1).view(np.float32)
        length = self.size("rope.scaling.original_context_length", LLAMA3_LENGTH)
        for factor in {*LLAMA3_FACTORS, float(stored.max())}:
            if np.allclose(stored, llama3_divisors(theta, width, factor, length), rtol=1e-4):
                found = {"rope_type": "llama3", "rope_theta": theta, "factor": factor} | LLAMA3
                return found | {"original_max_position_embeddings": length}
        raise UserError(f"{self.file}: rope_freqs.weight: scaled rotary positions other than Llama 3's are not read")


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama3_divisors(theta: float, width: int, factor: float, length: int) -> Any:
    """By how much Llama 3 divides each rotary frequency [width / 2]: 1 for short waves, `factor` for long ones.

    What is long depends on the `length` of texts before.
    """
    turns = length / (2 * math.pi) * theta ** (-np.arange(0, width, 2) / width)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
