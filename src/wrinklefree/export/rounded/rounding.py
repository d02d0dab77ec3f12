"""What packing rounds, beyond training: scales to the kernels' grid, and embedding and head to integers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from wrinklefree.export.rounded.head import Head, HeadBits, quantize, rounded
from wrinklefree.export.rounded.scales import moves, snapped


@dataclass(frozen=True)
class Rounding:
    """What one export rounds."""

    head: Head | None  # embedding and head as integers; None leaves them as they are
    snaps: bool  # whether scales move to the grid
    words: list[str]  # both as parts of a sentence, for the model card

    @classmethod
    def of(cls, model: PreTrainedModel, head_bits: HeadBits | None, snap_scales: bool) -> "Rounding":
        """Plan the rounding of a model. Raises UserError if embedding and head cannot be packed."""
        snaps = snap_scales and bool(moves(model))
        words = ["the scales lie on the grid of the fast kernels"] if snaps else []
        words += [] if head_bits is None else [f"embedding and head are integers of {head_bits} bits"]
        return cls(None if head_bits is None else quantize(model, head_bits), snaps, words)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Let `model` encode and compute with this rounding while the block runs."""
        with snapped(model, self.snaps), rounded(model, self.head):
            yield
