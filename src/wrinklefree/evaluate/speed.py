"""Measures how fast a model decodes."""

import time

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEED_TOKENS = 64


def decoding_speed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return tokens per second for greedy decoding at batch 1, after a warm-up of 2 tokens."""
    ids = tokenizer("def ", return_tensors="pt").input_ids.to(model.device)
    settings = {"do_sample": False, "min_new_tokens": SPEED_TOKENS, "max_new_tokens": SPEED_TOKENS}
    model.generate(ids, attention_mask=torch.ones_like(ids), **(settings | {"min_new_tokens": 2, "max_new_tokens": 2}))
    started = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return SPEED_TOKENS / (time.perf_counter() - started)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters and buffers in memory."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
