"""Log-probabilities of tokens as the OpenAI interface shows them: two forms, one for completions and one for chats."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from wrinklefree.engine.scores import Score


@dataclass(frozen=True)
class Scored:
    """A token and its score. The first token of a prompt has none."""

    token: int
    score: Score | None
    offset: int  # where the text of the first token of a chunk begins in the answer; 0 for all tokens of a prompt


def for_completion(tokenizer: Any, scored: Sequence[Scored]) -> dict[str, Any]:
    """The `logprobs` object of a completion. `scored` is not empty."""
    texts = [_text(tokenizer, each.token) for each in scored]
    return {
        "tokens": texts,
        "token_logprobs": [each.score and each.score.logprob for each in scored],
        "top_logprobs": [each.score and _by_text(tokenizer, each.token, each.score) for each in scored],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=scored[0].offset)),
    }


def _by_text(tokenizer: Any, token: int, score: Score) -> dict[str, float]:
    """Log-probabilities by text: of the likeliest tokens, and of the token itself.

    If two tokens have the same text, such as two parts of characters, the likelier one stands for both.
    """
    found: dict[str, float] = {}
    for near, logprob in (*score.likeliest, (token, score.logprob)):
        found.setdefault(_text(tokenizer, near), logprob)
    return found


def for_chat(tokenizer: Any, scored: Sequence[Scored]) -> dict[str, Any]:
    """The `logprobs` object of a chat's choice."""
    content = []
    for each in scored:
        if each.score is not None:
            near = [_entry(tokenizer, token, logprob) for token, logprob in each.score.likeliest]
            content.append(_entry(tokenizer, each.token, each.score.logprob) | {"top_logprobs": near})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text = _text(tokenizer, token)
    # U+FFFD stands for a part of a character, whose bytes the tokenizer does not tell.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _text(tokenizer: Any, token: int) -> str:
    text: str = tokenizer.decode([token])
    return text
