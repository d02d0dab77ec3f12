"""Accuracy on tasks with a fixed set of answers: how often is the right one the likeliest after the question?

An answer's log-likelihood is the sum over its tokens, given the question, as for `acc` in lm-evaluation-harness.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.data.packing import encode, shorten
from wrinklefree.data.sources import Example
from wrinklefree.objectives.language_model import SplitModel

Z = 1.959964  # the normal distribution's 97.5 % quantile, for a 95 % interval


@dataclass(frozen=True)
class Accuracy:
    """The number of right answers among `total`."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share of right answers."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share (Wilson)."""
        n, p = self.total, self.value
        center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return center - half, center + half


def choose(examples: Sequence[Example], count: int | None) -> list[Example]:
    """Return at most `count` examples, evenly spread over all; None keeps all."""
    if count is None or count >= len(examples):
        return list(examples)
    return [examples[(2 * i + 1) * len(examples) // (2 * count)] for i in range(count)]


@torch.no_grad()
def measure_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    length: int,
) -> Accuracy:
    """Score every choice of every example, and count how often the right one wins.

    Texts keep their last `length` tokens. Precision is that of the current autocast.
    Raises UserError if there is no example, or one without choices.
    """
    if not examples or not all(e.choices for e in examples):
        raise UserError("no accuracy without held-out examples that have a fixed set of answers")
    answered = [e._replace(answer=choice) for e in examples for choice in e.choices]
    documents = [shorten(d, length)[:, :-1] for d in encode(tokenizer, answered)]  # without end-of-sequence
    scores = log_likelihoods(SplitModel(model), documents, batch_size, model.device)
    by_example = scores.split([len(e.choices) for e in examples])
    correct = sum(e.choices[int(s.argmax())] == e.answer for e, s in zip(examples, by_example, strict=True))
    return Accuracy(correct, len(examples))


def log_likelihoods(decoder: SplitModel, documents: list[Tensor], batch_size: int, device: torch.device) -> Tensor:
    """Return for each document [3, n] the log-probability of its learned tokens, given the tokens before: fp32 [N]."""
    # No token sees the last one. So documents that differ in it alone, such as choices of one word, share a row.
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, document in enumerate(documents):
        rows.setdefault(tuple(document[0, :-1].tolist()), []).append(number)
    scores = torch.zeros(len(documents), device=device)
    for batch in _batched(sorted(rows, key=len), batch_size):  # rows of similar length need little padding
        ids = pad_sequence([torch.tensor(row) for row in batch], batch_first=True)  # on the right: no token sees it
        states = decoder.states({"input_ids": ids.to(device)})
        scored = [
            (number, row, int(column) - 1, int(documents[number][0, column]))
            for row, key in enumerate(batch)
            for number in rows[key]
            for column in documents[number][2].nonzero()
        ]
        number, row, column, token = torch.tensor(scored, device=device).T
        operand, head = decoder.output(states[row, column])
        logits = head.logits(operand, head.leaves(operand.dtype)).float()
        scores.index_add_(0, number, logits.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1))
    return scores.cpu()


def _batched(rows: Iterable[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
