"""Rotation of a layer's inputs, which spreads what a few large channels hold over many.

QuIP# (arXiv 2402.04396) and QuaRot (arXiv 2404.00456) rotate so. The weight turns with the inputs, and their product
stays what it was:

    W x = (W R^T)(R x)      R = H D

D [in, in] is diagonal with signs, and H has an orthogonal Hadamard matrix for every `rotation_block` columns.
"""

from functools import cache

import torch
from torch import Tensor

LARGEST_BLOCK = 256
# The sign of column i is a bit of this product: it looks random, and the native decoder computes the same.
SIGN_FACTOR, SIGN_BIT = 2654435761, 13


def rotation_block(width: int) -> int:
    """How many columns a Hadamard matrix mixes: the largest power of 4 up to 256 that divides `width`.

    Its entries are then plus and minus a power of two, which every floating-point type holds exactly.
    """
    block = LARGEST_BLOCK
    while width % block:
        block //= 4
    return block


def _rotation(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The signs D [width], and the Hadamard matrix [block, block]."""
    columns = torch.arange(width, dtype=torch.int64)
    signs = 1 - 2 * (columns * SIGN_FACTOR >> SIGN_BIT & 1)
    size, matrix = rotation_block(width), torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return signs.to(device, dtype), (matrix / size**0.5).to(device, dtype)


# What is made in inference mode is of no use to a training that comes later.
_kept_rotation = cache(torch.inference_mode(False)(_rotation))


def rotation(x: Tensor) -> tuple[Tensor, Tensor]:
    """The signs D [in], and the Hadamard matrix [block, block], for x [..., in]."""
    make = _rotation if torch.compiler.is_compiling() else _kept_rotation  # a compiler folds what is constant
    return make(x.shape[-1], x.dtype, x.device)


def rotated(x: Tensor) -> Tensor:
    """Compute R x over the last dimension: [..., in]."""
    signs, matrix = rotation(x)
    return ((x * signs).unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)
