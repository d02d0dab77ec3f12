"""What is rounded when a model is packed, and not in training: scales to the kernels' grid, embedding and head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from wrinklefree.export.rounded.head import Head, HeadBits, quantize, rounded
from wrinklefree.export.rounded.scales import moves, snapped


@dataclass(frozen=True)
class Rounding:
    """The packed head, if any, whether scales move, and both in words."""

    head: Head | None
    snaps: bool
    words: list[str]

    @classmethod
    def of(cls, model: PreTrainedModel, head_bits: HeadBits | None, snap_scales: bool) -> "Rounding":
        """Raises UserError where embedding and head cannot be packed."""
        snaps = snap_scales and bool(moves(model))
        words = ["the scales lie on the grid of the fast kernels"] if snaps else []
        words += [] if head_bits is None else [f"embedding and head are integers of {head_bits} bits"]
        return cls(None if head_bits is None else quantize(model, head_bits), snaps, words)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Let `model` encode and compute as rounded for a while."""
        with snapped(model, self.snaps), rounded(model, self.head):
            yield
