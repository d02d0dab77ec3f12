"""A conversation and a tokenizer with a chat template."""

from typing import Any

from wrinklefree.data.tokenizer import train_tokenizer

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def chatty() -> Any:
    """With the ChatML template of the built-in tokenizer."""
    return train_tokenizer(["some text of some words"], 300)
