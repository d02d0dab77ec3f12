"""Hidden pairs on disk: what a model's compressed states were ahead of a thought, and what they became in it.

    manifest.json                        what made them, and how many there are
    thoughts-RANK.jsonl                  every thought as text and tokens, kept or not; `text` is the whole of it
    SPLIT-NNNNN.safetensors              the kept ones, in the order of the problems

A shard has, end to end for all of its pairs, with their lengths in `counts` [n, 5]:

    prompt_ids     int32  [sum L]        the question, up to and with <think>
    thought_ids    int32  [sum T]        what stands between the tags
    answer_ids     int32  [sum A]        what follows </think>, with the end-of-sequence token
    prompt_states  fp16   [sum L, D']    compressed last hidden states
    thoughts       fp16   [sum S, D']    those at the end of each segment of the thought, the last one where the answer
    tokens         int32  [sum S]        begins; and the token that each of them led to

Files are written aside and renamed, the manifest last: without it there are no pairs.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.manifest import fingerprint
from wrinklefree.data.packing import IGNORE, Batch
from wrinklefree.data.stdlib import Split

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS: tuple[Split, ...] = ("train", "heldout")
# Of a shard's tensors, the column of `counts` with their lengths.
RAGGED = {"prompt_ids": 0, "thought_ids": 1, "answer_ids": 2, "prompt_states": 0, "thoughts": 3, "tokens": 3}


class Pair(NamedTuple):
    """One thought: ids [L], [T], [A], states [L, D'], thoughts [S, D'], tokens [S]."""

    prompt_ids: Tensor
    thought_ids: Tensor
    answer_ids: Tensor
    prompt_states: Tensor
    thoughts: Tensor
    tokens: Tensor


@dataclass(kw_only=True)
class Manifest:
    """What made the pairs. `counts` and `dropped` say how many there are and why others are not."""

    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    compressor_fingerprint: str
    settings: dict[str, Any]
    width: int
    d_compressed: int
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @property
    def key(self) -> str:
        """The same for pairs that were made alike."""
        made = dataclasses.asdict(self)
        return fingerprint({name: made[name] for name in made if name not in ("counts", "dropped", "model")})

    def save(self, folder: Path) -> None:
        aside = folder / f".{MANIFEST}.tmp"
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        os.replace(aside, folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where there are no pairs, or none that this version reads."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder}: no hidden pairs ({MANIFEST} is missing): run `wf trm pairs` first, or to its end")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise UserError(f"{file}: format {values.get('format')}, this version reads {FORMAT}: make the pairs anew")
        return Manifest(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a manifest of hidden pairs ({error})") from error


def shard_path(folder: Path, split: Split, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def write_shard(path: Path, pairs: Sequence[Pair], key: str) -> None:
    """Write aside, then rename. Raises UserError for a state that fp16 does not hold."""
    tensors = {name: torch.cat([pair._asdict()[name] for pair in pairs]) for name in RAGGED}
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.is_floating_point() else tensor.int()
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: a compressed state beyond what fp16 holds; choose a larger thinking.d_compressed")
    lengths = [[len(pair.prompt_ids), len(pair.thought_ids), len(pair.answer_ids), len(pair.tokens)] for pair in pairs]
    tensors["counts"] = torch.tensor(lengths, dtype=torch.int32)
    aside = path.with_name(f".{path.name}.tmp")
    save_file(tensors, aside, metadata={"key": key})
    os.replace(aside, path)


def read_shard(path: Path, key: str) -> list[Pair]:
    """Raises UserError where the file is missing, broken, or was made otherwise than `key` says."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                raise UserError(f"{path}: belongs to other pairs than its manifest; make them anew with --force")
            tensors = {name: file.get_tensor(name) for name in (*RAGGED, "counts")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing or broken ({error}); make the pairs anew with --force") from error
    lengths = tensors["counts"].long()
    if any(len(tensors[name]) != lengths[:, column].sum() for name, column in RAGGED.items()):
        raise UserError(f"{path}: its tensors are not as long as its counts say; make the pairs anew with --force")
    parts = {name: tensors[name].split(lengths[:, column].tolist()) for name, column in RAGGED.items()}
    return [Pair(*(parts[name][i] for name in Pair._fields)) for i in range(len(lengths))]


def is_whole(path: Path, key: str) -> bool:
    """Whether this shard was written for these pairs."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("key") == key
    except SafetensorError:
        return False


class HiddenPairs:
    """The pairs of one split."""

    def __init__(self, folder: Path, split: Split) -> None:
        """Raises UserError where they are missing or broken, or the split is empty."""
        self.manifest = read_manifest(folder)
        self.pairs: list[Pair] = []
        shards = sorted(folder.glob(f"{split}-*.safetensors"))
        for path in shards:
            self.pairs += read_shard(path, self.manifest.key)
        if len(self.pairs) != self.manifest.counts.get(split):
            raise UserError(
                f"{folder}: {len(self.pairs)} of {self.manifest.counts.get(split)} {split} pairs are there; "
                f"make them anew with --force"
            )
        if not self.pairs:
            raise UserError(f"{folder}: the {split} split is empty: give more problems, or see what was dropped")

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Pairs `rows`, padded on the right; ids with 0, states with zeros, tokens with -100.

        `labels` [B, S + 1] are the tokens of the thoughts after a column that nobody learns: how much a sample counts.
        """
        chosen = [self.pairs[row] for row in rows]
        batch = {name: pad_sequence([p._asdict()[name] for p in chosen], batch_first=True) for name in Pair._fields}
        counts = {name: torch.tensor([len(pair._asdict()[name]) for pair in chosen]) for name in Pair._fields}
        tokens = pad_sequence([pair.tokens.long() for pair in chosen], batch_first=True, padding_value=IGNORE)
        return {
            "input_ids": batch["prompt_ids"].long(),
            "prompt_length": counts["prompt_ids"],
            "prompt_states": batch["prompt_states"].float(),
            "thoughts": batch["thoughts"].float(),
            "num_thoughts": counts["thoughts"],
            "tokens": tokens,
            "labels": torch.cat([torch.full((len(rows), 1), IGNORE), tokens], dim=1),
            "thought_ids": batch["thought_ids"].long(),
            "thought_length": counts["thought_ids"],
            "answer_ids": batch["answer_ids"].long(),
            "answer_length": counts["answer_ids"],
        }

    def batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """The first `count` pairs, in order."""
        rows = range(min(count or len(self), len(self)))
        for start in range(0, len(rows), batch_size):
            yield self.batch(rows[start : start + batch_size])
