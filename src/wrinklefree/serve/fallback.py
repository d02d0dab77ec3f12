"""The interface of the native engine around a transformers model, for models that the native engine cannot run.

It is slow: a step runs the model once for each sequence, because each has its own past (past.py).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from wrinklefree.core.errors import UserError
from wrinklefree.engine.engine import CHUNK
from wrinklefree.engine.pace import Pace
from wrinklefree.engine.sampling import Sampling
from wrinklefree.engine.scores import Score, score
from wrinklefree.serve.past import Past, find_way

MASK = 2**63 - 1  # seeds of torch's generators have 63 bits


@dataclass
class _Sequence:
    tokens: list[int]  # prompt and answer
    prompt: int  # how many of them are the prompt
    past: Past  # the tokens that have been read
    sampling: Sampling
    generator: torch.Generator
    left: int  # how many more tokens may be generated
    finished: str | None = None
    scores: list[Score] = field(default_factory=list)  # that nobody has taken yet

    @property
    def answers(self) -> bool:
        """Whether its prompt has been read."""
        return len(self.tokens) > self.prompt

    def unread(self) -> int:
        """How many tokens have not been read."""
        return len(self.tokens) - self.past.length


class TransformersEngine:
    """Has the methods of the native `Engine` that the scheduler calls."""

    def __init__(self, model: PreTrainedModel, context: int, slots: int) -> None:
        self.model, self.context, self.slots = model, context, slots
        self.vocab = int(model.config.get_text_config().vocab_size)
        with torch.inference_mode():
            self._way = find_way(model)
        self._open: dict[int, _Sequence] = {}
        self._pace = Pace(CHUNK)

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Begin a sequence and return its slot.

        Raises UserError if
        - the prompt is empty or too long,
        - a token id is outside of the vocabulary,
        - no slot is free.
        """
        if not 0 < len(prompt) < self.context:
            raise UserError(f"the prompt has {len(prompt)} tokens: 1 to {self.context - 1} fit")
        odd = next((token for token in (*prompt, *sampling.logit_bias) if not 0 <= token < self.vocab), None)
        if odd is not None:
            raise UserError(f"token id {odd}: the vocabulary has {self.vocab}")
        free = set(range(self.slots)) - self._open.keys()
        if not free:
            raise UserError(f"all {self.slots} slots are taken")
        slot = min(free)
        generator = torch.Generator(self.model.device).manual_seed(sampling.seed & MASK)
        left = min(sampling.max_new_tokens, self.context - len(prompt))
        past = Past(self.model, self._way)
        self._open[slot] = _Sequence(list(prompt), len(prompt), past, sampling, generator, left)
        return slot

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """Advance the open sequences, and return the new tokens by slot.

        A sequence whose prompt has been read gets one token. Of the shortest other prompt, the next tokens are read:
        up to `CHUNK`, or fewer if a sequence waits for its token.
        """
        going = {slot: sequence for slot, sequence in self._open.items() if sequence.finished is None}
        answering = {slot: sequence for slot, sequence in going.items() if sequence.answers}
        reading = {slot: sequence for slot, sequence in going.items() if not sequence.answers}
        start = time.perf_counter()
        new = {slot: token for slot, sequence in answering.items() if (token := self._advance(sequence, 1)) is not None}
        read, budget = 0, self._pace.budget(len(answering))
        if reading and budget:
            slot = min(reading, key=lambda slot: reading[slot].unread())
            read = reading[slot].past.piece(budget, reading[slot].unread())
            if (token := self._advance(reading[slot], read)) is not None:
                new[slot] = token
        self._pace.note(len(answering), read, time.perf_counter() - start)
        return new

    def _advance(self, sequence: _Sequence, size: int) -> int | None:
        """Read the next `size` tokens. Returns the token that follows them, None if some are still unread."""
        logits = self._read(sequence, size)
        if logits is None:
            return None
        token = _choose(sequence, logits)
        if sequence.sampling.logprobs is not None:
            sequence.scores += score(logits, [token], sequence.sampling.logprobs)
        _append(sequence, token)
        return token

    def _read(self, sequence: _Sequence, size: int) -> Tensor | None:
        """Read the next `size` tokens. Returns logits [1, vocab] after the last token, None while some are unread."""
        start, end = sequence.past.length, sequence.past.length + size
        scored = sequence.sampling.logprobs is not None and sequence.sampling.score_prompt
        logits = sequence.past.read(sequence.tokens, size, all_logits=scored)
        if scored:
            after = sequence.tokens[start + 1 : end + 1]
            sequence.scores += score(logits[0, : len(after)], after, sequence.sampling.logprobs or 0)
        return logits[:, -1].float() if end == len(sequence.tokens) else None

    def scores(self, slot: int) -> list[Score]:
        """The scores of the tokens that came since the last call, as `Engine.scores` gives them."""
        sequence = self._open[slot]
        taken, sequence.scores = sequence.scores, []
        return taken

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
    logits = _adjusted(logits, ids, sequence)
    if sampling.temperature == 0:
        return int(logits.argmax())
    steps = LogitsProcessorList()  # the order is that of `generate` in transformers
    steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return int(torch.multinomial(steps(ids, logits).softmax(-1), 1, generator=sequence.generator))


def _adjusted(logits: Tensor, ids: Tensor, sequence: _Sequence) -> Tensor:
    """Logits [1, vocab] after biases and penalties. `ids` [1, length] are all tokens of the sequence."""
    sampling, logits = sequence.sampling, logits.clone()
    for token, bias in sampling.logit_bias.items():
        logits[0, token] += bias
    if sampling.repetition_penalty != 1:
        logits = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, logits)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = torch.bincount(ids[0, sequence.prompt :], minlength=logits.shape[1])
        logits = logits - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts
    if sampling.constraint is not None:
        allowed = np.unpackbits(sampling.constraint.allowed().view(np.uint8), bitorder="little")[: logits.shape[1]]
        logits = logits.masked_fill(torch.from_numpy(allowed == 0).to(logits.device), -torch.inf)
    return logits


def _append(sequence: _Sequence, token: int) -> None:
    """Add a token to its sequence, and note whether the sequence ends with it."""
    sequence.tokens.append(token)
    sequence.left -= 1
    constraint = sequence.sampling.constraint
    if token in sequence.sampling.stop_tokens or (constraint is not None and constraint.accept(token)):
        sequence.finished = "stop"
    elif sequence.left == 0:
        sequence.finished = "length"
