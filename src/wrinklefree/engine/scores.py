"""Log-probabilities of tokens. They are the model's own: before biases, penalties and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """The log-probability of one token, and the likeliest tokens in its place: (token id, log-probability)."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def score(logits: Tensor, tokens: Sequence[int], count: int) -> list[Score]:
    """Score `tokens` by the logits [len(tokens), vocab] that stand before each, with the `count` likeliest tokens."""
    all_of_them = torch.log_softmax(logits.float(), dim=-1)
    own = all_of_them.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = all_of_them.topk(min(count, logits.shape[1]))
    pairs = zip(own, ids.tolist(), values.tolist(), strict=True)
    return [Score(logprob, tuple(zip(near, worth, strict=True))) for logprob, near, worth in pairs]
