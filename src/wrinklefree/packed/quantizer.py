"""Let transformers read packed folders (`quant_method: wrinklefree`). Each packed folder has a copy of this file.

Before weights are loaded, every layer named in `quantization_config.layers` is replaced by an empty `PackedLinear`.
transformers then fills its buffers like any other tensor. Importing this file registers nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wrinklefree.packed.layer import LayerSpec, Method, PackedEmbedding, PackedLinear, TiedEmbedding, scale_of

QUANT_METHOD = "wrinklefree"
# A folder is written in the oldest format that can hold it, so older versions can read it: 2 if layers have norms of
# their own, 3 if embedding or head are packed (they may have another method), 4 if experts of a stack are, 5 if layers
# rotate their inputs.
PLAIN, WITH_NORMS, WITH_HEAD, WITH_STACKS, WITH_ROTATION = 1, 2, 3, 4, 5
FORMAT = WITH_ROTATION  # the newest that is read; a reader refuses newer ones


def untie(model: Any, packed: Iterable[str]) -> None:
    """Let packed layers share nothing: those of Zamba's shared blocks are each in the file."""
    inside, keys = tuple(f"{fqn}." for fqn in packed), model.all_tied_weights_keys
    model.all_tied_weights_keys = {
        to: of for to, of in keys.items() if not (to.startswith(inside) or of.startswith(inside))
    }


class WrinkleFreeConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """The section `quantization_config` of config.json: the method's settings and the shapes of all packed layers."""

    def __init__(
        self,
        method: dict[str, Any],
        layers: dict[str, dict[str, Any]],
        format: int = PLAIN,
        quant_method: str = QUANT_METHOD,
        tied: dict[str, str] | None = None,
        stacks: dict[str, int] | None = None,
    ) -> None:
        """Raises ValueError if a newer version wrote the folder."""
        if format > FORMAT:
            raise ValueError(f"packed folder of format {format}, newer than {FORMAT}: upgrade wrinklefree")
        self.quant_method = quant_method
        self.format = format
        self.method = method
        self.layers = layers
        self.tied = tied or {}  # fqn of an embedding without tensors of its own -> fqn of the head that has them
        self.stacks = stacks or {}  # fqn of a tensor of experts -> how many there are


class WrinkleFreeQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed layers into a model before transformers loads its weights."""

    requires_calibration = True  # codes are trained, so a dense folder cannot be quantized while it is loaded
    is_trainable = False

    def method_of(self, settings: dict[str, Any], fqn: str) -> Method:
        """The method of the layer `fqn` with these settings. The package finds any method, a folder has its own."""
        raise NotImplementedError

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for fqn, values in self.quantization_config.layers.items():
            spec, replaced = LayerSpec(**values), model.get_submodule(fqn)
            method = self.method_of(spec.method or self.quantization_config.method, fqn)
            with torch.device("meta"):
                layer = PackedLinear(method, spec)
                if isinstance(replaced, nn.Embedding):
                    layer = embedding = PackedEmbedding(method, spec, replaced.weight.dtype)
                    embedding.scale = scale_of(replaced)
            model.set_submodule(fqn, layer, strict=True)
        for fqn, head in self.quantization_config.tied.items():
            replaced = model.get_submodule(fqn)
            tied = TiedEmbedding(model.get_submodule(head), replaced.weight.dtype)
            tied.scale = scale_of(replaced)
            model.set_submodule(fqn, tied, strict=True)
        untie(model, self.quantization_config.layers)
        vars(model.config).pop("auto_map", None)  # saving again does not copy the loader, so it must not point there

    def is_serializable(self) -> bool:
        return True


@contextmanager
def registered(quantizer: type[WrinkleFreeQuantizer]) -> Iterator[None]:
    """Register `quantizer` for the format inside the block. Afterwards restore what was registered before."""
    own = ((AUTO_QUANTIZATION_CONFIG_MAPPING, WrinkleFreeConfig), (AUTO_QUANTIZER_MAPPING, quantizer))
    before = [(mapping, mapping.pop(QUANT_METHOD, None)) for mapping, _ in own]
    for mapping, cls in own:
        mapping[QUANT_METHOD] = cls
    try:
        yield
    finally:
        for mapping, cls in before:
            del mapping[QUANT_METHOD]
            if cls is not None:
                mapping[QUANT_METHOD] = cls
