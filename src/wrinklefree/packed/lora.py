"""LoRA adapters of PEFT on quantized layers: merging reaches the masters, or is refused. Importing this registers it.

A quantized layer multiplies with `decode(encode(W))`, and with `rotate_inputs` its master W is that of turned inputs.
So a change B A of the weight is turned before it is added, and the layer is quantized again.
"""

import warnings
from typing import Any

from peft.tuners.lora import model as dispatching
from peft.tuners.lora.layer import Linear
from torch import Tensor

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear
from wrinklefree.core.rotation import rotated

MERGED = (
    "LoRA is merged into the full-precision masters. Quantized weights follow where a change reaches another code, so "
    "the model computes something else than with the adapter beside it: train on, or unmerge_adapter()"
)


class QuantLora(Linear):  # type: ignore[misc]  # peft is untyped here
    """An adapter beside a quantized layer."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """B A times its scale [out, in], turned as the master is."""
        delta: Tensor = super().get_delta_weight(adapter)
        return rotated(delta) if self.get_base_layer().config.rotate_inputs else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter to the master. Raises UserError if the layer would not compute the sum of both."""
        layer = self.get_base_layer()
        problem = _problem(layer) or ("its adapter is not plain LoRA" if self.lora_variant else "")
        if problem:
            raise UserError(f"cannot merge LoRA into a {type(layer).__name__}: {problem}: keep the adapter beside it")
        super().merge(safe_merge, adapter_names)
        layer.effective.clear()
        warnings.warn(MERGED, stacklevel=2)

    def unmerge(self) -> None:
        super().unmerge()
        self.get_base_layer().effective.clear()


def _problem(layer: QuantLinear) -> str:
    """Why the sum of the layer and an adapter is no layer of its kind; "" if it is."""
    if layer.rms_norm is not None:
        return "it normalizes its inputs, and those of the adapter are not normalized"
    return "" if layer.follows_weight else "its codes are frozen and ignore the weight"


_default = dispatching.dispatch_default


def _dispatch(*args: Any, **kwargs: Any) -> Any:
    """PEFT's own choice of an adapter, but `QuantLora` for quantized layers."""
    made = _default(*args, **kwargs)
    if type(made) is Linear and isinstance(made.get_base_layer(), QuantLinear):
        made.__class__ = QuantLora
    return made


dispatching.dispatch_default = _dispatch
