"""What is measured of every model in a comparison, in one way for all.

ppl, kl, top1   on held-out text that no run trains on (evaluate/perplexity.py)
agreement       greedy text after the first words of held-out text: the share of its tokens before the first that the
                original would not have written
distinct        of the words in that text, the share that differ; text that goes in circles has few
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.core.batch import Batch
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.data.open import training_stream
from wrinklefree.runs.setup import Run

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 12, 48
SHOWN = 3  # samples that a row keeps
CALIBRATION_ROWS, CALIBRATION_LENGTH = 64, 256  # training text for references that are calibrated


@dataclass(frozen=True)
class Figures:
    """The fields of a row that are measured here."""

    ppl: float
    kl: float
    top1: float
    distinct: float
    agreement: float
    samples: dict[str, str]


class Test:
    """Held-out text, prompts, and the original to compare with."""

    def __init__(self, run: Run) -> None:
        self.run, self.original = run, run.model
        self.batches: list[Batch] = run.heldout(run.config.training.final_eval_tokens)
        self.prompts = _prompts(self.batches)

    @cached_property
    def key(self) -> str:
        """A fingerprint of what is measured on."""
        ids = [batch["input_ids"].tolist() for batch in self.batches]
        return fingerprint([ids, PROMPTS, PROMPT_TOKENS, NEW_TOKENS])

    @cached_property
    def written(self) -> list[list[int]]:
        """What the original writes, greedily."""
        return [self.greedy(self.original, prompt) for prompt in self.prompts]

    def training_rows(self) -> Tensor:
        """Token ids [rows, length] of the training text's beginning."""
        rows = first_rows(self.run, CALIBRATION_ROWS, CALIBRATION_LENGTH)
        return torch.cat([row["input_ids"] for row in rows])

    def measure(self, model: PreTrainedModel) -> Figures:
        """All figures of a model."""
        reference = None if model is self.original else self.original
        quality = self.run.quality(model, self.batches, reference)
        texts = self.written if reference is None else [self.greedy(model, prompt) for prompt in self.prompts]
        words = [self.run.tokenizer.decode(text).split() for text in texts]
        pairs = zip(texts, self.written, strict=True)
        return Figures(
            ppl=quality.ppl,
            kl=quality.kl,
            top1=1.0 if reference is None else quality.same_top1,
            distinct=_mean([len(set(text)) / max(1, len(text)) for text in words]),
            agreement=_mean([common(*pair) / max(1, len(pair[1])) for pair in pairs]),
            samples=self._samples(texts),
        )

    def _samples(self, texts: Sequence[list[int]]) -> dict[str, str]:
        decode = self.run.tokenizer.decode
        return {decode(p): decode(t) for p, t in zip(self.prompts[:SHOWN], texts, strict=False)}

    @torch.no_grad()
    def greedy(self, model: PreTrainedModel, prompt: Tensor) -> list[int]:
        """The next `NEW_TOKENS` likeliest tokens after `prompt` [length], fewer if the text ends."""
        ids = prompt.unsqueeze(0).to(model.device)
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": self.run.tokenizer.eos_token_id}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens


def first_rows(run: Run, rows: int, length: int) -> list[Batch]:
    """The first rows of the training text, a batch for each, of at most `length` tokens."""
    data, length, seed = run.config.data, min(length, run.plan.length), run.config.seed
    stream = iter(training_stream(data, run.tokenizer, batch_size=1, length=length, seed=seed, rank=0, world_size=1))
    return [next(stream) for _ in range(rows)]


def _prompts(batches: Sequence[Batch]) -> list[Tensor]:
    """The first tokens of some windows, evenly spread."""
    rows = torch.cat([batch["input_ids"] for batch in batches])
    return list(rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS, :PROMPT_TOKENS])


def common(text: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common before the first that differs."""
    pairs = list(zip(text, other, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
