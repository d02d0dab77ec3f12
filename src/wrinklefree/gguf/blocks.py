"""Tensor types of GGUF whose blocks are integers times a scale: W = d q, with one fp16 scale d per block of a row.

| type | number | columns | bytes | bits | integers q | bytes of a block |
|---|---|---|---|---|---|---|
| Q1_0 | 41 | 128 | 18 | 1.125 | -1, 1 | d, then bit j % 8 of byte j / 8 is 1 for 1 |
| TQ1_0 | 34 | 256 | 54 | 1.6875 | -1, 0, 1 | five ternary digits a byte (48 bytes), four a byte (4 bytes), d |
| TQ2_0 | 35 | 256 | 66 | 2.0625 | -1 to 2 | byte m of each 32 has columns m, m + 32, m + 64, m + 96 of its 128; d |
| Q2_0 | 42 | 64 | 18 | 2.25 | -1 to 2 | d, then byte j / 4 has q + 1 at bits 2 (j % 4) |
| Q4_0 | 2 | 32 | 18 | 4.5 | -8 to 7 | d, then byte m has q + 8 of column m (low) and m + 16 (high) |
| Q8_0 | 8 | 32 | 34 | 8.5 | -128 to 127 | d, then one byte each |

Layouts are those of ggml (`ggml-common.h`, `ggml-quants.c` of llama.cpp, July 2026). Q1_0 and Q2_0 are that new; other
branches have used number 42 for blocks of 128, which `header.py` notices by the sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """A tensor type: its number in files, columns and bytes of a block, and the integers that a block holds."""

    number: int
    columns: int
    size: int
    least: int = 0
    most: int = 0
    zero: bool = True  # whether 0 is one of the integers

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.size / self.columns


INTEGERS = {
    "Q1_0": Kind(41, 128, 18, -1, 1, zero=False),
    "TQ1_0": Kind(34, 256, 54, -1, 1),
    "TQ2_0": Kind(35, 256, 66, -1, 2),
    "Q2_0": Kind(42, 64, 18, -1, 2),
    "Q4_0": Kind(2, 32, 18, -8, 7),
    "Q8_0": Kind(8, 32, 34, -128, 127),
}
FLOATS = {"F32": Kind(0, 1, 4), "F16": Kind(1, 1, 2), "BF16": Kind(30, 1, 2)}
Q6_K = Kind(14, 256, 210)

_POWERS = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


def pack(name: str, integers: Array, scales: Array) -> Array:
    """Pack int8 integers [n, k] and fp32 scales [n, k / columns] to uint8 [n, bytes].

    Raises ValueError if the type does not hold an integer, or fp16 does not hold a scale.
    """
    kind = INTEGERS[name]
    if integers.min() < kind.least or integers.max() > kind.most or not (kind.zero or integers.all()):
        raise ValueError(f"{name} does not hold these integers")
    halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(scales.dtype), scales):
        raise ValueError("a scale is no fp16 number")
    codes = _PACK[name](integers.reshape(-1, kind.columns))
    d = halves.reshape(-1, 1).view(np.uint8)
    parts = [codes, d] if name.startswith("TQ") else [d, codes]
    return np.concatenate(parts, axis=1).reshape(len(integers), -1)


def unpack(name: str, data: Array) -> tuple[Array, Array]:
    """Undo `pack`: uint8 [n, bytes] -> int8 integers [n, k], fp32 scales [n, k / columns]."""
    kind = INTEGERS[name]
    blocks = data.reshape(-1, kind.size)
    d, codes = (blocks[:, -2:], blocks[:, :-2]) if name.startswith("TQ") else (blocks[:, :2], blocks[:, 2:])
    scales = np.ascontiguousarray(d).view(np.float16).astype(np.float32)
    return _UNPACK[name](codes).reshape(len(data), -1), scales.reshape(len(data), -1)


def decoded(name: str, data: Array) -> Array:
    """The values of a type in INTEGERS: uint8 [n, bytes] -> fp32 [n, k]."""
    integers, scales = unpack(name, data)
    blocks = integers.reshape(*scales.shape, -1)
    return (blocks * scales[..., None]).reshape(len(data), -1)


def _bits(integers: Array) -> Array:
    return np.packbits(integers > 0, axis=1, bitorder="little")


def _of_bits(codes: Array) -> Array:
    return np.unpackbits(codes, axis=1, bitorder="little").astype(np.int8) * 2 - 1


def _pairs(integers: Array) -> Array:
    return _joined((integers + 1).astype(np.uint8).reshape(len(integers), -1, 4), 2)


def _of_pairs(codes: Array) -> Array:
    return _parted(codes, 2).reshape(len(codes), -1) - np.int8(1)


def _planes(integers: Array) -> Array:
    lanes = (integers + 1).astype(np.uint8).reshape(len(integers), 2, 4, 32).swapaxes(2, 3)
    return _joined(lanes, 2).reshape(len(integers), -1)


def _of_planes(codes: Array) -> Array:
    lanes = _parted(codes.reshape(-1, 2, 32), 2).swapaxes(2, 3)
    return lanes.reshape(len(codes), -1) - np.int8(1)


def _nibbles(integers: Array) -> Array:
    return _joined((integers + 8).astype(np.uint8).reshape(len(integers), 2, 16).swapaxes(1, 2), 4)


def _of_nibbles(codes: Array) -> Array:
    return _parted(codes, 4).swapaxes(1, 2).reshape(len(codes), -1) - np.int8(8)


def _joined(lanes: Array, bits: int) -> Array:
    """Put codes uint8 [..., number] into one byte, the first in the lowest bits."""
    return np.bitwise_or.reduce(lanes << (np.arange(lanes.shape[-1], dtype=np.uint8) * np.uint8(bits)), axis=-1)


def _parted(codes: Array, bits: int) -> Array:
    """Undo `_joined`: uint8 [...] -> int8 [..., 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((codes[..., None] >> shifts) & np.uint8(2**bits - 1)).astype(np.int8)


# Where ternary digits lie in a block of TQ1_0: columns, digits a byte.
_DIGITS = ((160, 5), (80, 5), (16, 4))


def _trits(integers: Array) -> Array:
    """Store digits as a fraction of 256 of 3^5, rounded up: multiplying by 3 moves them into the high byte."""
    parts, start = [], 0
    for columns, digits in _DIGITS:
        lanes = (integers[:, start : start + columns] + 1).astype(np.uint16).reshape(len(integers), digits, -1)
        number: Array = np.zeros((len(integers), lanes.shape[2]), dtype=np.uint16)
        for digit in range(5):
            number = number * 3 + (lanes[:, digit] if digit < digits else 0)
        parts.append(((number * 256 + 242) // 243).astype(np.uint8))
        start += columns
    return np.concatenate(parts, axis=1)


def _of_trits(codes: Array) -> Array:
    parts, start = [], 0
    for columns, digits in _DIGITS:
        stored = codes[:, start : start + columns // digits]
        shifted = stored[:, None, :] * _POWERS[:digits, None]  # wraps, which drops the digits before
        parts.append((shifted.astype(np.uint16) * 3 >> 8).astype(np.int8).reshape(len(codes), -1))
        start += columns // digits
    return np.concatenate(parts, axis=1) - np.int8(1)


def _bytes(integers: Array) -> Array:
    return integers.view(np.uint8)


def _of_bytes(codes: Array) -> Array:
    return np.ascontiguousarray(codes).view(np.int8)


_PACK: dict[str, Callable[[Array], Array]] = {
    "Q1_0": _bits, "TQ1_0": _trits, "TQ2_0": _planes, "Q2_0": _pairs, "Q4_0": _nibbles, "Q8_0": _bytes,
}  # fmt: skip
_UNPACK: dict[str, Callable[[Array], Array]] = {
    "Q1_0": _of_bits, "TQ1_0": _of_trits, "TQ2_0": _of_planes, "Q2_0": _of_pairs, "Q4_0": _of_nibbles,
    "Q8_0": _of_bytes,
}  # fmt: skip


def rounded_q8_0(values: Array) -> Array:
    """Round fp32 [n, k] to Q8_0: d = max|w| / 127 in fp16, then the nearest integers. Returns uint8 [n, bytes]."""
    blocks = values.reshape(len(values), -1, INTEGERS["Q8_0"].columns)
    scales = (np.abs(blocks).max(-1) / 127).astype(np.float16).astype(np.float32)
    steps = blocks / np.where(scales == 0, 1, scales)[..., None]
    return pack("Q8_0", np.clip(np.rint(steps), -127, 127).astype(np.int8).reshape(values.shape), scales)


def rounded_q6_k(values: Array) -> Array:
    """Round fp32 [n, k] to Q6_K: 16 columns share an int8 scale, 256 an fp16 scale of scales. Returns uint8 [n, bytes].

    A block is low nibbles [2, 64] of its integers q + 32, pairs of high bits [2, 32], 16 scales, d. In each half of
    128 columns, nibble l has columns l (low) and l + 64 (high), and pair l has columns l, l + 32, l + 64, l + 96.
    """
    parts = values.reshape(-1, 16, 16)
    widest = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0]
    ideal = widest / -32  # the entry of largest magnitude becomes -32, which has no positive partner
    d = (np.abs(ideal).max(-1, keepdims=True) / 127).astype(np.float16)
    wide = d.astype(np.float32)
    scales = np.clip(np.rint(ideal / np.where(wide == 0, 1, wide)), -127, 127)
    steps = wide * scales
    integers = np.clip(np.rint(parts / np.where(steps == 0, 1, steps)[..., None]), -32, 31)
    codes = (integers + 32).astype(np.uint8).reshape(-1, 2, 128)
    low = _joined(codes.reshape(-1, 2, 2, 64).swapaxes(2, 3) & 15, 4).reshape(len(d), -1)
    high = _joined(codes.reshape(-1, 2, 4, 32).swapaxes(2, 3) >> 4, 2).reshape(len(d), -1)
    return np.concatenate([low, high, scales.astype(np.int8).view(np.uint8), d.view(np.uint8)], axis=1).reshape(
        len(values), -1
    )
