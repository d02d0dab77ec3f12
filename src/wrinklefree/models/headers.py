"""Reads the headers of a folder's safetensors files: names, types and shapes, without a single weight."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import inner_path, read_json

LARGEST_HEADER = 100_000_000  # bytes of a safetensors header; the library has the same limit

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})  # safetensors' names


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a safetensors file describes it."""

    dtype: str
    shape: list[int]


Header = dict[str, Stored]


def weight_files(folder: Path) -> list[Path]:
    """Return all safetensors files of the folder's model. Raises UserError if one is missing.

    The list is empty if the weights are in pytorch_model*.bin, which cannot be checked without loading.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        files = _indexed(index)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(files)} files): copy it again")
        return files
    if any(folder.glob("pytorch_model*.bin")):
        return []
    raise UserError(f"{folder}: no model.safetensors, so there are no weights; copy the folder again or train it first")


def _indexed(index: Path) -> list[Path]:
    """The files that an index names. Raises UserError if it is no index, or names files outside of its folder."""
    values = read_json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: no weight_map, so no index of weights: copy it again")
    return sorted({inner_path(index.parent, name, str(index)) for name in names.values()})


def read_header(file: Path) -> Header:
    """Read a file's header. Raises UserError if it is damaged, or if the file is not as long as its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            header = handle.read(length) if 8 + length <= size and length <= LARGEST_HEADER else b""
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    damaged = f"{file}: truncated, or not a safetensors file ({size:,} bytes): copy it again"
    try:
        entries = json.loads(header)
        tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        found = {name: _stored(entry) for name, entry in tensors.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(damaged) from error
    if size != whole:
        raise UserError(f"{file}: truncated, {size:,} of {whole:,} bytes: copy it again")
    try:
        with safe_open(file, framework="pt"):
            return found
    except SafetensorError as error:  # it checks that each tensor has its own bytes, as many as dtype and shape need
        raise UserError(f"{damaged} ({error})") from error


def _stored(entry: dict[str, Any]) -> Stored:
    """Raises ValueError for an entry without a dtype and a shape."""
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("no dtype and shape")
    return Stored(dtype, list(shape))
