"""The manifest of a KD cache: its settings, its shards, and the key that each shard carries."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from wrinklefree.config.base import first_problem
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.data.sources import Split

FORMAT, VERSION = "wrinklefree_kd_cache", 2

MANIFEST = "manifest.json"

IDENTITY = "identity"  # the key in `Manifest.data` of what the data is by content; version 0.1 did not write it

HEADER_BYTES = 1024  # about the size of a shard's header

SPARE = 1.02  # the free space required, relative to the predicted size

# safetensors' names for the types in a shard.
DTYPES = {torch.uint16: "U16", torch.int32: "I32", torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}


Tail = Literal["exact", "sampled", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A cache's settings and progress, as `manifest.json` holds them."""

    format: str = FORMAT
    version: int = VERSION
    teacher: str
    teacher_fingerprint: str
    precision: str  # the teacher's, when it wrote the answers
    tokenizer: str
    tokenizer_fingerprint: str
    data: dict[str, Any]
    data_fingerprint: str
    vocab_size: int
    length: int  # L
    topk: int  # K
    negatives: int  # R
    tail: Tail  # the other words' log-sum-exp: exact, estimated from random words (an import), or unknown
    seed: int
    shard_size: int
    num_train: int  # sequences asked for; the data may have fewer
    num_heldout: int
    shards: dict[str, list[int]] = field(default_factory=lambda: {"train": [], "heldout": []})  # sequences per file
    complete: bool = False
    position: dict[str, Any] | None = None  # where the data continues

    def __post_init__(self) -> None:
        """Raises ValueError if a size is impossible, or if a complete cache has no sequence in one of its splits."""
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
        """A hash of all settings. Each shard carries it, and so does the data position of a training on this cache."""
        return fingerprint(dataclasses.asdict(self.settings))

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers are, for a position to be compared with: fingerprints instead of names, if there are any."""
        named = {"teacher": self.teacher_fingerprint or self.teacher, "tokenizer": self.tokenizer_fingerprint}
        sizes = ("precision", "vocab_size", "length", "topk", "negatives", "tail")
        counts = {"data": self.data_fingerprint, "sequences": self.count("train")}
        return named | {key: vars(self)[key] for key in sizes} | counts

    @property
    def settings(self) -> "Manifest":
        """This manifest without progress: no shards, not complete, no position."""
        return dataclasses.replace(self, shards={"train": [], "heldout": []}, complete=False, position=None)

    @property
    def id_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocab_size <= 1 << 16 else torch.int32

    def count(self, split: Split) -> int:
        """Return the number of sequences written so far."""
        return sum(self.shards[split])

    def shapes(self, num: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the type and shape of every tensor in a shard of `num` sequences."""
        tokens, places = (num, self.length), (num, self.length - 1)
        ids = self.id_dtype
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        shapes = {"input_ids": (ids, tokens), "starts": (torch.uint8, tokens), "learned": (torch.uint8, tokens)}
        shapes |= {"topk_ids": (ids, (*places, self.topk)), "topk_logits": (torch.float16, (*places, self.topk))}
        if self.tail != "unknown":
            shapes["rest"] = (torch.float32, places)
        if self.negatives:
            shape = (*places, self.negatives)
            shapes |= {"random_ids": (ids, shape), "random_logits": (torch.float16, shape)}
        return shapes

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence: (i + 2) L + (L - 1) ((i + 2) (K + R) + 4), with i bytes per id."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.shapes(1).values())

    def predicted_bytes(self, num_train: int, num_heldout: int) -> int:
        """Return the predicted size of all shards together."""
        num_shards = -(-num_train // self.shard_size) + -(-num_heldout // self.shard_size)
        return (num_train + num_heldout) * self.sequence_bytes + num_shards * HEADER_BYTES


def shards_in(folder: Path) -> list[Path]:
    """Return all files of a cache except its manifest, including temporary ones that a broken run left."""
    kinds = ("train-*.safetensors", "heldout-*.safetensors", ".*.safetensors.tmp")
    return [file for kind in kinds for file in folder.glob(kind)]


def shard_name(split: Split, number: int) -> str:
    return f"{split}-{number:05}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """Read a cache's manifest. Raises UserError if there is none, or if this version cannot read it."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{folder}: no {MANIFEST}, so no KD cache; `wf cache` writes one, `wf cache --import` takes .pt"
        )
    values = read_json(file)
    try:
        manifest = TypeAdapter(Manifest).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{file}: not the manifest of a KD cache ({first_problem(error)})") from error
    if manifest.format != FORMAT or manifest.version != VERSION:
        raise UserError(f"{file}: format {manifest.format} {manifest.version}, this version reads {FORMAT} {VERSION}")
    return manifest
