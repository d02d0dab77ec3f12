"""Linear layers whose weight a model stores as [in, out], such as GPT-2's."""

from typing import Any

from torch import Tensor, nn


class TurnedLinear(nn.Linear):
    """A linear layer [out, in] that saves and loads its weight as [in, out], as the model it is from does."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        """Take over a weight [in, out], which is copied, and a bias."""
        super().__init__(weight.shape[0], weight.shape[1], bias is not None, device="meta")
        self.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
        if bias is not None:
            self.bias = bias
        store_turned(self)


def store_turned(module: nn.Module) -> None:
    """Let a module save and load its weight [out, in] as [in, out]. What is saved is a view."""
    module.register_state_dict_post_hook(_turn_saved)
    module.register_load_state_dict_pre_hook(_turn_loaded)


def is_turned(module: nn.Module) -> bool:
    """Whether `store_turned` was called on the module."""
    return _turn_saved in module._state_dict_hooks.values()


def _turn_saved(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"].T


def _turn_loaded(module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    if f"{prefix}weight" in state:
        state[f"{prefix}weight"] = state[f"{prefix}weight"].T
