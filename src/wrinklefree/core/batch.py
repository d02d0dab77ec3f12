"""What a batch is: a dictionary of tensors, `input_ids` and `labels` [B, L] among them."""

from torch import Tensor

Batch = dict[str, Tensor]

IGNORE = -100  # the label that PyTorch's and transformers' losses leave out


def labelled(batch: Batch) -> Tensor:
    """Which positions have a next token to predict: bool [B, L - 1]."""
    return batch["labels"][:, 1:] != IGNORE
