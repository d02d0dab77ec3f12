"""Tokens from the native decoder: several sequences at once, each with its own sampling.

`open` puts a prompt into a slot, each `step` gives one new token to every sequence whose prompt has been read and reads
a piece of the others, `close` frees the slot. A slot that is free keeps the keys and values of its last sequence: a
prompt that begins like it (the next turn of a conversation) goes there and only its rest is read.

A sequence's tokens depend on its prompt and its sampling alone, not on what else is open. Calls come one at a time.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from wrinklefree.core.errors import UserError
from wrinklefree.engine import family
from wrinklefree.engine.assemble import Mode, assemble
from wrinklefree.engine.binding import MASK, Append, CSampling, Decoder, Model
from wrinklefree.engine.source import FolderSource, ModelSource, Source
from wrinklefree.packed.products import native

CHUNK = 256  # tokens of prompts that are read in one step at most: it bounds how long the other sequences wait
MOST_THREADS = 16  # by default; products of one token do not gain from more


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in transformers' order: repetition penalty, temperature, top-k, top-p.

    Temperature 0 is greedy. top_k 0, top_p 1 and penalty 1 are off. Raises UserError for values that mean nothing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()  # the last token may be one of them; none follows it

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (0 <= self.top_k < 2**31, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
        }
        for name, (holds, limit) in limits.items():
            if not holds:
                raise UserError(f"{name}={vars(self)[name]}: must be {limit}")


def supports(config: PreTrainedConfig) -> str | None:
    """Why this loop cannot run a model of this config; None where it can."""
    return native.available() or family.supports(config)


@dataclass
class _Sequence:
    """One open sequence."""

    pending: list[int]  # not yet in the cache
    sampling: Sampling
    native: CSampling
    left: int  # tokens it may still get
    finished: str | None = None


@dataclass
class _Slot:
    tokens: list[int] = field(default_factory=list)  # whose keys and values the cache holds
    open: _Sequence | None = None


class Engine:
    """The native decode loop over one model."""

    def __init__(
        self,
        model: Model,
        pool: native.Pool,
        *,
        context: int,
        slots: int = 1,
        mode: Mode = "int8",
        half_cache: bool = False,
    ) -> None:
        sizes = {"context": context, "slots": slots, "max_rows": CHUNK + slots}
        self._decoder = Decoder(pool, model, **sizes, mode=mode, half_cache=half_cache)
        self._slots = [_Slot() for _ in range(slots)]
        self._vocab = model.sizes["vocab"]
        self.context, self.slots, self.mode, self.threads = context, slots, mode, pool.threads
        self.generation = GenerationConfig()  # what the model's own says of sampling and of its last tokens

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
        """The engine of a packed folder (or a plain one with safetensors).

        `context` is that of the model, or less; `half_cache` keeps keys and values in bf16, half of their memory, and
        near the tokens of fp32. Raises UserError where the folder is damaged or the loop cannot run it.
        """
        return cls._of(FolderSource(Path(path)), threads, context, slots, mode, half_cache)

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
        """The engine of a loaded model with packed, or plain, linear layers. Raises UserError like `from_folder`."""
        return cls._of(ModelSource(model), threads, context, slots, mode, half_cache)

    @classmethod
    def _of(
        cls, source: Source, threads: int | None, context: int | None, slots: int, mode: Mode, half_cache: bool
    ) -> Self:
        reason = supports(source.config)
        if reason is not None:
            raise UserError(f"the native loop cannot run this model: {reason}")
        most = int(source.config.to_dict()["max_position_embeddings"])
        if context is not None and not 1 <= context <= most:
            raise UserError(f"context={context}: this model's context is {most}")
        if slots < 1:
            raise UserError(f"slots={slots}: must be at least 1")
        pool = native.Pool(default_threads() if threads is None else threads)
        model = assemble(source, mode)
        engine = cls(model, pool, context=context or most, slots=slots, mode=mode, half_cache=half_cache)
        engine.generation = source.generation
        return engine

    def describe(self) -> str:
        """`native, avx512-vnni, 2 threads`."""
        return f"native, {native.isa()}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    def open(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """The slot in which `prompt` will be continued.

        Raises UserError where it is empty, has ids outside of the vocabulary or leaves no room, or where all slots
        are taken.
        """
        tokens = self._checked(prompt)
        slot, common = self._best_slot(tokens)
        self._decoder.truncate(slot, common)
        room = min(sampling.max_new_tokens, self.context - len(tokens))
        chosen = CSampling(
            sampling.temperature, sampling.top_p, sampling.repetition_penalty, sampling.top_k, sampling.seed & MASK, 0
        )
        self._slots[slot].tokens = tokens[:common]
        self._slots[slot].open = _Sequence(tokens[common:], sampling, chosen, room)
        return slot

    def _checked(self, prompt: Sequence[int]) -> list[int]:
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise UserError("the prompt is empty: give some text to continue")
        if len(tokens) >= self.context:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, and the model's context is {self.context}: shorten the prompt"
            )
        odd = next((token for token in tokens if not 0 <= token < self._vocab), None)
        if odd is not None:
            raise UserError(f"token id {odd}: the vocabulary has {self._vocab}; is this the model's own tokenizer?")
        return tokens

    def _best_slot(self, tokens: list[int]) -> tuple[int, int]:
        """The free slot that holds most of the beginning of `tokens`, and how much; the last token is read anew."""
        free = [i for i, slot in enumerate(self._slots) if slot.open is None]
        if not free:
            raise UserError(f"all {self.slots} slots are taken: close one, or open the engine with more")
        shared = {i: _common(self._slots[i].tokens, tokens[:-1]) for i in free}
        # Of those that share nothing, the one that would lose least.
        best = max(free, key=lambda i: (shared[i], -len(self._slots[i].tokens)))
        return best, shared[best]

    def step(self) -> dict[int, int]:
        """One new token for each open sequence whose prompt has been read; at most `CHUNK` tokens of prompts."""
        appends, budget = [], CHUNK
        for index, slot in enumerate(self._slots):
            if slot.open is None or slot.open.finished:
                continue
            size = min(len(slot.open.pending), max(budget, 0))
            if len(slot.open.pending) == 1:
                size = 1
            else:
                budget -= size
            if size:
                last = size == len(slot.open.pending)
                appends.append(Append(index, slot.open.pending[:size], slot.open.native if last else None))
        if not appends:
            return {}
        chosen = self._decoder.step(appends)
        for append, token in zip(appends, chosen, strict=True):
            self._note(append, token)
        return {a.slot: token for a, token in zip(appends, chosen, strict=True) if token is not None}

    def _note(self, append: Append, token: int | None) -> None:
        """Note down what a step did to one sequence, which got `token`."""
        slot = self._slots[append.slot]
        sequence = slot.open
        assert sequence is not None
        slot.tokens += append.tokens
        del sequence.pending[: len(append.tokens)]
        if token is None:
            return
        sequence.pending.append(token)
        sequence.native.counter += 1
        sequence.left -= 1
        if token in sequence.sampling.stop_tokens:
            sequence.finished = "stop"
        elif sequence.left == 0:
            sequence.finished = "length"

    def finished(self, slot: int) -> str | None:
        """ "stop" after a stop token, "length" where no more may or can follow, None while it goes on."""
        return self._opened(slot).finished

    def close(self, slot: int) -> None:
        """Free the slot, whether its sequence is finished or not; its cache stays for prompts that begin alike."""
        self._opened(slot)
        self._slots[slot].open = None

    def _opened(self, slot: int) -> _Sequence:
        found = self._slots[slot].open if 0 <= slot < self.slots else None
        if found is None:
            raise UserError(f"slot {slot}: nothing is open there")
        return found

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The tokens that follow `prompt`, a stop token included; for an engine in which nothing else is open."""
        slot = self.open(prompt, sampling)
        try:
            while self.finished(slot) is None:
                tokens = self.step()
                if slot in tokens:
                    yield tokens[slot]
        finally:
            self.close(slot)

    def bytes(self) -> int:
        """Memory of caches and buffers; matrices are their own."""
        return self._decoder.bytes()

    def weight_bytes(self) -> int:
        """Memory of the matrices."""
        return self._decoder.weight_bytes()


def default_threads() -> int:
    """As many as this process has cores, up to `MOST_THREADS`."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
