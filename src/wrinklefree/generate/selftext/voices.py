"""Run a model on many documents at once: on the native loop with 8-bit weights, or else in transformers.

| voice | used | a document is the same |
|---|---|---|
| `NativeVoice` | on a CPU, for families that the native loop knows | for any number of slots and threads |
| `TransformersVoice` | otherwise | for any interruption, since documents form fixed groups |
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.distributed.world import has_bf16
from wrinklefree.engine.engine import Engine, supports
from wrinklefree.engine.sampling import Sampling
from wrinklefree.engine.source import RoundedSource
from wrinklefree.generate.selftext.documents import Ask, Writing, Written

SLOTS = 32  # documents at once on the native loop; 64 are 4 % faster, with twice the memory (LOG.md)

GROUP = 64  # documents at once in transformers; part of what a seed means there

Over = Callable[[], bool]  # whether the time is over


@dataclass(frozen=True)
class Manner:
    """How tokens are chosen."""

    temperature: float
    top_p: float


@dataclass(frozen=True)
class Told:
    """A document, and whether it was cut off because the time was over."""

    written: Written
    cut: bool = False


class Voice(Protocol):
    """Runs a model on documents."""

    name: str
    together: int  # documents that depend on one another: those whose numbers have the same quotient by this number

    @property
    def begun(self) -> int:
        """How many tokens the open documents have so far, to show progress."""

    def tell(self, documents: Iterator[tuple[int, Writing]], over: Over) -> Iterator[Told]:
        """Yield documents as they are done. If the time is over, yield what there is of the open ones and end."""


def find_voice(model: PreTrainedModel, manner: Manner, length: int, slots: int = SLOTS) -> Voice:
    """The fastest voice that this model can have on this machine."""
    reason = "it is on a GPU" if model.device.type != "cpu" else supports(model.config)
    return NativeVoice(model, manner, length, slots) if reason is None else TransformersVoice(model, manner, reason)


@dataclass
class _Open:
    """A document that is being written."""

    number: int
    writing: Writing
    ask: Ask
    tokens: list[int] = field(default_factory=list)


def _next(document: _Open) -> Written | None:
    """Hand a document the tokens that it asked for. Returns the document if it is done; if not, it asks again."""
    try:
        document.ask, document.tokens = document.writing.send(document.tokens), []
    except StopIteration as done:
        written: Written = done.value
        return written
    return None


def _cut(document: _Open) -> Iterator[Told]:
    """What there is of a document that cannot be finished: nothing if its last words have not begun."""
    written = _next(document) if document.tokens else None
    if written is not None:
        yield Told(written, cut=True)


class NativeVoice:
    """The native loop, with linear layers and embedding rounded to 8 bits. A free slot takes the next document."""

    def __init__(self, model: PreTrainedModel, manner: Manner, length: int, slots: int = SLOTS) -> None:
        threads = torch.get_num_threads()
        self.engine = Engine.from_source(RoundedSource(model), threads, length, slots, half_cache=True)
        self.manner = manner
        self.name = f"{self.engine.describe()}, 8-bit weights, {slots} documents at a time"
        self.together = 1
        self.opened: dict[int, _Open] = {}

    @property
    def begun(self) -> int:
        """How many tokens the open documents have so far."""
        return sum(len(document.ask.prompt) + len(document.tokens) for document in self.opened.values())

    def tell(self, documents: Iterator[tuple[int, Writing]], over: Over) -> Iterator[Told]:
        """Yield documents as they are done."""
        opened = self.opened
        while not over():
            for number, writing in islice(documents, self.engine.slots - len(opened)):
                self._open(_Open(number, writing, next(writing)))
            if not opened:
                return
            for slot, token in self.engine.step().items():
                opened[slot].tokens.append(token)
                if self.engine.finished(slot):
                    yield from self._turn(slot)
        for slot, document in opened.items():
            self.engine.close(slot)
            yield from _cut(document)

    def _open(self, document: _Open) -> None:
        ask = document.ask
        sampling = Sampling(
            ask.most, self.manner.temperature, top_p=self.manner.top_p, seed=ask.seed, stop_tokens=ask.ends
        )
        self.opened[self.engine.open(ask.prompt, sampling)] = document

    def _turn(self, slot: int) -> Iterator[Told]:
        """End a turn of the document in `slot`: the document is done, or goes on with its next turn."""
        self.engine.close(slot)
        document = self.opened.pop(slot)
        written = _next(document)
        if written is None:
            self._open(document)  # the slot still knows the beginning
        else:
            yield Told(written)


class _OutOfTime(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, over: Over) -> None:
        self.over = over

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        return torch.full((len(input_ids),), self.over(), device=input_ids.device)


class TransformersVoice:
    """`generate` of transformers, in bf16 where the processor has it. Documents form groups by their numbers."""

    def __init__(self, model: PreTrainedModel, manner: Manner, reason: str) -> None:
        half = has_bf16(model.device) and model.dtype == torch.float32
        self.model = copy.deepcopy(model).to(torch.bfloat16) if half else model
        self.manner = manner
        self.name = f"transformers ({reason}), {GROUP} documents at a time"
        self.together = GROUP
        self.begun = 0  # a group is done at once

    def tell(self, documents: Iterator[tuple[int, Writing]], over: Over) -> Iterator[Told]:
        """Yield documents group by group."""
        while not over():
            group = [_Open(number, writing, next(writing)) for number, writing in islice(documents, GROUP)]
            if not group:
                return
            yield from self._tell_group(group, over)

    def _tell_group(self, group: list[_Open], over: Over) -> Iterator[Told]:
        done: list[Told] = []
        turn = 0
        while group and not over():
            turn += 1
            # Turns of one kind: their prompts are alike, and so are the tokens that end them.
            for document, tokens in zip(group, self._continued([d.ask for d in group], turn, over), strict=True):
                document.tokens = tokens
            if over():
                break
            ended = [(document, _next(document)) for document in group]
            done += [Told(written) for _, written in ended if written is not None]
            group = [document for document, written in ended if written is None]
        yield from done  # all at once: a group that is interrupted is written again from its beginning
        for document in group:
            yield from _cut(document)

    @torch.no_grad()
    def _continued(self, asks: Sequence[Ask], turn: int, over: Over) -> list[list[int]]:
        """The tokens that follow each prompt."""
        longest, most = max(len(ask.prompt) for ask in asks), max(ask.most for ask in asks)
        ids = torch.zeros(len(asks), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, ask in enumerate(asks):
            ids[row, longest - len(ask.prompt) :] = torch.tensor(ask.prompt)
            mask[row, longest - len(ask.prompt) :] = 1
        ends = sorted(frozenset[int]().union(*(ask.ends for ask in asks)))
        with torch.random.fork_rng():
            torch.manual_seed(int(fingerprint([ask.seed for ask in asks]), 16) >> 1)
            found = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=most,
                do_sample=True,
                temperature=self.manner.temperature,
                top_k=0,
                repetition_penalty=1.0,
                top_p=self.manner.top_p,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                stopping_criteria=[_OutOfTime(over)],
            )
        return [_until_end(row, ask) for row, ask in zip(found[:, longest:].tolist(), asks, strict=True)]


def _until_end(tokens: list[int], ask: Ask) -> list[int]:
    """The tokens up to the first end, at most as many as were asked for."""
    tokens = tokens[: ask.most]
    end = next((place for place, token in enumerate(tokens) if token in ask.ends), len(tokens) - 1)
    return tokens[: end + 1]
