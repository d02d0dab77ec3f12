"""The quantizer that this package registers with transformers: it finds methods by name, and fuses known modules."""

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from wrinklefree.core.method import QuantMethod, find
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.products.choose import choose
from wrinklefree.packed.products.fused import fuse
from wrinklefree.packed.quantizer import QUANT_METHOD, WrinkleFreeConfig, WrinkleFreeQuantizer


class PackageQuantizer(WrinkleFreeQuantizer):
    """Knows every method, and works with less Python between products."""

    def method_of(self, settings: dict[str, Any], fqn: str) -> QuantMethod:
        config = find(settings["name"])(**settings)
        assert isinstance(config, QuantMethod)
        return config.config_for(fqn)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        fuse(model)


def register() -> None:
    """Give packed layers their kernels, and make transformers know the format, for the rest of the process."""
    PackedLinear.choose = choose
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = WrinkleFreeConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PackageQuantizer
