"""Turns documents into batches: tokenizes and packs them, and streams without end from any exact position.

A tokenized document is an int64 tensor [3, n]:

    row 0    token ids; the last one is end-of-sequence
    row 1    1 at the first token, else 0
    row 2    1 if the token is learned: in a text all but the first, in an example the answer

Texts are joined and cut into blocks of equal length. A text that is cut continues in the next block, without the
context before the cut. Examples are never cut: one that does not fit begins the next block, and padding fills the gap.
"""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wrinklefree.core.batch import IGNORE, Batch
from wrinklefree.core.errors import UserError
from wrinklefree.data.identity import Identity, check_same, keeps_place
from wrinklefree.data.sources import Document, Example, GoodRows, Position

log = logging.getLogger("wrinklefree")

Encode = Callable[[Sequence[Document]], list[Tensor]]


# Documents per call of the tokenizer: enough to keep its threads busy, and done in a fraction of a second.
ENCODED_TOGETHER = 32


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> list[Tensor]:
    """Return each document as a tensor [3, n].

    A token that the tokenizer adds in front (a Llama's begin-of-sequence) stays, as in pretraining.
    Raises UserError if the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token to end documents with: set one in it")
    # An example is tokenized as one text. As many tokens as its prompt has alone are the prompt, the rest the answer.
    # lm-evaluation-harness does the same: what is scored was trained, even if a token spans the border.
    wholes = _tokens(tokenizer, [d.prompt + d.answer if isinstance(d, Example) else d for d in documents])
    prompts = iter(_tokens(tokenizer, [d.prompt for d in documents if isinstance(d, Example)]))
    lengths = [len(next(prompts)) if isinstance(d, Example) else 0 for d in documents]
    return [_document([*ids, tokenizer.eos_token_id], n) for ids, n in zip(wholes, lengths, strict=True)]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, with at most one begin-of-sequence and no end-of-sequence."""
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    return [_bare(ids, tokenizer.bos_token_id, tokenizer.eos_token_id) for ids in encoded]


def _bare(ids: list[int], bos: int | None, eos: int) -> list[int]:
    if ids[:2] == [bos, bos]:  # one from the chat template, one from the tokenizer
        ids = ids[1:]
    return ids[:-1] if ids[-1:] == [eos] and len(ids) > 1 else ids


def _document(ids: list[int], prompt: int) -> Tensor:
    """Return `ids` as a document [3, n]. Tokens from number `prompt` on are learned, but never the first one."""
    document = torch.zeros(3, len(ids), dtype=torch.int64)
    document[0] = torch.tensor(ids)
    document[1, 0] = 1
    document[2, max(1, prompt) :] = 1
    return document


def padding(length: int, pad: int) -> Tensor:
    """Return `length` tokens [3, length] of padding. Each is a document of its own, and none is learned."""
    return torch.tensor([[pad], [1], [0]]).expand(3, length)


def make_batch(blocks: Tensor, document_mask: bool = True, alone: bool = False) -> Batch:
    """Return blocks [batch, 3, length] as a model's arguments, each int64 [batch, length].

    Labels are token ids, not shifted, and -100 for tokens that are not learned.
    Without `document_mask`, positions run through the block, and a document attends to the ones before it.
    With `alone`, each block has one document. Its positions are called `places`, and no model gets them.
    """
    ids, starts, learned = blocks.unbind(dim=1)
    # Positions restart at each document, and from them transformers derives the block-diagonal mask. It does so only if
    # `attention_mask` is None and `use_cache=False`: with a cache, even an empty one, documents see each other, and
    # nothing warns of it.
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    if document_mask:
        positions = positions - (positions * starts).cummax(dim=1).values
    return {
        "input_ids": ids.contiguous(),
        "labels": ids.masked_fill(learned == 0, IGNORE),
        "places" if alone else "position_ids": positions.contiguous(),
    }


def pack(documents: Iterable[Tensor], length: int, pad: int) -> Tensor:
    """Join documents [3, n] and cut them into blocks [num_blocks, 3, length].

    A partial last block is dropped. If it is the only block, it is filled with `pad` instead.
    """
    joined = torch.cat(list(documents), dim=1)
    missing = length - joined.shape[1]
    if missing > 0:
        joined = torch.cat([joined, padding(missing, pad)], dim=1)
    num_blocks = joined.shape[1] // length
    return joined[:, : num_blocks * length].reshape(3, num_blocks, length).transpose(0, 1)


def pack_alone(documents: Iterable[Tensor], length: int, pad: int) -> Tensor:
    """Put documents [3, n] into blocks [num_blocks, 3, length], one in each. Long ones are cut; `pad` fills blocks."""
    pieces = [piece for document in documents for piece in document.split(length, dim=1)]
    return torch.stack([_filled([piece], length, pad) for piece in pieces])


def pack_whole(documents: Iterable[Tensor], length: int, pad: int) -> Tensor:
    """Put documents [3, n] into blocks [num_blocks, 3, length] without cutting any; `pad` fills the gaps."""
    blocks: list[list[Tensor]] = []
    room = 0
    for document in (shorten(d, length) for d in documents):
        if document.shape[1] > room:
            blocks.append([])
            room = length
        blocks[-1].append(document)
        room -= document.shape[1]
    return torch.stack([_filled(parts, length, pad) for parts in blocks])


def shorten(document: Tensor, length: int) -> Tensor:
    """Return at most the last `length` tokens of a document [3, n]. An example loses the beginning of its prompt."""
    if document.shape[1] <= length:
        return document
    document = document[:, -length:].clone()
    document[1, 0], document[2, 0] = 1, 0  # a first token cannot be predicted
    return document


def _filled(parts: list[Tensor], length: int, pad: int) -> Tensor:
    return torch.cat([*parts, padding(length - sum(part.shape[1] for part in parts), pad)], dim=1)


def spread(blocks: Tensor, max_tokens: int | None) -> Tensor:
    """Keep at most `max_tokens` of blocks [num_blocks, 3, length], evenly spread; at least one block stays."""
    total, _, length = blocks.shape
    if max_tokens is None or max_tokens >= total * length:
        return blocks
    kept = max(1, max_tokens // length)
    return blocks[[(2 * i + 1) * total // (2 * kept) for i in range(kept)]]


class BatchStream(Iterator[Batch]):
    """Batches without end; each epoch is shuffled by (seed, epoch). A saved position is exact.

    All processes follow one order of blocks. Process `rank` takes its own `batch_size` rows from each global batch.
    `batch_size`, `length` and `world_size` may change at a resume: no document is skipped or seen twice.
    A batch that cannot be made, because a row is bad, leaves the position where the batch before it ended.
    """

    # Documents are shuffled in chunks, not in a rolling buffer, so that a position is a few numbers: where the chunk
    # starts in the source, the document in the shuffled chunk, and the token in that document.
    # Each process tokenizes everything: at a million tokens per second that costs little beside the training.

    def __init__(
        self,
        source: GoodRows,
        encode: Encode,
        *,
        identity: Identity,
        allow_changes: bool = False,
        batch_size: int,
        length: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle_buffer: int,
        document_mask: bool,
        pad: int | None = None,
        alone: int | None = None,
    ):
        """`identity` says what the source reads; a position under another is refused, unless `allow_changes`.

        `pad` is the token that fills blocks, if documents must not be cut. With None they are cut. `alone` is the token
        that fills blocks of one document each; with None, a block may have several.
        """
        self._source, self._encode = source, encode
        self._batch_size, self._length, self._document_mask, self._pad = batch_size, length, document_mask, pad
        self._rank, self._world_size, self._alone = rank, world_size, alone
        self._data, self._allow_changes = {**identity, **source.facts}, allow_changes
        self._order: dict[str, Any] = {"seed": seed, "shuffle_buffer": shuffle_buffer}
        self._epoch = self._chunk = self._document = self._offset = 0
        self._chunk_start: Position | None = None
        self._incoming: Iterator[Document] | None = None  # None until the first batch is asked for
        self._shuffled: list[Document] = []
        self._encoded: dict[int, Tensor] = {}

    @property
    def identity(self) -> Identity:
        """What the data is, by content and settings."""
        return self._data

    @property
    def skipped(self) -> int:
        """How many bad rows were left out. A row counts once, however often the data is read."""
        return self._source.skipped

    def __next__(self) -> Batch:
        """Return this process's rows of the next global batch.

        Raises UserError if the source has no documents, or if a row is bad. The position stays where it was.
        """
        before = self._position()
        try:
            if self._incoming is None:
                self._open_chunk()
            blocks = [self._block() for _ in range(self._world_size * self._batch_size)]
        except UserError:
            self._go_to(before)
            raise
        first = self._rank * self._batch_size
        rows = torch.stack(blocks[first : first + self._batch_size])
        return make_batch(rows, self._document_mask, self._alone is not None)

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position in plain values. It is the same in every process."""
        return {**self._order, "data": self._data, **self._position()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises UserError if it was saved with other data, another seed or another shuffle buffer, unless changes are
        allowed. Then it goes to the same place as far as there is one, or else to the beginning of the same pass.
        """
        saved, now = self._identities(state)
        changed = check_same(saved, now, self._allow_changes)
        place = {key: state.get(key) for key in self._position()}
        if changed and not self._has_place(changed, saved, now, state):
            log.warning("the data is too different to go on in the middle: its pass begins anew")
            place = {"epoch": state.get("epoch", 0), "chunk": 0, "chunk_start": None, "document": 0, "offset": 0}
        self._go_to(place)

    def _identities(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the identity that a state has, and that of this stream in the same form."""
        saved = {key: state.get(key) for key in self._order}
        if isinstance(state.get("data"), dict):
            return {**saved, **state["data"]}, {**self._order, **self._data}
        source = {"source": state.get("source")}  # version 0.1, or a stream of another kind
        return {**source, **saved}, {"source": self._source.name, **self._order}

    def _has_place(self, changed: set[str], saved: Identity, now: Identity, state: dict[str, Any]) -> bool:
        """Whether a saved place exists in data that has changed."""
        if not {*self._position()} <= state.keys():
            return False
        start = state["chunk_start"]
        if start is None:  # the beginning of a pass is one in any data
            return state["chunk"] == 0
        inner = start["turn"][0] or {} if "turn" in start else start
        return keeps_place(changed, saved, now, inner.get("file"))

    def _position(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "chunk": self._chunk,
            "chunk_start": self._chunk_start,
            "document": self._document,
            "offset": self._offset,
        }

    def _go_to(self, position: dict[str, Any]) -> None:
        """Go to a position. The next batch reads its chunk anew."""
        self._epoch, self._chunk, self._chunk_start = position["epoch"], position["chunk"], position["chunk_start"]
        self._document, self._offset = position["document"], position["offset"]
        self._incoming = None

    def _block(self) -> Tensor:
        """Return the next block [3, length]."""
        if self._alone is not None:
            return self._alone_block(self._alone)
        return self._cut_block() if self._pad is None else self._whole_block(self._pad)

    def _alone_block(self, pad: int) -> Tensor:
        document, begin = self._current(), self._offset
        piece = document[:, begin : begin + self._length] if self._pad is None else shorten(document, self._length)
        self._offset = begin + piece.shape[1] if self._pad is None else document.shape[1]
        return _filled([piece], self._length, pad)

    def _cut_block(self) -> Tensor:
        parts: list[Tensor] = []
        missing = self._length
        while missing:
            part = self._current()[:, self._offset : self._offset + missing]
            self._offset += part.shape[1]
            missing -= part.shape[1]
            parts.append(part)
        return torch.cat(parts, dim=1)

    def _whole_block(self, pad: int) -> Tensor:
        parts: list[Tensor] = []
        room = self._length
        while (document := shorten(self._current(), self._length)).shape[1] <= room:
            self._offset = self._current().shape[1]  # all of it is taken
            room -= document.shape[1]
            parts.append(document)
        return _filled(parts, self._length, pad)

    def _current(self) -> Tensor:
        """Return the document [3, n] at the position. If the last one was all taken, move on to the next."""
        while self._offset >= (tokens := self._tokens()).shape[1]:
            self._document, self._offset = self._document + 1, 0
            self._find_document()
        return tokens

    def _find_document(self) -> None:
        """Move on to the next chunk if this one has no more documents."""
        while self._document >= len(self._shuffled):
            self._next_chunk()

    def _tokens(self) -> Tensor:
        if self._document not in self._encoded:
            texts = self._shuffled[self._document : self._document + ENCODED_TOGETHER]
            self._encoded = dict(enumerate(self._encode(texts), start=self._document))
        return self._encoded[self._document]

    def _next_chunk(self) -> None:
        self._chunk, self._chunk_start = self._chunk + 1, self._source.position()
        self._document = self._offset = 0
        if not self._fill():
            self._epoch, self._chunk, self._chunk_start = self._epoch + 1, 0, None
            self._open_chunk()

    def _open_chunk(self) -> None:
        """Start to read the source at the current chunk. Raises UserError if there is nothing to read."""
        self._incoming = self._source.documents(self._chunk_start)
        if not self._fill() and self._chunk_start is None:
            raise UserError(f"{self._source.name}: no text to train on{self._source.hint}")
        self._find_document()  # data that has changed may have fewer documents here

    def _fill(self) -> int:
        """Read and shuffle one chunk. Returns its number of documents, 0 at the end of the source."""
        assert self._incoming is not None
        self._shuffled, self._encoded = list(islice(self._incoming, self._order["shuffle_buffer"])), {}
        random.Random(f"{self._order['seed']} {self._epoch} {self._chunk}").shuffle(self._shuffled)
        return len(self._shuffled)
