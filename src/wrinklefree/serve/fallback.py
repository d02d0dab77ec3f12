"""The interface of the native engine around a transformers model, for models that the native engine cannot run.

It is slow: a step runs the model once for each sequence, because each has its own KV cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from wrinklefree.core.errors import UserError
from wrinklefree.engine.engine import CHUNK
from wrinklefree.engine.sampling import Sampling

MASK = 2**63 - 1  # seeds of torch's generators have 63 bits


@dataclass
class _Sequence:
    tokens: list[int]  # prompt and answer
    cache: DynamicCache  # keys and values of the tokens that have been read
    sampling: Sampling
    generator: torch.Generator
    left: int  # how many more tokens may be generated
    finished: str | None = None


class TransformersEngine:
    """Has the methods of the native `Engine` that the scheduler calls."""

    def __init__(self, model: PreTrainedModel, context: int, slots: int) -> None:
        self.model, self.context, self.slots = model, context, slots
        self._open: dict[int, _Sequence] = {}

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Begin a sequence and return its slot.

        Raises UserError if
        - the prompt is empty or too long,
        - a token id is outside of the vocabulary,
        - no slot is free.
        """
        vocab = self.model.config.get_text_config().vocab_size
        if not 0 < len(prompt) < self.context:
            raise UserError(f"the prompt has {len(prompt)} tokens: 1 to {self.context - 1} fit")
        odd = next((token for token in prompt if not 0 <= token < vocab), None)
        if odd is not None:
            raise UserError(f"token id {odd}: the vocabulary has {vocab}")
        free = set(range(self.slots)) - self._open.keys()
        if not free:
            raise UserError(f"all {self.slots} slots are taken")
        slot = min(free)
        generator = torch.Generator(self.model.device).manual_seed(sampling.seed & MASK)
        left = min(sampling.max_new_tokens, self.context - len(prompt))
        self._open[slot] = _Sequence(list(prompt), DynamicCache(config=self.model.config), sampling, generator, left)
        return slot

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """Advance each open sequence, and return the new tokens by slot.

        A sequence whose prompt has been read gets one token. Of the other prompts, the next `CHUNK` tokens are read.
        """
        new = {}
        for slot, sequence in self._open.items():
            if sequence.finished is None and (logits := self._read(sequence)) is not None:
                new[slot] = _choose(sequence, logits)
                _append(sequence, new[slot])
        return new

    def _read(self, sequence: _Sequence) -> Tensor | None:
        """Read the next `CHUNK` tokens. Returns logits [1, vocab] after the last token, None while some are unread."""
        start = sequence.cache.get_seq_length()
        piece = torch.tensor([sequence.tokens[start : start + CHUNK]], device=self.model.device)
        out = self.model(piece, past_key_values=sequence.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float() if start + piece.shape[1] == len(sequence.tokens) else None

    def finished(self, slot: int) -> str | None:
        """Why a sequence has ended, "stop" or "length"; None if it has not."""
        return self._open[slot].finished

    def reset(self) -> None:
        """Close all sequences, after a step that failed."""
        self._open.clear()

    def close(self, slot: int) -> None:
        """Free a slot."""
        del self._open[slot]


def _choose(sequence: _Sequence, logits: Tensor) -> int:
    """Sample the next token from logits [1, vocab]."""
    sampling = sequence.sampling
    ids = torch.tensor([sequence.tokens], device=logits.device)
    steps = LogitsProcessorList()  # the order is that of `generate` in transformers
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return int(steps(ids, logits).argmax())
    steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return int(torch.multinomial(steps(ids, logits).softmax(-1), 1, generator=sequence.generator))


def _append(sequence: _Sequence, token: int) -> None:
    """Add a token to its sequence, and note whether the sequence ends with it."""
    sequence.tokens.append(token)
    sequence.left -= 1
    if token in sequence.sampling.stop_tokens:
        sequence.finished = "stop"
    elif sequence.left == 0:
        sequence.finished = "length"
