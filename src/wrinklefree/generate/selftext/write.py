"""Let a model write text to train on, and keep it: `data=self` and `wf selftext`."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint, model_fingerprint
from wrinklefree.core.lock import locked
from wrinklefree.data.tokenizer import tokenizer_fingerprint
from wrinklefree.generate.generate import context_of
from wrinklefree.generate.selftext.documents import Author, Written
from wrinklefree.generate.selftext.kept import Documents, text_file, write_rows
from wrinklefree.generate.selftext.voices import SLOTS, Manner, find_voice
from wrinklefree.tracking.progress import Bar, Clock, Lines

log = logging.getLogger("wrinklefree")

VERSION = 1  # of the way in which documents are made: another version writes anew


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a model is to write."""

    tokens: int
    minutes: float | None = None  # at most, for writing; what there is by then is the text
    length: int = 512  # tokens of a document, at most
    chat_share: float = 0.5  # of the documents, if the tokenizer has a chat template
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    questions: tuple[str, ...] = ()  # all documents answer them, if there are any


def kept_in(folder: Path, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wish: Wish) -> Path:
    """The folder in `folder` for what this model writes in this manner. It need not exist."""
    manner: list[Any] = [VERSION, wish.length, wish.chat_share, wish.temperature, wish.top_p, wish.seed]
    manner += [list(wish.questions)] if wish.questions else []
    words = [tokenizer_fingerprint(tokenizer), tokenizer.bos_token_id, tokenizer.chat_template]
    return folder / f"{name}_{fingerprint([model_fingerprint(model.state_dict()), words, manner])}"


def self_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, wish: Wish, slots: int = SLOTS
) -> Path:
    """Return the file with the text that `model` wrote, in `folder`. What is missing there is written first.

    Raises UserError if the model cannot write, if the disk is full, or if another process writes there.
    """
    for kept in (text_file(folder, wish.tokens), text_file(folder, wish.tokens, wish.minutes)):
        if kept.is_file():
            log.info("data=self: the model has written %s before", kept)
            return kept
    with locked(folder):
        return _complete(model, tokenizer, folder, wish, slots)


def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, wish: Wish, slots: int) -> Path:
    documents = Documents(folder)
    cut = [] if documents.first(wish.tokens) else _write(model, tokenizer, documents, wish, slots)
    chosen = documents.first(wish.tokens)
    path = text_file(folder, wish.tokens, wish.minutes if chosen is None else None)
    if chosen is None:
        chosen = sorted([*documents.done.values(), *cut], key=lambda written: written.number)
    _publish(path, chosen, wish)
    return path


def _publish(path: Path, chosen: Sequence[Written], wish: Wish) -> None:
    """Write the text, and say what is in it. Raises UserError if there is none."""
    rows = [written.row for written in chosen if written.row is not None]
    tokens = sum(written.tokens for written in chosen if written.row is not None)
    chats = sum(written.chat for written in chosen if written.row is not None)
    if not rows:
        raise UserError(
            f"data=self: the model wrote nothing to train on in {wish.minutes or 0:g} minutes ({_dropped(chosen)}): "
            f"give it more (data.self_minutes), or use other text (data=local data.path=FOLDER)"
        )
    write_rows(path, rows)
    log.info("data=self: %d tokens, %d documents, %d of them conversations: %s", tokens, len(rows), chats, path)
    log.info("data=self: dropped %s", _dropped(chosen))
    if tokens < wish.tokens:
        log.warning("data=self: the time was over after %d of %d tokens; what there is is used", tokens, wish.tokens)


def _dropped(chosen: Iterable[Written]) -> str:
    """How many documents were dropped, and why."""
    counts = Counter(written.dropped for written in chosen if written.row is None)
    return ", ".join(f"{number} ({reason})" for reason, number in counts.most_common()) or "none"


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Documents, wish: Wish, slots: int
) -> list[Written]:
    """Write the missing documents. Returns those that were cut off because the time was over."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token to end documents with: set one in it")
    length = min(wish.length, context_of(model))
    author = Author(
        tokenizer,
        model.generation_config,
        length=length,
        chat_share=wish.chat_share,
        seed=wish.seed,
        questions=wish.questions,
    )
    voice = find_voice(model, Manner(wish.temperature, wish.top_p), length, slots)
    within = "" if wish.minutes is None else f", or what it can in {wish.minutes:g} minutes"
    log.info("data=self: the model writes %d tokens%s: %s", wish.tokens, within, voice.name)
    start = time.monotonic()
    progress = _Progress(documents.tokens, wish.tokens)
    try:
        cut: list[Written] = []
        numbers = ((number, author.begin(number)) for number in documents.missing(voice.together))
        for told in voice.tell(numbers, lambda: wish.minutes is not None and _minutes(start) >= wish.minutes):
            if told.cut:
                cut.append(told.written)
                continue
            if told.written.number not in documents.done:
                documents.add(told.written)
            progress.show(documents.tokens + voice.begun)
            if documents.first(wish.tokens):
                break
    finally:
        progress.close()
    return cut


def _minutes(since: float) -> float:
    return (time.monotonic() - since) / 60


class _Progress:
    """Shows how many tokens are written, how fast, and how long the rest takes."""

    def __init__(self, already: int, total: int) -> None:
        self.already, self.total, self.start = already, total, time.monotonic()
        self.bar = Bar(total, min(already, total)) if sys.stdout.isatty() else Lines(total, "written: token")
        self.clock = Clock(total, already)

    def show(self, tokens: int) -> None:
        here, seconds = tokens - self.already, time.monotonic() - self.start
        done = min(tokens, self.total - 1)  # it is never done before the last document is
        self.bar.show(done, f"{here / max(seconds, 1e-9):.0f} tokens/s  ETA {self.clock.remaining(done)}")

    def close(self) -> None:
        self.bar.close()
