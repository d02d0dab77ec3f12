"""A training batch: a dictionary of tensors that has at least `input_ids` and `labels`, both [B, L]."""

from collections.abc import Mapping

from torch import Tensor

Batch = dict[str, Tensor]

IGNORE = -100  # the label that the losses of PyTorch and transformers skip


def model_inputs(batch: Mapping[str, Tensor]) -> Batch:
    """The tensors of a batch that a model takes: `input_ids`, and `position_ids` if there are any."""
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


def places(batch: Batch) -> Tensor:
    """The place of each token in its document, int64 [B, L]: the positions, even if the model is not told them."""
    return batch["position_ids"] if "position_ids" in batch else batch["places"]


def labelled(batch: Batch) -> Tensor:
    """Mark the positions whose next token counts in the loss: bool [B, L - 1]."""
    return batch["labels"][:, 1:] != IGNORE
