"""The package's plug-in for transformers: it reads packed folders of every method, and uses the fast kernels."""

import json
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from wrinklefree.core.method import QuantMethod, find
from wrinklefree.core.stack import open_stacks
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.products.choose import choose
from wrinklefree.packed.products.fused import fuse
from wrinklefree.packed.quantizer import QUANT_METHOD, WrinkleFreeConfig, WrinkleFreeQuantizer


class PackageQuantizer(WrinkleFreeQuantizer):
    """Reads packed folders of any method, found by name, and fuses the modules that it knows."""

    def method_of(self, settings: dict[str, Any], fqn: str) -> QuantMethod:
        key = json.dumps(settings, sort_keys=True)
        if key not in self.methods:
            self.methods[key] = find(settings["name"])(**settings)
        return self.methods[key].config_for(fqn)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.methods: dict[str, QuantMethod] = {}  # made once for all layers with the same settings
        open_stacks(model, self.quantization_config.stacks)
        super()._process_model_before_weight_loading(model, **kwargs)
        fuse(model)


def register() -> None:
    """Register the format with transformers, and let packed layers use kernels, for the rest of the process."""
    PackedLinear.choose = choose
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = WrinkleFreeConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PackageQuantizer
