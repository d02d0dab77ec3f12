"""Tiny random models, a tokenizer without training, and a method of the tests' own for whatever packs and loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

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
