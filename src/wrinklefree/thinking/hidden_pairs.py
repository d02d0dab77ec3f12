"""Hidden pairs on disk: the compressed states of a prompt, and those of the thought that a model wrote after it.

    manifest.json                        what made the pairs, and how many there are
    thoughts-RANK.jsonl                  every thought as text and tokens, also those that are not kept
    SPLIT-NNNNN.safetensors              the pairs that are kept, in the order of the problems

A shard has these tensors, all pairs end to end, and in `counts` [n, 4] the lengths L, T, A and S of each pair:

    prompt_ids     int32  [sum L]        the question, up to and with <think>
    thought_ids    int32  [sum T]        the tokens between the tags
    answer_ids     int32  [sum A]        the tokens after </think>, with the end-of-sequence token
    prompt_states  fp16   [sum L, D']    compressed last hidden states of the prompt
    thoughts       fp16   [sum S, D']    compressed states at the end of each segment; the last one begins the answer
    tokens         int32  [sum S]        the token that each of these states predicts

Every file is written aside and renamed. The manifest is the last one: a folder without it has no pairs.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wrinklefree.config.base import first_problem
from wrinklefree.core.batch import IGNORE, Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside, read_json, write_json
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.core.numbers import check_tensor
from wrinklefree.data.sources import Split

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS: tuple[Split, ...] = ("train", "heldout")
STATES = ("prompt_states", "thoughts")  # compressed states; the others are ids
# For each tensor of a shard the column of `counts` that has its lengths.
RAGGED = {"prompt_ids": 0, "thought_ids": 1, "answer_ids": 2, "prompt_states": 0, "thoughts": 3, "tokens": 3}


class Pair(NamedTuple):
    """One prompt and its thought: ids [L], [T], [A], states [L, D'], thoughts [S, D'], tokens [S]."""

    prompt_ids: Tensor
    thought_ids: Tensor
    answer_ids: Tensor
    prompt_states: Tensor
    thoughts: Tensor
    tokens: Tensor


@dataclass(kw_only=True)
class Manifest:
    """What made the pairs; how many there are (`counts`), and how many thoughts were dropped for which reason."""

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
        """A fingerprint of all that the pairs depend on: not the model's name, and not how many there are."""
        made = dataclasses.asdict(self)
        return fingerprint({name: made[name] for name in made if name not in ("counts", "dropped", "model")})

    def save(self, folder: Path) -> None:
        """Write the manifest, whole or not at all."""
        write_json(folder / MANIFEST, dataclasses.asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises UserError if it has no pairs, or if this version cannot read them."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder}: no hidden pairs ({MANIFEST} is missing): run `wf trm pairs` first, or to its end")
    values = read_json(file)
    if isinstance(values, dict) and values.get("format") != FORMAT:
        raise UserError(f"{file}: format {values.get('format')!r}, this version reads {FORMAT}: make the pairs anew")
    try:
        return TypeAdapter(Manifest).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{file}: not a manifest of hidden pairs ({first_problem(error)})") from error


def shard_path(folder: Path, split: Split, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def write_shard(path: Path, pairs: Sequence[Pair], key: str) -> None:
    """Write a shard, whole or not at all. Raises UserError for a state that is beyond the range of fp16."""
    tensors = {name: torch.cat([pair._asdict()[name] for pair in pairs]) for name in RAGGED}
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.is_floating_point() else tensor.int()
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: a compressed state is too large for fp16; choose a larger thinking.d_compressed")
    lengths = [[len(pair.prompt_ids), len(pair.thought_ids), len(pair.answer_ids), len(pair.tokens)] for pair in pairs]
    tensors["counts"] = torch.tensor(lengths, dtype=torch.int32)
    with file_aside(path) as aside:
        save_file(tensors, aside, metadata={"key": key})


def read_shard(path: Path, key: str, width: int | None = None) -> list[Pair]:
    """The pairs of a shard, whose states have `width` entries; None means any width.

    Raises UserError if the file is missing or broken, or belongs to pairs of another key.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                raise UserError(f"{path}: belongs to other pairs than its manifest; make them anew with --force")
            tensors = {name: file.get_tensor(name) for name in (*RAGGED, "counts")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing or broken ({error}); make the pairs anew with --force") from error
    check_tensor(str(path), "counts", tensors["counts"], torch.int32, (None, 4))
    for name in RAGGED:
        ids = name not in STATES
        dtype, shape = (torch.int32, [None]) if ids else (torch.float16, [None, width])
        check_tensor(str(path), name, tensors[name], dtype, shape)
        if ids and tensors[name].lt(0).any():
            raise UserError(f"{path}: {name} has negative ids; make the pairs anew with --force")
    lengths = tensors["counts"].long()
    if lengths.lt(0).any() or any(len(tensors[name]) != lengths[:, column].sum() for name, column in RAGGED.items()):
        raise UserError(f"{path}: its tensors are not as long as its counts say; make the pairs anew with --force")
    parts = {name: tensors[name].split(lengths[:, column].tolist()) for name, column in RAGGED.items()}
    return [Pair(*(parts[name][i] for name in Pair._fields)) for i in range(len(lengths))]


def is_whole(path: Path, key: str) -> bool:
    """Whether the shard is there and belongs to the pairs of this key."""
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
        """Raises UserError if pairs are missing or broken, or if the split is empty."""
        self.manifest = read_manifest(folder)
        self.pairs: list[Pair] = []
        shards = sorted(folder.glob(f"{split}-*.safetensors"))
        for path in shards:
            self.pairs += read_shard(path, self.manifest.key, self.manifest.d_compressed)
        if len(self.pairs) != self.manifest.counts.get(split):
            raise UserError(
                f"{folder}: {len(self.pairs)} of {self.manifest.counts.get(split)} {split} pairs are there; "
                f"make them anew with --force"
            )
        if not self.pairs:
            raise UserError(f"{folder}: the {split} split is empty: give more problems, or see what was dropped")

    def __len__(self) -> int:
        return len(self.pairs)

    def check_ids(self, folder: Path, vocabulary: int) -> None:
        """Raises UserError if a pair has an id beyond the language model's vocabulary."""
        ids = (
            part for pair in self.pairs for part in (pair.prompt_ids, pair.thought_ids, pair.answer_ids, pair.tokens)
        )
        largest = max((int(part.max()) for part in ids if len(part)), default=0)
        if largest >= vocabulary:
            raise UserError(f"{folder}: its pairs have ids up to {largest}, the model has {vocabulary} words")

    def batch(self, rows: Sequence[int]) -> Batch:
        """The pairs `rows`, padded on the right: ids with 0, states with zeros, tokens with -100.

        `labels` [B, S + 1] are `tokens` after a column of -100: the loop weighs a batch by the labels after the first.
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

    def batches(self, batch_size: int, count: int | None = None, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """The first `count` pairs, in order, on `device`."""
        rows = range(min(count or len(self), len(self)))
        for start in range(0, len(rows), batch_size):
            batch = self.batch(rows[start : start + batch_size])
            yield {name: tensor.to(device) for name, tensor in batch.items()}


def rows_of(padded: Tensor, lengths: Tensor) -> list[Tensor]:
    """The rows [length, ...] of a tensor [B, longest, ...] that is padded on the right."""
    return [row[: int(n)] for row, n in zip(padded, lengths, strict=True)]


def prompts_of(batch: Batch) -> list[Tensor]:
    """The ids [L] of every prompt of a batch of pairs."""
    return rows_of(batch["input_ids"], batch["prompt_length"])


def answers_of(batch: Batch) -> list[Tensor]:
    """The ids [A] of every answer of a batch of pairs."""
    return rows_of(batch["answer_ids"], batch["answer_length"])
