"""`Codes`: a quantized weight, as training, packed inference and every exporter exchange it.

A quantizer is a pair of functions: `encode` turns a weight into `Codes`, `decode` turns `Codes` back into a weight.
Training multiplies with `decode(encode(W))`, and packing stores the same `Codes`, so the file is what was trained.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized weight: integer codes, the scales and tables that turn them into numbers, and its shape."""

    index: Tensor  # uint8, any shape, every entry < 2**bits
    bits: int  # width of one entry of `index`: 1, 2, 3, 4 or 8
    tensors: dict[str, Tensor]  # scales and tables, named by the method; every value is exactly an fp16 number
    shape: tuple[int, int]  # [out_features, in_features] of the weight that `decode` returns

    def num_bits(self) -> int:
        """The size in a file, in bits: packed codes, and 16 bits per scale or table entry."""
        rows = self.index.numel() // self.index.shape[-1]
        return 8 * rows * packed_length(self.index.shape[-1], self.bits) + 16 * sum(
            t.numel() for t in self.tensors.values()
        )


def packed_length(length: int, bits: int) -> int:
    """How many bytes `length` codes of `bits` bits take."""
    return -(-length * bits // 8)


def pack(index: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] along the last dimension, low bits first, to uint8 [..., ceil(n * bits / 8)].

    The last byte is filled with zero codes. `unpack(packed, bits, n)` is the inverse.
    """
    if bits == 3:  # codes cross bytes: write the row as single bits, code j at bits 3 j to 3 j + 2, and pack those
        return pack(unpack(index.unsqueeze(-1), 1, 8)[..., :3].flatten(-2), 1)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(index, (0, -index.shape[-1] % per_byte))
    lanes = padded.unflatten(-1, (-1, per_byte))
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo `pack`: uint8 [..., bytes] -> uint8 [..., length]."""
    if bits == 3:
        return pack(unpack(packed, 1, 3 * length).unflatten(-1, (-1, 3)), 1).squeeze(-1)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    lanes = (packed.unsqueeze(-1) >> shift) & (2**bits - 1)
    return lanes.flatten(-2)[..., :length]


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Compute table[index] for a uint8 index of any shape. Differentiable in the table."""
    return table.index_select(0, index.flatten().int()).view(index.shape)
