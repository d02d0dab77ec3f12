"""Toys of what `--format gguf` writes: models of other families than Llama, and a tokenizer as of Llama 2."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from wrinklefree.gguf import pieces

GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32, "sliding_window": 20, "head_dim": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
SHARED = EXPERTS | {"norm_topk_prob": False, "shared_expert_intermediate_size": 48}
OTHERS = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 40}, "llama", "blk.1.ffn_gate.weight"),
    "llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}, "llama", "rope_freqs.weight"),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {}, "smollm3", "blk.1.ffn_gate.weight"),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}, "phi3", "blk.1.attn_qkv.weight"),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA, "gemma2", "blk.1.post_ffw_norm.weight"),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA, "gemma3", "blk.1.attn_q_norm.weight"),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}, "olmo2", "blk.1.post_attention_norm.weight"),
    "granite": (GraniteForCausalLM, GraniteConfig, {"residual_multiplier": 0.5}, "granite", "blk.1.attn_norm.weight"),
    "qwen2moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, SHARED, "qwen2moe", "blk.1.ffn_gate_inp_shexp.weight"),
    "qwen3moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS, "qwen3moe", "blk.1.ffn_up_exps.weight"),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, {}, "starcoder2", "blk.1.attn_norm.bias"),
}


def other(name: str, **changed: Any) -> PreTrainedModel:
    """A random toy of a family, with gains and biases that matter."""
    model_class, config, values, *_ = OTHERS[name]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 262, "max_position_embeddings": 64}
    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = model_class(config(**(sizes | ends | values | changed))).eval()
    for fqn, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in fqn and "gemma" not in name), std=0.2)
    return model


LLAMA2 = {"normalizer": pieces._PREPEND, "pre_tokenizer": None}
METASPACE = {"normalizer": None, "pre_tokenizer": pieces._METASPACE | {"prepend_scheme": "always"}}
FIRST = {"normalizer": None, "pre_tokenizer": pieces._METASPACE | {"prepend_scheme": "first"}}
NO_SPACE = {"normalizer": pieces._REPLACE, "pre_tokenizer": None}


def parts_of(read: Sequence[str] = (), **changed: Any) -> dict[str, Any]:
    """A tokenizer.json as Llama 2 has it: 3 special tokens, 256 bytes, then pieces in the order of their scores.

    They are learnt from the texts `read`, or from `TEXTS`.
    """
    learner = Tokenizer(BPE())
    texts = [text.replace(" ", pieces.SPACE) for text in read or TEXTS]
    learner.train_from_iterator(texts, BpeTrainer(vocab_size=600, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    made = ["".join(merge) for merge in learnt["merges"]]
    letters = [token for token in learnt["vocab"] if token not in set(made)]
    names = ["<unk>", "<s>", "</s>", *pieces.BYTES, *dict.fromkeys(made), *letters]
    vocab = {token: i for i, token in enumerate(names)}
    merges = pieces.joins({*made, *letters}, {token: -float(i) for token, i in vocab.items()})
    model = {"type": "BPE", "vocab": vocab, "merges": [list(merge) for merge in merges], "unk_token": "<unk>"}
    model |= {"fuse_unk": True, "byte_fallback": True, "dropout": None, "ignore_merges": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token} | special for i, token in enumerate(names[:3])]
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    whole = {"version": "1.0", "added_tokens": added, "decoder": decoder, "model": model, "post_processor": None}
    return whole | {"truncation": None, "padding": None} | LLAMA2 | changed


def learnt(read: Sequence[str]) -> dict[str, Any]:
    """The same with no bytes, and with one merge for each token: not all pairs that make a token are joined."""
    parts = parts_of(read)
    model = parts["model"]
    tokens = [token for token in model["vocab"] if token not in pieces.BYTES]
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    places = {tuple(merge): place for place, merge in enumerate(model["merges"])}
    pairs = {token: pieces.last_pair(token, places) for token in tokens[3:]}
    model["merges"] = [list(pair) for pair in pairs.values() if pair in places]
    return parts


def as_of_phi3(**changed: Any) -> dict[str, Any]:
    """The same with Phi-3's added tokens: all but three take the spaces behind them."""
    parts = parts_of(**changed)
    special, first = parts["added_tokens"][0], len(parts["model"]["vocab"])
    for number, name in enumerate(("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>")):
        parts["added_tokens"].append(special | {"id": first + number, "content": name, "rstrip": number > 0})
    parts["added_tokens"][2] |= {"rstrip": True, "special": False}
    return parts


CHATS = [
    "<|user|>\nthe cat<|end|>\n<|assistant|> \t\r\n the",
    "a</s>  b",
    "<s> a<unk> b",
    "<|endoftext|>\n b",
    "x <|end|> y",
]
TEXTS = [
    "the cat sat on the mat and the dog lay in the sun",
    "a tokenizer joins neighbours as long as both together are a token",
    'once upon a time there was a little girl who had a red hat, and she liked it. "Look!" she said.',
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13; def f(x): return x + 1\n",
] * 4


def tokenizer_of(parts: dict[str, Any]) -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
