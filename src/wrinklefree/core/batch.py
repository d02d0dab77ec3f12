"""A training batch: a dictionary of tensors that has at least `input_ids` and `labels`, both [B, L]."""

from torch import Tensor

Batch = dict[str, Tensor]

IGNORE = -100  # the label that the losses of PyTorch and transformers skip


def labelled(batch: Batch) -> Tensor:
    """Mark the positions whose next token counts in the loss: bool [B, L - 1]."""
    return batch["labels"][:, 1:] != IGNORE
