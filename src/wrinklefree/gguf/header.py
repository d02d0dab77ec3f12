"""Reads the header of a GGUF file: its metadata, and where each tensor lies. No weight is read.

Counts and lengths come from the file, so each is compared with what is left of the file before memory is taken.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wrinklefree.core.errors import UserError
from wrinklefree.gguf.blocks import FLOATS, INTEGERS, Array, Kind

MAGIC, VERSIONS = b"GGUF", (2, 3)

LARGEST_HEADER = 1 << 28  # bytes; tokens and merges of the largest vocabularies take 10 million
MOST_ENTRIES = 1 << 16  # of metadata and of tensors; the largest models have a few thousand tensors
MOST_ITEMS = 1 << 22  # of an array
MOST_NAME, MOST_AXES, MOST_SIZE = 256, 4, 2**31
DEEPEST = 2  # arrays inside of one another

STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
SMALLEST = {number: struct.calcsize(code) for number, code in SCALARS.items()} | {STRING: 8, ARRAY: 12}

# Types without integers times a scale: number -> (name, columns, bytes) of a block.
OTHERS = {
    3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
KINDS = {kind.number: (name, kind) for name, kind in (INTEGERS | FLOATS).items()}
KINDS |= {number: (name, Kind(number, columns, size)) for number, (name, columns, size) in OTHERS.items()}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: its type, its shape with the rows first, and its place in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def data(self, name: str) -> Array:
        """The bytes of a tensor, mapped from the file: uint8 [rows, bytes of a row]."""
        tensor = self.tensors[name]
        mapped = np.memmap(self.file, mode="r", offset=tensor.offset, shape=(tensor.nbytes,))
        return mapped.reshape(math.prod(tensor.shape[:-1]), -1)


def read_header(file: Path) -> Header:
    """Read a file's header. Raises UserError if it is no GGUF file, damaged, cut off, or has a type nobody knows."""
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(file, data).header()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except ValueError as error:  # mmap refuses an empty file
        raise UserError(f"{file}: empty, so no GGUF file") from error


class _Reader:
    """A place in a mapped file, which moves on with everything that is read."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.at = file, data, 0
        self.end = min(len(data), LARGEST_HEADER)

    def refused(self, why: str) -> UserError:
        return UserError(f"{self.file}: not a whole GGUF file: {why}: copy or download it again")

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            raise UserError(f"{self.file}: no GGUF file: it begins with {self.data[:4]!r}")
        version = self.number("<I")
        if version not in VERSIONS:
            raise UserError(f"{self.file}: GGUF version {version}; versions 2 and 3 are read, with the low byte first")
        num_tensors, num_values = self.count("<Q", 24), self.count("<Q", 12)
        if max(num_tensors, num_values) > MOST_ENTRIES:
            raise self.refused(f"{num_tensors:,} tensors and {num_values:,} settings")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            name = self.string(MOST_NAME)
            metadata[name] = self.value(self.number("<I"), 0)
        places = [self.place() for _ in range(num_tensors)]
        return Header(self.file, metadata, self.tensors(places, metadata.get("general.alignment", 32)))

    def take(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise self.refused(f"{size:,} bytes are due at {self.at:,} of {len(self.data):,}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, code: str, smallest: int) -> int:
        """Read a count of things that take at least `smallest` bytes each."""
        number = int(self.number(code))
        if number * smallest > self.end - self.at:
            raise self.refused(f"{number:,} entries are due at {self.at:,} of {len(self.data):,} bytes")
        return number

    def string(self, longest: int = LARGEST_HEADER) -> str:
        length = self.count("<Q", 1)
        if length > longest:
            raise self.refused(f"a name of {length:,} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refused(f"a text at {self.at:,} is not UTF-8") from error

    def value(self, kind: int, depth: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY or depth == DEEPEST:
            raise self.refused(f"a setting of type {kind} at {self.at:,}")
        inner = self.number("<I")
        if inner not in SMALLEST:
            raise self.refused(f"an array of type {inner} at {self.at:,}")
        count = self.count("<Q", SMALLEST[inner])
        if count > MOST_ITEMS:
            raise self.refused(f"an array of {count:,}")
        if inner in SCALARS:
            return np.frombuffer(self.take(count * SMALLEST[inner]), dtype=np.dtype(SCALARS[inner])).tolist()
        return [self.value(inner, depth + 1) for _ in range(count)]

    def place(self) -> tuple[str, int, list[int], int]:
        """Read name, type, sizes with the rows first, and place of a tensor."""
        name = self.string(MOST_NAME)
        axes = self.number("<I")
        if not 1 <= axes <= MOST_AXES:
            raise self.refused(f"{name[:99]!r} has {axes} axes")
        shape = [self.number("<Q") for _ in range(axes)][::-1]
        if not all(1 <= size < MOST_SIZE for size in shape):
            raise self.refused(f"{name[:99]!r} has the shape {shape}")
        return name, self.number("<I"), shape, self.number("<Q")

    def tensors(self, places: list[tuple[str, int, list[int], int]], alignment: Any) -> dict[str, Tensor]:
        """Check that types are known, and that each tensor has its own bytes of the file."""
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.refused(f"general.alignment={str(alignment)[:99]}")
        start = -(-self.at // alignment) * alignment
        places.sort(key=lambda place: place[3])
        ends = [*(offset for *_, offset in places[1:]), len(self.data) - start]
        found: dict[str, Tensor] = {}
        for (name, number, shape, offset), end in zip(places, ends, strict=False):
            if number not in KINDS:
                raise UserError(f"{self.file}: {name} has type {number}, which is not known here")
            kind_name, kind = KINDS[number]
            if shape[-1] % kind.columns or name in found:
                raise self.refused(f"{name} is {kind_name} {shape}")
            nbytes = math.prod(shape) // kind.columns * kind.size
            padding = end - offset - nbytes
            # Behind the last tensor there may be anything.
            if offset % alignment or padding < 0 or (padding >= alignment and end != ends[-1]):
                raise UserError(
                    f"{self.file}: {name}, {kind_name} in blocks of {kind.columns}, takes {nbytes:,} bytes, and has "
                    f"{end - offset:,}: cut off, or written by a llama.cpp with other blocks under this number"
                )
            found[name] = Tensor(kind_name, tuple(shape), start + offset, nbytes)
        return found
