"""The one currency between training, packed inference and every exporter.

A quantizer is a pair: `encode` turns a weight into `Codes`, `decode` turns `Codes` back into a weight. Training sees
`decode(encode(W))`, packing stores exactly the same `Codes`, so what was trained is what ships.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """Integer codes, the real tensors that give them meaning, and the weight's shape."""

    index: Tensor  # uint8, any shape, every entry < 2**bits
    bits: int  # width of one entry of `index`: 1, 2, 3, 4 or 8
    tensors: dict[str, Tensor]  # scales, tables: names are the method's own; fp16-representable
    shape: tuple[int, int]  # [out_features, in_features] of the weight that `decode` returns

    def num_bits(self) -> int:
        """Stored bits in all: packed codes plus every scale and table at 16 bits an entry."""
        rows = self.index.numel() // self.index.shape[-1]
        return 8 * rows * packed_length(self.index.shape[-1], self.bits) + 16 * sum(
            t.numel() for t in self.tensors.values()
        )


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes of `bits` bits take."""
    return -(-length * bits // 8)


def pack(index: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes along the last dimension, low bits first: [..., n] -> uint8 [..., ceil(n * bits / 8)].

    The last byte is filled with zero codes; three-bit codes lie across bytes. Inverse: `unpack(packed, bits, n)`.
    """
    if bits == 3:  # as eight planes of single bits: code j holds the bits 3 j to 3 j + 2 of the row
        return pack(unpack(index.unsqueeze(-1), 1, 8)[..., :3].flatten(-2), 1)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(index, (0, -index.shape[-1] % per_byte))
    lanes = padded.unflatten(-1, (-1, per_byte))
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Exact inverse of `pack`: uint8 [..., bytes] -> uint8 [..., length]."""
    if bits == 3:
        return pack(unpack(packed, 1, 3 * length).unflatten(-1, (-1, 3)), 1).squeeze(-1)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    lanes = (packed.unsqueeze(-1) >> shift) & (2**bits - 1)
    return lanes.flatten(-2)[..., :length]


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for a uint8 index of any shape, differentiable in the table."""
    return table.index_select(0, index.flatten().int()).view(index.shape)
