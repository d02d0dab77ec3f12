"""The manifest of a KD cache: what its shards are made of, and the key that they carry."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.data.sources import Split

FORMAT, VERSION = "wrinklefree_kd_cache", 2

MANIFEST = "manifest.json"

HEADER_BYTES = 1024  # of a shard, about

SPARE = 1.02  # of the predicted size that must be free

# How safetensors calls the types of a shard.
DTYPES = {torch.uint16: "U16", torch.int32: "I32", torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}

# Tokens of one line that tell tokenizers of one vocabulary apart: case, spaces, digits, accents, emoji.


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


def shards_in(folder: Path) -> list[Path]:
    """The files of a cache but for its manifest, also what was never renamed into place."""
    kinds = ("train-*.safetensors", "heldout-*.safetensors", ".*.safetensors.tmp")
    return [file for kind in kinds for file in folder.glob(kind)]


def shard_name(split: Split, number: int) -> str:
    return f"{split}-{number:05}.safetensors"


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
