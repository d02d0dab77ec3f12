"""Generate tokens with the native decoder: several sequences at once, each with its own sampling.

| call | effect |
|---|---|
| `open` | puts a prompt into a free slot |
| `step` | gives one token to each sequence whose prompt has been read, and reads pieces of the other prompts |
| `close` | frees the slot |

A sequence's tokens depend only on its prompt and its sampling, not on other open sequences. An engine is not
thread-safe: one call must end before the next begins.
"""

import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from wrinklefree.core import library
from wrinklefree.core.errors import UserError
from wrinklefree.engine import family
from wrinklefree.engine.assemble import assemble
from wrinklefree.engine.binding import Append, CSampling, Decoder, Mask, Mode, Model, allow, c_sampling
from wrinklefree.engine.pace import Pace
from wrinklefree.engine.sampling import Sampling
from wrinklefree.engine.scores import Score, score
from wrinklefree.engine.source import FolderSource, ModelSource, Source

CHUNK = 256  # the most prompt tokens that one step reads; while other sequences wait for a token it is fewer (pace.py)
SCORED = 64  # the most prompt tokens with logits that one step reads: logits [SCORED, vocab] are kept twice
MOST_THREADS = 16  # the most threads by default; products of one token do not gain from more


def supports(config: PreTrainedConfig) -> str | None:
    """The reason why this loop cannot run a model with this config, or None if it can."""
    return library.available() or family.supports(config)


@dataclass
class _Sequence:
    """One open sequence."""

    pending: list[int]  # tokens that are not yet in the cache
    sampling: Sampling
    native: CSampling
    left: int  # how many tokens it may still get
    finished: str | None = None  # "stop", "length", or None while it goes on
    scores: list[Score] = field(default_factory=list)  # that nobody has taken yet
    allowed: Mask | None = None  # what its constraint allows; `native` points to it
    leader: "_Leader | None" = None  # who reads the beginning of its prompt

    @property
    def answers(self) -> bool:
        """Whether its prompt has been read, so that each step gives it a token."""
        return self.native.counter > 0

    def num_logits(self, size: int) -> int:
        """How many logits are needed when its next `size` tokens are read."""
        if self.sampling.logprobs is None:
            return 0
        return size if self.sampling.score_prompt else int(size == len(self.pending))


@dataclass(frozen=True)
class _Leader:
    """A sequence whose prompt begins like that of another, which waits until the beginning has been read."""

    slot: int
    sequence: _Sequence
    shared: int  # tokens


@dataclass
class _Slot:
    """A place for one sequence in the decoder's cache."""

    tokens: list[int] = field(default_factory=list)  # the cache holds their keys and values
    open: _Sequence | None = None


class Engine:
    """The native decode loop over one model."""

    def __init__(
        self,
        model: Model,
        pool: library.Pool,
        *,
        context: int,
        slots: int = 1,
        mode: Mode = "int8",
        half_cache: bool = False,
    ) -> None:
        sizes = {"context": context, "slots": slots, "max_rows": CHUNK + slots}
        self._decoder = Decoder(pool, model, **sizes, mode=mode, half_cache=half_cache)
        self._slots = [_Slot() for _ in range(slots)]
        self._pace = Pace(CHUNK)
        self.vocab = model.sizes["vocab"]
        self.context, self.slots, self.mode, self.threads = context, slots, mode, pool.threads
        self.generation = GenerationConfig()  # the model's own defaults for sampling, and its stop tokens

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        threads: int | None = None,
        context: int | None = None,
        slots: int = 1,
        mode: Mode = "int8",
        half_cache: bool = False,
    ) -> Self:
        """Load a packed folder, or a plain one with safetensors.

        `context` may be less than the model's. `half_cache` keeps keys and values in bf16, which halves their memory
        and may change a token if two are nearly as likely.
        Raises UserError if the folder is damaged or the loop cannot run the model.
        """
        return cls.from_source(FolderSource(Path(path)), threads, context, slots, mode, half_cache)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        threads: int | None = None,
        context: int | None = None,
        slots: int = 1,
        mode: Mode = "int8",
        half_cache: bool = False,
    ) -> Self:
        """Take the weights of a loaded model, whose linear layers may be packed or plain.

        The arguments are those of `from_folder`. Raises UserError if the loop cannot run the model.
        """
        return cls.from_source(ModelSource(model), threads, context, slots, mode, half_cache)

    @classmethod
    def from_source(
        cls,
        source: Source,
        threads: int | None = None,
        context: int | None = None,
        slots: int = 1,
        mode: Mode = "int8",
        half_cache: bool = False,
    ) -> Self:
        """Take the weights of any source, such as `RoundedSource`.

        The arguments are those of `from_folder`. Raises UserError if the loop cannot run the model.
        """
        reason = supports(source.config)
        if reason is not None:
            raise UserError(f"the native loop cannot run this model: {reason}")
        most = int(family.settings(source.config)["max_position_embeddings"])
        if context is not None and not 1 <= context <= most:
            raise UserError(f"context={context}: this model's context is {most}")
        if slots < 1:
            raise UserError(f"slots={slots}: must be at least 1")
        pool = library.Pool(default_threads() if threads is None else threads)
        model = assemble(source, mode)
        engine = cls(model, pool, context=context or most, slots=slots, mode=mode, half_cache=half_cache)
        engine.generation = source.generation
        return engine

    def describe(self) -> str:
        """One line about the engine, such as `native, avx512-vnni, 2 threads`."""
        return f"native, {library.isa()}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Put `prompt` into a free slot and return the slot's number. `step` then reads and continues it.

        Slots keep the keys and values of their last sequence. If a prompt begins like one of them, open or not, it
        takes over what they share, and only the rest is read. What another sequence is going to read is read once.
        Raises UserError if the prompt is empty, has ids outside the vocabulary, or fills the context, and if no slot is
        free.
        """
        tokens = self._checked(prompt)
        self._check_bias(sampling)
        # A prompt whose tokens are scored is read as a whole.
        known = [] if sampling.score_prompt else tokens[:-1]
        slot = self._free_slot(known)
        common = len(self._slots[slot].tokens)
        room = min(sampling.max_new_tokens, self.context - len(tokens))
        sequence = _Sequence(tokens[common:], sampling, c_sampling(sampling, len(tokens)), room)
        sequence.leader = self._leader(known, common)
        self._slots[slot].open = sequence
        return slot

    def _leader(self, tokens: list[int], common: int) -> _Leader | None:
        """The open sequence that will read the longest beginning of `tokens`, if that is more than `common` tokens."""
        leaders = [
            _Leader(index, slot.open, _common(slot.tokens + slot.open.pending, tokens))
            for index, slot in enumerate(self._slots)
            if slot.open is not None and not slot.open.answers
        ]
        best = max(leaders, key=lambda leader: leader.shared, default=None)
        return best if best is not None and best.shared > common else None

    def _check_bias(self, sampling: Sampling) -> None:
        odd = next((token for token in sampling.logit_bias if not 0 <= token < self.vocab), None)
        if odd is not None:
            raise UserError(f"logit_bias: token id {odd}: the vocabulary has {self.vocab}")

    def _checked(self, prompt: Sequence[int]) -> list[int]:
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise UserError("the prompt is empty: give some text to continue")
        if len(tokens) >= self.context:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, and the model's context is {self.context}: shorten the prompt"
            )
        odd = next((token for token in tokens if not 0 <= token < self.vocab), None)
        if odd is not None:
            raise UserError(f"token id {odd}: the vocabulary has {self.vocab}; is this the model's own tokenizer?")
        return tokens

    def _free_slot(self, tokens: list[int]) -> int:
        """A free slot that holds the longest known beginning of `tokens`, and nothing more.

        It is the slot with the fewest tokens to lose. If another slot knows more of the beginning, it is copied.
        """
        free = [i for i, slot in enumerate(self._slots) if slot.open is None]
        if not free:
            raise UserError(f"all {self.slots} slots are taken: close one, or open the engine with more")
        shared = [_common(slot.tokens, tokens) for slot in self._slots]
        target = min(free, key=lambda i: (len(self._slots[i].tokens) - shared[i], -shared[i]))
        source = max(range(self.slots), key=lambda i: shared[i])
        if shared[source] > shared[target]:
            self._decoder.copy(source, target, shared[source])
        else:
            self._decoder.truncate(target, shared[target])
        self._slots[target].tokens = tokens[: max(shared[source], shared[target])]
        return target

    def step(self) -> dict[int, int]:
        """Give one token to each open sequence whose prompt has been read: {slot: token}.

        The others read up to `CHUNK` tokens of their prompts together, or fewer if a sequence waits for its token.
        """
        appends = self._plan()
        if not appends:
            return {}
        start = time.perf_counter()
        chosen = self._decoder.step(appends)
        self._learn(appends, time.perf_counter() - start)
        for append, token in zip(appends, chosen, strict=True):
            self._note(append, token)
        return {a.slot: token for a, token in zip(appends, chosen, strict=True) if token is not None}

    def _plan(self) -> list[Append]:
        """What each open sequence appends in the next step."""
        going = [(i, slot.open) for i, slot in enumerate(self._slots) if slot.open and not slot.open.finished]
        answering = [(i, sequence) for i, sequence in going if sequence.answers]
        reading = [(i, sequence) for i, sequence in going if not sequence.answers and not self._waits(i, sequence)]
        appends = [self._append(i, sequence, 1) for i, sequence in answering]
        budget, scored = self._pace.budget(len(answering)), SCORED
        # The shortest first, so that what it does not need of its share goes to the others.
        reading.sort(key=lambda pair: len(pair[1].pending))
        for left, (index, sequence) in zip(range(len(reading), 0, -1), reading, strict=True):
            size = min(len(sequence.pending), -(-budget // left))
            if sequence.sampling.score_prompt:
                size = min(size, scored)
                scored -= size
            budget -= size
            if size:
                appends.append(self._append(index, sequence, size))
        return appends

    def _waits(self, index: int, sequence: _Sequence) -> bool:
        """Whether a sequence still waits for its leader. If it no longer does, it has taken over what was read."""
        leader = sequence.leader
        if leader is None:
            return False
        slot, source = self._slots[index], self._slots[leader.slot]
        if source.open is leader.sequence and len(source.tokens) < leader.shared:
            return True
        prompt = slot.tokens + sequence.pending
        shared = min(_common(source.tokens, prompt), leader.shared)  # the leader may have been closed before its end
        if shared > len(slot.tokens):
            self._decoder.copy(leader.slot, index, shared)
            slot.tokens, sequence.pending = prompt[:shared], prompt[shared:]
        sequence.leader = None
        return False

    def _learn(self, appends: list[Append], seconds: float) -> None:
        """Tell the pace how long a step took."""
        sequences = [self._opened(append.slot) for append in appends]
        streams = sum(sequence.answers for sequence in sequences)
        read = sum(len(a.tokens) for a, sequence in zip(appends, sequences, strict=True) if not sequence.answers)
        self._pace.note(streams, read, seconds)

    def _append(self, index: int, sequence: _Sequence, size: int) -> Append:
        last, rows = size == len(sequence.pending), sequence.num_logits(size)
        if last and sequence.sampling.constraint is not None:
            sequence.allowed = sequence.sampling.constraint.allowed()
            allow(sequence.native, sequence.allowed)
        logits = np.empty((rows, self.vocab), np.float32) if rows else None
        return Append(index, sequence.pending[:size], sequence.native if last else None, logits)

    def _note(self, append: Append, token: int | None) -> None:
        """Update one sequence after a step. `token` is None if its prompt has not been read to the end."""
        slot = self._slots[append.slot]
        sequence = slot.open
        assert sequence is not None
        slot.tokens += append.tokens
        del sequence.pending[: len(append.tokens)]
        if append.logits is not None:
            after = [*append.tokens[1:], sequence.pending[0] if token is None else token]
            logits = torch.from_numpy(append.logits)
            sequence.scores += score(logits, after[-len(logits) :], sequence.sampling.logprobs or 0)
        if token is None:
            return
        sequence.pending.append(token)
        sequence.native.counter += 1
        sequence.left -= 1
        constraint = sequence.sampling.constraint
        if token in sequence.sampling.stop_tokens or (constraint is not None and constraint.accept(token)):
            sequence.finished = "stop"
        elif sequence.left == 0:
            sequence.finished = "length"

    def finished(self, slot: int) -> str | None:
        """Why the sequence in `slot` has ended. Raises UserError if nothing is open there.

        "stop" means a stop token, "length" that it has all its tokens or fills the context, None that it goes on.
        """
        return self._opened(slot).finished

    def scores(self, slot: int) -> list[Score]:
        """The scores of the tokens that came since the last call, if the sequence's sampling asks for them.

        With `score_prompt` the first are those of the prompt's tokens but the first, which nothing stands before.
        """
        sequence = self._opened(slot)
        taken, sequence.scores = sequence.scores, []
        return taken

    def close(self, slot: int) -> None:
        """Free the slot, even if its sequence has not ended. Its cache stays for prompts that begin alike."""
        self._opened(slot)
        self._slots[slot].open = None

    def reset(self) -> None:
        """Close all sequences and forget all tokens, after a step that failed: what it left is not to be trusted."""
        for index in range(self.slots):
            self._decoder.clear(index)
            self._slots[index] = _Slot()

    def _opened(self, slot: int) -> _Sequence:
        sequence = self._slots[slot].open if 0 <= slot < self.slots else None
        if sequence is None:
            raise UserError(f"slot {slot}: nothing is open there")
        return sequence

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[int, None, None]:
        """Yield the tokens that follow `prompt`, a stop token included.

        Tokens of other open sequences are dropped, so nothing else should be open.
        """
        slot = self.open(prompt, sampling)
        try:
            while self.finished(slot) is None:
                tokens = self.step()
                if slot in tokens:
                    yield tokens[slot]
        finally:
            self.close(slot)

    def bytes(self) -> int:
        """The memory of caches and buffers, in bytes, without the model's matrices."""
        return self._decoder.bytes()

    def weight_bytes(self) -> int:
        """The memory of the model's matrices, in bytes."""
        return self._decoder.weight_bytes()


def default_threads() -> int:
    """The number of cores that this process may use, at most `MOST_THREADS`."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
