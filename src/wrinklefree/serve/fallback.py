"""The engine's interface on a model of transformers, for models that the native loop cannot run.

Right and slow: each step reads one sequence after the other, each with a KV cache of its own.
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
from wrinklefree.engine.engine import CHUNK, Sampling

MASK = 2**63 - 1  # torch's generators take no more


@dataclass
class _Sequence:
    tokens: list[int]  # prompt and answer
    cache: DynamicCache  # of the first tokens
    sampling: Sampling
    generator: torch.Generator
    left: int  # tokens it may still get
    finished: str | None = None


class TransformersEngine:
    """`packed.engine.Engine` in the methods that a server needs."""

    def __init__(self, model: PreTrainedModel, context: int, slots: int) -> None:
        self.model, self.context, self.slots = model, context, slots
        self._open: dict[int, _Sequence] = {}

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """The slot of the new sequence. Raises UserError like the native engine."""
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
        """A token for each sequence whose prompt has been read; `CHUNK` tokens of the others' prompts."""
        found = {}
        for slot, sequence in self._open.items():
            if sequence.finished is None and (logits := self._read(sequence)) is not None:
                found[slot] = _choose(sequence, logits)
                _note(sequence, found[slot])
        return found

    def _read(self, sequence: _Sequence) -> Tensor | None:
        """Read the next tokens; logits [1, vocab] after the last one, None while there are more."""
        start = sequence.cache.get_seq_length()
        piece = torch.tensor([sequence.tokens[start : start + CHUNK]], device=self.model.device)
        out = self.model(piece, past_key_values=sequence.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float() if start + piece.shape[1] == len(sequence.tokens) else None

    def finished(self, slot: int) -> str | None:
        return self._open[slot].finished

    def close(self, slot: int) -> None:
        del self._open[slot]


def _choose(sequence: _Sequence, logits: Tensor) -> int:
    """In transformers' order: repetition penalty, temperature, top-k, top-p."""
    sampling = sequence.sampling
    ids = torch.tensor([sequence.tokens], device=logits.device)
    steps = LogitsProcessorList()
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


def _note(sequence: _Sequence, token: int) -> None:
    sequence.tokens.append(token)
    sequence.left -= 1
    if token in sequence.sampling.stop_tokens:
        sequence.finished = "stop"
    elif sequence.left == 0:
        sequence.finished = "length"
