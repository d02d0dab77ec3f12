"""Tiny random models, a tokenizer without training, and a method of the tests' own for whatever packs and loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import wrinklefree.methods
from wrinklefree.core.method import QuantMethod, available, find

VOCAB = 96


@contextmanager
def with_toy_method() -> Iterator[None]:
    """A method is a file: a folder of them joins the package's own for a while."""
    folder = str(Path(__file__).parent / "toy_methods")
    wrinklefree.methods.__path__.append(folder)
    try:
        yield
    finally:
        wrinklefree.methods.__path__.remove(folder)


def toy(**values: Any) -> QuantMethod:
    return find("toy")(**values)


def shipped_methods() -> list[QuantMethod]:
    """One of every method in the package, with its default settings."""
    return [find(name)(name=name) for name in available()]


def llama(**values: Any) -> LlamaForCausalLM:
    """Hidden 64, two layers, tied embeddings."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **(shape | {"vocab_size": VOCAB, "max_position_embeddings": 64, "tie_word_embeddings": True} | values)
    )
    return LlamaForCausalLM(config).eval()


def qwen(**values: Any) -> Qwen2ForCausalLM:
    """With biases in attention, an odd width in the MLP, and a head of its own."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 77, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}
    model = Qwen2ForCausalLM(Qwen2Config(**(shape | more | values))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 2}
MIXTURE = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}
SHORT_HEADS = {"head_dim": 16, "num_key_value_heads": 2}

# Families whose weights have other names in hub files than in transformers' models.
RENAMED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "qwen2_moe": MIXTURE,
    "gpt_neox": {},
}
FAMILIES: dict[str, dict[str, Any]] = RENAMED | {
    "llama": {},
    "mistral": SHORT_HEADS,
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": SHORT_HEADS,
    "qwen3_moe": EXPERTS | {"num_experts": 4, "head_dim": 16},
    "gemma": SHORT_HEADS,
    "gemma2": SHORT_HEADS,
    "phi": {},
    "olmo": {},
    "olmo2": {},
    "smollm3": {"num_key_value_heads": 2},
}


def family(model_type: str, **values: Any) -> PreTrainedModel:
    """A tiny random model of another family, hidden 64, two layers."""
    torch.manual_seed(0)
    more = {"vocab_size": VOCAB, "max_position_embeddings": 64} | FAMILIES.get(model_type, {}) | values
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **SIZES | ids | more)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    return tokenizer_of({f"w{i}": i for i in range(VOCAB - 2)} | {"<unk>": VOCAB - 2, "<eos>": VOCAB - 1})


def tokenizer_of(words: dict[str, int]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def ids(batch: int = 2, length: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids()}]
