"""The offline KD cache: a teacher's answers to every next token, written once and read by any number of trainings.

    DIR/manifest.json               what is in it, and what it was made of (`Manifest`)
    DIR/train-00000.safetensors     up to `shard_size` sequences each, in the order of the data
    DIR/heldout-00000.safetensors   never trained on

With n sequences of L tokens, K likeliest words, R random ones, a vocabulary of V, and ids of uint16 where V <= 65536,
else int32, a shard holds

    input_ids      [n, L]         ids     the sequences
    starts         [n, L]         uint8   1 at the first token of each document
    learned        [n, L]         uint8   1 where the token is a label: not the first of a text, not a masked prompt
    topk_ids       [n, L-1, K]    ids     the likeliest words after token t, likeliest first: for token t+1
    topk_logits    [n, L-1, K]    fp16    their logits
    rest           [n, L-1]       fp32    log-sum-exp of the logits of all words outside of the support
    random_ids     [n, L-1, R]    ids     other words, one from each R-th of the vocabulary
    random_logits  [n, L-1, R]    fp16    their logits; -1e4 where the word is in the top-k, or there twice

The support of a position is top-k and random words together: distinct words whose logits are known; with `rest` that
gives the log-sum-exp of all V. Not the other way round: of a tail below 1e-6, where a teacher is sure, the difference
of two fp32 numbers keeps nothing, and a temperature of 4 makes 3 % of it. Files are mapped, not read: a training needs
the memory of its batch, whatever the size.
"""

import bisect
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.data.packing import IGNORE, Batch, make_batch

log = logging.getLogger("wrinklefree")

FORMAT, VERSION = "wrinklefree_kd_cache", 2
MANIFEST = "manifest.json"
HEADER_BYTES = 1024  # of a shard, about
SPARE = 1.02  # of the predicted size that must be free
OPEN_SHARDS = 64  # kept mapped at a time

# How safetensors calls the types of a shard.
DTYPES = {torch.uint16: "U16", torch.int32: "I32", torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}

# Tokens of one line that tell tokenizers of one vocabulary apart: case, spaces, digits, accents, emoji.
PROBE = " Wrinkle-free: 1024  tokens\n\tdéjà vu, ΑΩ — 你好 🙂 don't"

Split = Literal["train", "heldout"]
Tail = Literal["exact", "sampled", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache is. `shards` are the sequences in each file so far, `position` where the data goes on."""

    format: str = FORMAT
    version: int = VERSION
    teacher: str
    teacher_fingerprint: str
    precision: str  # that the teacher computed in
    tokenizer: str
    tokenizer_fingerprint: str
    data: dict[str, Any]
    data_fingerprint: str
    vocab_size: int
    length: int  # L
    topk: int  # K
    negatives: int  # R
    tail: Tail  # of words outside of the support: known, estimated from random words (an import), or not known
    seed: int
    shard_size: int
    num_train: int  # sequences asked for; the data may have fewer
    num_heldout: int
    shards: dict[str, list[int]] = field(default_factory=lambda: {"train": [], "heldout": []})
    complete: bool = False
    position: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for shapes that no cache has."""
        if not (0 < self.topk <= self.vocab_size and self.negatives >= 0):
            raise ValueError(f"top {self.topk} and {self.negatives} random ones of {self.vocab_size} words")
        if self.length < 2 or self.shard_size < 1:
            raise ValueError(f"sequences of {self.length} tokens, {self.shard_size} to a shard")
        if self.shards.keys() != {"train", "heldout"} or any(num < 1 for nums in self.shards.values() for num in nums):
            raise ValueError(f"shards {self.shards}")
        if self.complete and not all(self.shards.values()):
            raise ValueError("complete, without a sequence to train on or one held out")

    @property
    def key(self) -> str:
        """Names the cache in its shards and in a training's position: one hash of all settings."""
        return fingerprint(dataclasses.asdict(self.settings))

    @property
    def settings(self) -> "Manifest":
        """Without progress."""
        return dataclasses.replace(self, shards={"train": [], "heldout": []}, complete=False, position=None)

    @property
    def id_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocab_size <= 1 << 16 else torch.int32

    def count(self, split: Split) -> int:
        """Sequences written."""
        return sum(self.shards[split])

    def shapes(self, num: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor of a shard of `num` sequences."""
        tokens, places = (num, self.length), (num, self.length - 1)
        ids = self.id_dtype
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        found = {"input_ids": (ids, tokens), "starts": (torch.uint8, tokens), "learned": (torch.uint8, tokens)}
        found |= {"topk_ids": (ids, (*places, self.topk)), "topk_logits": (torch.float16, (*places, self.topk))}
        if self.tail != "unknown":
            found["rest"] = (torch.float32, places)
        if self.negatives:
            shape = (*places, self.negatives)
            found |= {"random_ids": (ids, shape), "random_logits": (torch.float16, shape)}
        return found

    @property
    def sequence_bytes(self) -> int:
        """What one sequence takes: (i + 2) L + (L - 1) ((i + 2) (K + R) + 4), with i bytes to an id."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.shapes(1).values())

    def predicted_bytes(self, num_train: int, num_heldout: int) -> int:
        """Size of all shards."""
        num_shards = -(-num_train // self.shard_size) + -(-num_heldout // self.shard_size)
        return (num_train + num_heldout) * self.sequence_bytes + num_shards * HEADER_BYTES


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the vocabulary, the end-of-sequence token, and how one line is cut."""
    probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, probe])


def model_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Of the names, shapes and 64 values of each tensor, spread evenly: enough to tell trained models apart."""
    sampled = []
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        sampled.append([name, list(tensor.shape), flat[:: max(1, len(flat) // 64)][:64].float().tolist()])
    return fingerprint(sampled)


# Writing


@contextmanager
def begin(folder: Path, wanted: Manifest, *, force: bool = False) -> Iterator[Manifest]:
    """Hold `folder` for writing, and give where to go on: `wanted`, or the cache of these settings that is there.

    With `force` always `wanted`, in the place of the cache that is there. Raises UserError where the folder holds
    something else, or another process writes there, or the disk is too small: then all is left as it was.
    """
    anew = force and (folder / MANIFEST).exists()
    if anew:
        check_disk(folder, wanted, sum(file.stat().st_size for file in _shards(folder)))
    else:
        check_disk(folder, _found(folder, wanted))
    with _alone(folder):
        if anew:
            write_manifest(folder, wanted)  # first, or a kill would leave one of files that are gone
            for file in _shards(folder):
                file.unlink()
        manifest = _found(folder, wanted)
        yield manifest if manifest.complete else write_manifest(folder, manifest)


def _found(folder: Path, wanted: Manifest) -> Manifest:
    """The cache of these settings that is in `folder`, or else `wanted`."""
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        _check_same(folder, found, wanted)
        return found
    if folder.is_dir() and any(not file.match(".*.tmp") for file in folder.iterdir()):
        raise UserError(f"{folder}: not empty, and no KD cache: choose another folder")
    return wanted


def _shards(folder: Path) -> list[Path]:
    """The files of a cache but for its manifest, also what was never renamed into place."""
    kinds = ("train-*.safetensors", "heldout-*.safetensors", ".*.safetensors.tmp")
    return [file for kind in kinds for file in folder.glob(kind)]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other processes from writing a cache there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}: choose another folder") from error
    try:
        _lock(folder, handle)
        yield
    finally:
        os.close(handle)  # which unlocks, as does the end of the process


def _lock(folder: Path, handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder}: another process is writing it: wait for that one, or choose another") from error
    except OSError:
        log.info("%s: cannot be locked on this file system: let no other process write there", folder)


def _check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    mine, other = dataclasses.asdict(wanted.settings), dataclasses.asdict(found.settings)
    different = [key for key in mine if mine[key] != other[key]]
    if different:
        key = different[0]
        raise UserError(
            f"{folder}: holds a KD cache with {key}={other[key]}, not {mine[key]}: choose another folder, or --force"
        )


def check_disk(folder: Path, manifest: Manifest, freed: int = 0) -> None:
    """Say how large the cache will be. Raises UserError where the disk has no room for what is missing.

    `freed` are bytes that will be free by then. A complete cache needs none: its data may have ended early.
    """
    if manifest.complete:
        return
    whole = manifest.predicted_bytes(manifest.num_train, manifest.num_heldout)
    missing = whole - (manifest.count("train") + manifest.count("heldout")) * manifest.sequence_bytes
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free + freed
    log.info(
        "%d + %d sequences of %d tokens, top %d, %d random: %.4g MB, %.4g MB of them missing; %.4g MB free",
        *(manifest.num_train, manifest.num_heldout, manifest.length, manifest.topk, manifest.negatives),
        *(size / 1e6 for size in (whole, missing, free)),
    )
    if missing * SPARE > free:
        raise UserError(
            f"{folder}: the cache needs {missing / 1e9:.3g} GB more, the disk has {free / 1e9:.3g} GB free: "
            f"fewer sequences, a smaller --topk or --rand-neg, or another disk"
        )


def append(
    folder: Path, manifest: Manifest, new: Mapping[Split, Mapping[str, Tensor]], position: dict[str, Any] | None
) -> Manifest:
    """Write a shard of each split in `new`, then the manifest that counts them, and return that.

    All are renamed into place. A shard that no manifest counts yet is written again by whoever goes on.
    """
    shards = dict(manifest.shards)
    for split, tensors in new.items():
        _write_shard(folder / shard_name(split, len(shards[split])), manifest, tensors)
        shards[split] = [*shards[split], len(tensors["input_ids"])]
    return write_manifest(folder, dataclasses.replace(manifest, shards=shards, position=position))


def _write_shard(target: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    num = len(tensors["input_ids"])
    stored = {name: tensors[name].to(dtype).contiguous() for name, (dtype, _) in manifest.shapes(num).items()}
    _put(target, lambda aside: save_file(stored, aside, metadata={"kd_cache": manifest.key}))


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Say that all is there. Raises UserError for a cache without a sequence to train or to evaluate on."""
    if not (manifest.count("train") and manifest.count("heldout")):
        raise UserError(
            f"{folder}: {manifest.count('train')} sequences to train on, {manifest.count('heldout')} held out"
        )
    return write_manifest(folder, dataclasses.replace(manifest, complete=True, position=None))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    _put(folder / MANIFEST, lambda aside: aside.write_text(text))
    return manifest


def _put(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside `target`, then rename. Raises UserError where that fails, as on a full disk."""
    aside = target.with_name(f".{target.name}.tmp")
    try:
        write(aside)
        _rename(aside, target)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{target}: cannot be written ({error}): what is there is whole, go on later") from error


def _rename(aside: Path, target: Path) -> None:
    with aside.open("rb") as handle:
        os.fsync(handle.fileno())  # a rename must not become durable before the content
    aside.replace(target)


def shard_name(split: Split, number: int) -> str:
    return f"{split}-{number:05}.safetensors"


# Reading


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where there is none, or not one of ours."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{folder}: no {MANIFEST}, so no KD cache; `wf cache` writes one, `wf cache --import` takes .pt"
        )
    try:
        manifest = TypeAdapter(Manifest).validate_json(file.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{file}: not the manifest of a KD cache ({where}: {problem['msg']})") from error
    if manifest.format != FORMAT or manifest.version != VERSION:
        raise UserError(f"{file}: format {manifest.format} {manifest.version}, this version reads {FORMAT} {VERSION}")
    return manifest


class KDCache:
    """A whole cache, open for reading."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for no cache, an unfinished one, and shards that are missing, truncated or of another."""
        self.folder, self.manifest = folder, read_manifest(folder)
        if not self.manifest.complete:
            raise UserError(f"{folder}: the cache is not finished: run the same `wf cache` again, it goes on")
        self._ends = {split: list(accumulate(nums)) for split, nums in self.manifest.shards.items()}
        self._open: OrderedDict[str, Any] = OrderedDict()
        for split in ("train", "heldout"):
            for number, num in enumerate(self.manifest.shards[split]):
                self._check(shard_name(split, number), num)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError where these are not the cache's tokens."""
        if tokenizer_fingerprint(tokenizer) != self.manifest.tokenizer_fingerprint:
            raise UserError(
                f"{self.folder}: written with the tokenizer of {self.manifest.tokenizer}, the student's "
                f"({tokenizer.name_or_path}) is another: a cache is for students with the teacher's tokenizer"
            )

    def batch(self, split: Split, rows: Sequence[int]) -> Batch:
        """Sequences as a model's arguments and labels (`packing.make_batch`), and what the teacher said of them:

        kd_ids int64, kd_logits fp32 [B, L-1, K+R], the support; kd_rest fp32 [B, L-1], where the tail is known.
        """
        found = [self._sequence(split, row) for row in rows]
        tensors = {name: torch.stack([sequence[name] for sequence in found]) for name in found[0]}
        batch = batch_of(tensors)
        kinds = ["topk", "random"] if self.manifest.negatives else ["topk"]
        batch["kd_ids"] = torch.cat([tensors[f"{kind}_ids"] for kind in kinds], dim=-1)
        batch["kd_logits"] = torch.cat([tensors[f"{kind}_logits"] for kind in kinds], dim=-1)
        if "rest" in tensors:
            batch["kd_rest"] = tensors["rest"]
        return batch

    def heldout(self, batch_size: int, max_tokens: int) -> Iterator[Batch]:
        """Held-out batches, of sequences spread evenly over all of them. The same at every call."""
        total = self.manifest.count("heldout")
        kept = min(total, max(1, max_tokens // self.manifest.length))
        rows = [(2 * i + 1) * total // (2 * kept) for i in range(kept)]
        return (self.batch("heldout", rows[i : i + batch_size]) for i in range(0, kept, batch_size))

    def _sequence(self, split: Split, row: int) -> dict[str, Tensor]:
        ends = self._ends[split]
        number = bisect.bisect_right(ends, row)
        shard = self._shard(shard_name(split, number))
        inside = row - (ends[number - 1] if number else 0)
        return {name: _plain(shard.get_slice(name)[inside]) for name in self.manifest.shapes(1)}

    def _shard(self, name: str) -> Any:
        """A mapped shard; the one used longest ago is let go where many are open."""
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def _check(self, name: str, num: int) -> None:
        """Raises UserError where a shard is missing, truncated, of another cache, or of other shapes."""
        file = self.folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing; the manifest counts {num} sequences in it")
        try:
            shard = self._shard(name)
        except SafetensorError as error:
            raise UserError(f"{file}: truncated or not safetensors ({error})") from error
        if (shard.metadata() or {}).get("kd_cache") != self.manifest.key:
            raise UserError(f"{file}: belongs to another cache than {MANIFEST}")
        expected = {key: (DTYPES[dtype], *shape) for key, (dtype, shape) in self.manifest.shapes(num).items()}
        slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118
        found = {key: (part.get_dtype(), *part.get_shape()) for key, part in slices.items()}
        if found != expected:
            raise UserError(f"{file}: holds {found}, the manifest says {expected}")


def _plain(tensor: Tensor) -> Tensor:
    """As int64 or fp32: few of torch's functions take uint16."""
    return tensor.float() if tensor.is_floating_point() else tensor.long()


class KDStream(Iterator[Batch]):
    """Batches of a cache without end, each epoch shuffled by (seed, epoch), from any exact position.

    All processes walk one order, and process `rank` keeps its `batch_size` rows of each global batch, as `BatchStream`.
    """

    def __init__(self, cache: KDCache, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._cache, self._batch_size = cache, batch_size
        self._rank, self._world_size = rank, world_size
        # What a position means something under; a resume under other values is refused.
        self._identity: dict[str, Any] = {"kd_cache": cache.manifest.key, "seed": seed}
        self._epoch = self._place = 0
        self._order: list[int] = []  # of this epoch; empty until it is asked for

    def __next__(self) -> Batch:
        rows = [self._next_row() for _ in range(self._world_size * self._batch_size)]
        first = self._rank * self._batch_size
        return self._cache.batch("train", rows[first : first + self._batch_size])

    def state_dict(self) -> dict[str, Any]:
        """The exact position, in plain values, the same in every process."""
        return {**self._identity, "epoch": self._epoch, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises UserError where it was saved under another cache, seed or kind of data."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise UserError(
                    f"data position was saved with {key}={state.get(key)!r}, this run has {value!r}: "
                    f"resume with the same cache and seed, or start anew from the checkpoint's weights"
                )
        self._epoch, self._place, self._order = state["epoch"], state["place"], []

    def _next_row(self) -> int:
        if self._place == self._cache.manifest.count("train"):
            self._epoch, self._place, self._order = self._epoch + 1, 0, []
        if not self._order:
            self._order = list(range(self._cache.manifest.count("train")))
            random.Random(f"{self._identity['seed']} {self._epoch}").shuffle(self._order)
        self._place += 1
        return self._order[self._place - 1]


def sequences(batch: Batch) -> dict[str, Tensor]:
    """What a shard keeps of a batch of `BatchStream` [n, L] itself: `batch_of` gives the same batch back."""
    return {
        "input_ids": batch["input_ids"],
        "starts": (batch["position_ids"] == 0).to(torch.uint8),
        "learned": (batch["labels"] != IGNORE).to(torch.uint8),
    }


def batch_of(tensors: Mapping[str, Tensor]) -> Batch:
    """The other way round."""
    return make_batch(torch.stack([tensors[name].long() for name in ("input_ids", "starts", "learned")], dim=1))
