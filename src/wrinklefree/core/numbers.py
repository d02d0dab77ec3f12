"""Checks that tensors from a file hold finite numbers."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from wrinklefree.core.errors import UserError


def not_numbers(tensor: Tensor) -> str:
    """Return what is wrong with a tensor of weights, as the end of a sentence; "" if it has finite floating numbers."""
    if not tensor.is_floating_point():
        return f"is {tensor.dtype}, not floating-point numbers"
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch sums no float8
    # A sum reads each number once and makes no second tensor. It may overflow where all numbers are finite.
    if wide.sum(dtype=torch.float32).isfinite() or wide.isfinite().all():
        return ""
    return "holds NaN or infinite numbers"


def first_not_numbers(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return "NAME holds NaN ..." for the first named tensor with floating numbers that are not finite; "" if none."""
    for name, tensor in tensors:
        problem = not_numbers(tensor) if tensor.is_floating_point() else ""
        if problem:
            return f"{name} {problem}"
    return ""


def check_tensor(where: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int | None]) -> None:
    """Raises UserError if a tensor of the file `where` has another dtype or shape, or numbers that are not finite.

    None in `shape` stands for any size.
    """
    fits = len(shape) == tensor.ndim and all(a in (None, b) for a, b in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits:
        wanted = ["any" if size is None else size for size in shape]
        raise UserError(f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {wanted}")
    if dtype.is_floating_point and not_numbers(tensor):
        raise UserError(f"{where}: {name} {not_numbers(tensor)}")
