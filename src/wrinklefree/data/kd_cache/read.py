"""Reads the KD cache: a teacher's answers to every next token, written once and read by any number of trainings.

    DIR/manifest.json               what is in the cache, and what it was made from (`Manifest`)
    DIR/train-00000.safetensors     up to `shard_size` sequences per file, in the order of the data
    DIR/heldout-00000.safetensors   never trained on

A shard holds n sequences of L tokens, with K likeliest and R random words from a vocabulary of V. Ids are uint16 if
V <= 65536, else int32:

    input_ids      [n, L]         ids     the sequences
    starts         [n, L]         uint8   1 at the first token of each document
    learned        [n, L]         uint8   1 if the token is a label: not the first of a text, not in a masked prompt
    topk_ids       [n, L-1, K]    ids     the likeliest words after token t, likeliest first
    topk_logits    [n, L-1, K]    fp16    their logits
    rest           [n, L-1]       fp32    log-sum-exp of the logits of all words outside the support
    random_ids     [n, L-1, R]    ids     other words, one from each R-th of the vocabulary
    random_logits  [n, L-1, R]    fp16    their logits; -1e4 for a word that is in the top k or was drawn twice

The support of a position is its top-k and random words together: distinct words whose logits are known.

`rest` stores the tail itself, not the total over V: if the teacher is sure, the tail is below 1e-6 of the total, and
total minus support cancels in fp32. It still matters, because a temperature of 4 turns it into 3 %.
"""

import bisect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wrinklefree.core.batch import IGNORE, Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.numbers import not_numbers
from wrinklefree.data.identity import check_same
from wrinklefree.data.kd_cache.manifest import DTYPES, MANIFEST, read_manifest, shard_name
from wrinklefree.data.packing import make_batch
from wrinklefree.data.shuffled import ShuffledStream
from wrinklefree.data.sources import Split
from wrinklefree.data.tokenizer import check_written_with

FLAGS = ("starts", "learned")

OPEN_SHARDS = 64  # mapped at a time


class KDCache:
    """A finished cache, open for reading. Files are mapped, so it takes the memory of a batch, whatever its size."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if there is no finished cache, or if a shard is missing, truncated or foreign."""
        self.folder, self.manifest = folder, read_manifest(folder)
        if not self.manifest.complete:
            raise UserError(f"{folder}: the cache is not finished: run the same `wf cache` again to continue it")
        self._ends = {split: list(accumulate(nums)) for split, nums in self.manifest.shards.items()}
        self._open: OrderedDict[str, Any] = OrderedDict()
        for split in ("train", "heldout"):
            for number, num in enumerate(self.manifest.shards[split]):
                self._check(shard_name(split, number), num, number)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError if the tokenizer is not the one that the cache was written with."""
        manifest = self.manifest
        check_written_with(tokenizer, manifest.tokenizer_fingerprint, manifest.tokenizer, str(self.folder))

    def batch(self, split: Split, rows: Sequence[int]) -> Batch:
        """Return sequences as a model's arguments and labels (see `packing.make_batch`), with the teacher's answers:

        kd_ids       int64 [B, L-1, K+R]    the support
        kd_logits    fp32 [B, L-1, K+R]     its logits
        kd_rest      fp32 [B, L-1]          log-sum-exp of all other words' logits; left out if it is unknown
        """
        loaded = [self._sequence(split, row) for row in rows]
        tensors = {name: torch.stack([sequence[name] for sequence in loaded]) for name in loaded[0]}
        batch = batch_of(tensors)
        kinds = ["topk", "random"] if self.manifest.negatives else ["topk"]
        batch["kd_ids"] = torch.cat([tensors[f"{kind}_ids"] for kind in kinds], dim=-1)
        batch["kd_logits"] = torch.cat([tensors[f"{kind}_logits"] for kind in kinds], dim=-1)
        if "rest" in tensors:
            batch["kd_rest"] = tensors["rest"]
        return batch

    def heldout(self, batch_size: int, max_tokens: int) -> Iterator[Batch]:
        """Return held-out batches of at most `max_tokens` tokens, evenly spread. They are the same at every call."""
        total = self.manifest.count("heldout")
        kept = min(total, max(1, max_tokens // self.manifest.length))
        rows = [(2 * i + 1) * total // (2 * kept) for i in range(kept)]
        return (self.batch("heldout", rows[i : i + batch_size]) for i in range(0, kept, batch_size))

    def _sequence(self, split: Split, row: int) -> dict[str, Tensor]:
        ends = self._ends[split]
        number = bisect.bisect_right(ends, row)
        shard = self._shard(shard_name(split, number))
        inside = row - (ends[number - 1] if number else 0)
        found = {name: _plain(shard.get_slice(name)[inside]) for name in self.manifest.shapes(1)}
        problem = self._problem(found)
        if problem:
            raise UserError(f"{self.folder / shard_name(split, number)}: sequence {inside}: {problem}: write it again")
        return found

    def _problem(self, sequence: dict[str, Tensor]) -> str:
        """What is wrong with the values of a sequence; "" if nothing is."""
        for name, tensor in sequence.items():
            if tensor.is_floating_point() and not_numbers(tensor):
                return f"{name} {not_numbers(tensor)}"
            if name.endswith("ids") and not 0 <= tensor.min() <= tensor.max() < self.manifest.vocab_size:
                return f"{name} outside of the {self.manifest.vocab_size} words"
            if name in FLAGS and tensor.max() > 1:
                return f"{name} is neither 0 nor 1"
        return ""

    def _shard(self, name: str) -> Any:
        """Return a mapped shard. If too many are open, the one used longest ago is closed."""
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def _check(self, name: str, num: int, number: int) -> None:
        """Raises UserError if a shard is missing or truncated, belongs to another cache, or has the wrong shapes."""
        file = self.folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing; the manifest counts {num} sequences in it")
        try:
            shard = self._shard(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: truncated or not safetensors ({error})") from error
        if (shard.metadata() or {}).get("kd_cache") != self.manifest.key:
            raise UserError(f"{file}: belongs to another cache than {MANIFEST}")
        expected = {key: (DTYPES[dtype], *shape) for key, (dtype, shape) in self.manifest.shapes(num).items()}
        slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118
        held = {key: (part.get_dtype(), *part.get_shape()) for key, part in slices.items()}
        if held != expected:
            raise UserError(f"{file}: holds {held}, the manifest says {expected}")
        if number == 0 and not shard.get_tensor("learned")[:, 1:].any():  # the first of a row is never learned
            raise UserError(f"{file}: no token in it is a label, so there is nothing to learn: write the cache again")


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor as int64 or fp32."""
    # Few of torch's functions take uint16.
    return tensor.float() if tensor.is_floating_point() else tensor.long()


class KDStream(ShuffledStream):
    """Batches from a cache, without end; each epoch is shuffled by (seed, epoch). A saved position is exact."""

    def __init__(
        self,
        cache: KDCache,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        allow_changes: bool = False,
    ) -> None:
        self._key = cache.manifest.key
        self._named = {f"kd_cache.{key}": value for key, value in cache.manifest.identity.items()}
        super().__init__(
            cache.manifest.count("train"),
            partial(cache.batch, "train"),
            identity=self._named,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            allow_changes=allow_changes,
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position, also to one of version 0.1, which knew a cache by its key. Raises UserError."""
        if "kd_cache" in state:
            check_same({"kd_cache": state["kd_cache"]}, {"kd_cache": self._key}, self._allow_changes)
            state = state | self._named
        super().load_state_dict(state)


def sequences(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors that a shard stores for a batch [n, L] of `BatchStream`; `batch_of` is the inverse."""
    return {
        "input_ids": batch["input_ids"],
        "starts": (batch["position_ids"] == 0).to(torch.uint8),
        "learned": (batch["labels"] != IGNORE).to(torch.uint8),
    }


def batch_of(tensors: Mapping[str, Tensor]) -> Batch:
    """Rebuild a batch from the tensors that `sequences` made."""
    return make_batch(torch.stack([tensors[name].long() for name in ("input_ids", "starts", "learned")], dim=1))
