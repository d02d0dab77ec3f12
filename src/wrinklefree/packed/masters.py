"""Lets `save_pretrained` of a model whose layers were swapped in place say so, and `from_pretrained` read it back.

The folder holds the full-precision masters and the trained scales. Its config.json names the method, which prepares the
layers again before the weights are loaded. Without this package, transformers warns that it does not know the type, and
loads the masters as a model in full precision.
"""

import dataclasses
import logging
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wrinklefree.core.method import QuantMethod, find

log = logging.getLogger("wrinklefree")

MASTERS = "wrinklefree_masters"

SAVED = (
    "saved the full-precision masters and scales of a quantized model: from_pretrained quantizes them again after "
    "`import wrinklefree`"
)


class MastersConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """The section `quantization_config` of config.json: the method's settings."""

    def __init__(self, method: dict[str, Any], quant_method: str = MASTERS) -> None:
        self.method, self.quant_method = method, quant_method


class MastersQuantizer(HfQuantizer):  # type: ignore[misc]
    """Prepares the layers for masters and scales that transformers loads next."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32  # of masters; with fewer bits, codes would flip

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        settings = self.quantization_config.method
        find(settings["name"])(**settings).prepare(model, initialize=False)

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        log.info(SAVED)
        return None, {}


def remembers(model: Any, method: QuantMethod) -> None:
    """Let `save_pretrained` of a model of transformers write which method prepared the model."""
    config = MastersConfig(dataclasses.asdict(method))
    model.config.quantization_config = config
    model.hf_quantizer = MastersQuantizer(config, pre_quantized=True)


def register() -> None:
    """Register the type with transformers for the rest of the process."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[MASTERS] = MastersConfig
    AUTO_QUANTIZER_MAPPING[MASTERS] = MastersQuantizer
