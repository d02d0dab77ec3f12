"""`convert_to_fairy2(model, num_stages=2, exclude_names=[...])`, under the name that the Fairy2i guide imports."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from wrinklefree.methods import fairy2
from wrinklefree.packed.masters import remembers


def convert_to_fairy2(
    model: nn.Module, num_stages: int = 2, exclude_names: Iterable[str] = ("embed_tokens", "lm_head")
) -> nn.Module:
    """Swap the linear layers of `model` for Fairy2i ones, in place, and return it.

    Layers that match one of the globs `exclude_names` stay as they are. Then `save_pretrained` writes masters and
    scales, and `from_pretrained` gives a Fairy2i model again. Raises UserError if there is no linear layer.
    """
    method = fairy2.Config(num_stages=num_stages, exclude_names=list(exclude_names))
    prepared = method.prepare(model)
    if isinstance(prepared, PreTrainedModel):
        remembers(prepared, method)
    return prepared
