"""Token ids of a prompt that asks for a thought, and of the tags around the thought."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.data.template import as_chat

OPEN, CLOSE = "<think>", "</think>"


class Tags(NamedTuple):
    """The tokens around a thought."""

    open: int
    close: int


def find_tags(tokenizer: PreTrainedTokenizerBase) -> Tags:
    """The ids of the tags. Raises UserError if the tokenizer does not have each of them as one token."""
    ids = [tokenizer(tag, add_special_tokens=False).input_ids for tag in (OPEN, CLOSE)]
    if any(len(found) != 1 for found in ids) or tokenizer.unk_token_id in (ids[0][0], ids[1][0]):
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no single tokens {OPEN} and {CLOSE}: "
            f"LLM-TRM needs a model that was trained to think between them"
        )
    return Tags(ids[0][0], ids[1][0])


def prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The question in the model's chat template, if it has one, up to and with `<think>`."""
    if not tokenizer.chat_template:
        return list(tokenizer(f"{question} {OPEN}").input_ids)
    messages = [{"role": "user", "content": question}]
    text = as_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=True)
    text = text if text.rstrip().endswith(OPEN) else f"{text}{OPEN}"
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def padded(rows: Sequence[Sequence[int]], pad: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and mask, each [rows, longest]; the mask is False for padding."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = torch.tensor(row), True
    return ids, mask


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: that of the end of a sequence, if the tokenizer has none for padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
