"""Documents to batches: tokenize, pack, and stream without end from any exact position.

A tokenized document is an int64 tensor [2, n]: row 0 its token ids, the last of them end-of-sequence; row 1 is 1 at the
first token and 0 elsewhere. Documents are laid end to end and cut into blocks of equal length. A document that is cut
goes on in the next block, without the context before the cut.

`position_ids` restart at each document, and from that transformers derives the block-diagonal mask, but only where
`attention_mask` is None *and* `use_cache=False`: with a cache, even an empty one, transformers does not look for
documents in the positions, and documents see each other without a word of warning.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.data.sources import Position, Source

Batch = dict[str, Tensor]
Encode = Callable[[Sequence[str]], list[Tensor]]

IGNORE = -100  # the label that PyTorch's and transformers' losses leave out

# Documents tokenized in one call: enough to keep the tokenizer's threads busy, a fraction of a second of work.
_ENCODED_TOGETHER = 32


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tensor]:
    """Each text as a tokenized document [2, n].

    Tokens that the tokenizer itself adds (a Llama's begin-of-sequence) stay, as in pretraining.
    Raises UserError where the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token to end documents with: set one in it")
    if not texts:
        return []
    encoded = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [_document(ids, tokenizer.bos_token_id, tokenizer.eos_token_id) for ids in encoded["input_ids"]]


def _document(ids: list[int], bos: int | None, eos: int) -> Tensor:
    if ids[:2] == [bos, bos]:  # written by the chat template, and again by the tokenizer
        ids = ids[1:]
    if ids[-1:] != [eos]:
        ids = [*ids, eos]
    document = torch.zeros(2, len(ids), dtype=torch.int64)
    document[0] = torch.tensor(ids)
    document[1, 0] = 1
    return document


def make_batch(blocks: Tensor, document_mask: bool = True) -> Batch:
    """Blocks [batch, 2, length] as a model's arguments, each int64 [batch, length].

    Labels are the ids (the loss shifts them), -100 at the first token of a document: nothing is predicted across a
    border. Without `document_mask` positions run through, and documents of a block attend to the ones before.
    """
    ids, starts = blocks.unbind(dim=1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    if document_mask:
        positions = positions - (positions * starts).cummax(dim=1).values
    return {
        "input_ids": ids.contiguous(),
        "labels": ids.masked_fill(starts.bool(), IGNORE),
        "position_ids": positions.contiguous(),
    }


def pack(documents: Iterable[Tensor], length: int, pad: int) -> Tensor:
    """All documents [2, n] as blocks [num_blocks, 2, length].

    The last, partial block is dropped where there is a whole one; alone, it is filled with `pad`, labels -100.
    """
    joined = torch.cat(list(documents), dim=1)
    missing = length - joined.shape[1]
    if missing > 0:
        filler = torch.tensor([[pad], [1]]).expand(2, missing)  # each a document of its own: no labels
        joined = torch.cat([joined, filler], dim=1)
    num_blocks = joined.shape[1] // length
    return joined[:, : num_blocks * length].reshape(2, num_blocks, length).transpose(0, 1)


def spread(blocks: Tensor, max_tokens: int | None) -> Tensor:
    """At most `max_tokens` (but one block at least) of blocks [num_blocks, 2, length], evenly over all of them."""
    total, _, length = blocks.shape
    if max_tokens is None or max_tokens >= total * length:
        return blocks
    kept = max(1, max_tokens // length)
    return blocks[[(2 * i + 1) * total // (2 * kept) for i in range(kept)]]


class BatchStream(Iterator[Batch]):
    """Batches without end, each epoch shuffled by (seed, epoch), from any exact position.

    Documents are shuffled in chunks of `shuffle_buffer`, not in a rolling buffer, so that a position is a few numbers:
    where the chunk starts in the source, the document within this process's share of the shuffled chunk, the token
    within that document. `batch_size` and `length` may change at a resume: no document is skipped or seen twice.
    Process `rank` takes every `world_size`-th document, so two processes share none within an epoch; their positions
    differ, each saves its own.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode,
        *,
        batch_size: int,
        length: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle_buffer: int,
        document_mask: bool,
    ):
        self._source, self._encode = source, encode
        self._batch_size, self._length, self._document_mask = batch_size, length, document_mask
        # What a position means something under; a resume under other values is refused.
        self._identity: dict[str, Any] = {
            "source": source.name,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "shuffle_buffer": shuffle_buffer,
        }
        self._epoch = self._chunk = self._document = self._offset = 0
        self._chunk_start: Position | None = None
        self._incoming: Iterator[str] | None = None  # None until the first batch is asked for
        self._share: list[str] = []
        self._encoded: dict[int, Tensor] = {}

    def __next__(self) -> Batch:
        """The next batch. Raises UserError where the source has no documents, or fewer than there are processes."""
        if self._incoming is None:
            self._open_chunk()
        return make_batch(torch.stack([self._block() for _ in range(self._batch_size)]), self._document_mask)

    def state_dict(self) -> dict[str, Any]:
        """The exact position, in plain values."""
        return {
            **self._identity,
            "epoch": self._epoch,
            "chunk": self._chunk,
            "chunk_start": self._chunk_start,
            "document": self._document,
            "offset": self._offset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises UserError where it was saved under another source, seed or process count."""
        for key, value in self._identity.items():
            if state[key] != value:
                raise UserError(
                    f"data position was saved with {key}={state[key]!r}, this run has {value!r}: "
                    f"resume with {state[key]!r}, or start anew from the checkpoint's weights"
                )
        self._epoch, self._chunk, self._chunk_start = state["epoch"], state["chunk"], state["chunk_start"]
        self._document, self._offset = state["document"], state["offset"]
        self._incoming = None

    def _block(self) -> Tensor:
        """The next block [2, length] of this process's documents."""
        parts: list[Tensor] = []
        missing = self._length
        while missing:
            part = self._current()[:, self._offset : self._offset + missing]
            self._offset += part.shape[1]
            missing -= part.shape[1]
            parts.append(part)
        return torch.cat(parts, dim=1)

    def _current(self) -> Tensor:
        """The document [2, n] at the position, which moves on where the document before is used up."""
        tokens = self._tokens()
        while self._offset >= tokens.shape[1]:
            self._document, self._offset = self._document + 1, 0
            while self._document == len(self._share):
                self._next_chunk()
            tokens = self._tokens()
        return tokens

    def _tokens(self) -> Tensor:
        if self._document not in self._encoded:
            texts = self._share[self._document : self._document + _ENCODED_TOGETHER]
            self._encoded = dict(enumerate(self._encode(texts), start=self._document))
        return self._encoded[self._document]

    def _next_chunk(self) -> None:
        self._chunk, self._chunk_start, self._document = self._chunk + 1, self._source.position(), 0
        if not self._fill():
            self._epoch, self._chunk, self._chunk_start = self._epoch + 1, 0, None
            self._open_chunk()

    def _open_chunk(self) -> None:
        """Start reading the source at the chunk's start."""
        self._incoming = self._source.documents(self._chunk_start)
        num_documents = self._fill()
        if num_documents == 0:
            raise UserError(f"{self._source.name}: no text to train on{self._source.hint}")
        if self._chunk == 0 and num_documents < self._identity["world_size"]:
            raise UserError(
                f"{self._source.name}: {num_documents} documents for {self._identity['world_size']} processes: "
                "use fewer processes or more text"
            )

    def _fill(self) -> int:
        """Read and shuffle one chunk, keep this process's share, return how many documents the chunk has."""
        assert self._incoming is not None
        rank, world_size = self._identity["rank"], self._identity["world_size"]
        chunk = list(islice(self._incoming, max(self._identity["shuffle_buffer"], world_size)))
        random.Random(f"{self._identity['seed']} {self._epoch} {self._chunk}").shuffle(chunk)
        self._share, self._encoded = chunk[rank::world_size], {}
        return len(chunk)
