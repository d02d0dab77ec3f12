"""BitNet in transformers: a Llama with two more norms per layer, so models with SubLN can be stored as one.

Plain transformers loads such a checkpoint: it reads the fp32 masters, and quantizes weights and activations on the fly.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitNetConfig, BitNetForCausalLM, LlamaForCausalLM, PreTrainedModel

from wrinklefree.core.norm import RMSNorm
from wrinklefree.core.stored import is_stored, widen_layers
from wrinklefree.families.architectures import SUB_NORMS


def fits(model: nn.Module) -> bool:
    """Whether `model` is a Llama that `from_llama` can convert: no biases, and heads that add up to the hidden size."""
    if not isinstance(model, LlamaForCausalLM):
        return False
    c = model.config
    return not c.attention_bias and not c.mlp_bias and c.head_dim * c.num_attention_heads == c.hidden_size


def from_llama(model: LlamaForCausalLM) -> BitNetForCausalLM:
    """Build a BitNet around the weights of a Llama, which are not copied. The additional norms have gain 1."""
    own = model.config.to_dict()
    known = BitNetConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = BitNetConfig(**{name: own[name] for name in known & own.keys()})
    with torch.device("meta"):
        bitnet = BitNetForCausalLM(config)
    state: dict[str, Tensor] = dict(model.named_parameters())  # themselves, since some may be `Stored`
    norms = [name for name in bitnet.state_dict() if name.rpartition(".")[0].endswith(tuple(SUB_NORMS.values()))]
    state |= {name: torch.ones(bitnet.get_parameter(name).shape, device=model.device) for name in norms}
    bitnet.load_state_dict(state, strict=False, assign=True)
    bitnet.tie_weights()
    bitnet.model.rotary_emb = type(bitnet.model.rotary_emb)(config).to(model.device)
    bitnet.generation_config = model.generation_config
    if is_stored(model):
        widen_layers(bitnet)
    return bitnet.train(model.training)


def quicken(model: nn.Module) -> None:
    """Replace the additional norms of a BitNet by our `RMSNorm`, which trains in half the time with equal results."""
    for name, norm in list(model.named_modules()):
        if name.endswith(tuple(SUB_NORMS.values())) and not isinstance(norm, RMSNorm):
            own = RMSNorm(norm.get_parameter("weight"), norm.variance_epsilon)
            own.weight = norm.get_parameter("weight")  # the same object, in case something else refers to it
            model.set_submodule(name, own.train(norm.training))


def norm_beside(model: nn.Module, fqn: str) -> nn.Module | None:
    """The norm that BitNet applies to the inputs of the layer `fqn`. None if there is none or `model` is no BitNet."""
    parent, _, name = fqn.rpartition(".")
    if isinstance(model, BitNetForCausalLM) and name in SUB_NORMS:
        return model.get_submodule(f"{parent}.{SUB_NORMS[name]}")
    return None


def state_online(model: PreTrainedModel, norms_inside: bool, eps: float) -> None:
    """Write into the config of a checkpoint: quantize to ternary with int8 activations while it is loaded.

    `norms_inside` says that every quantized layer normalizes its inputs by an RMSNorm.
    """
    model.config.quantization_config = quantization_config(model, "autobitlinear", "online", norms_inside, eps)


def quantization_config(
    model: nn.Module, linear_class: str, mode: str, norms_inside: bool, eps: float
) -> dict[str, Any]:
    """The section that makes transformers read a model's quantized layers as BitNet's."""
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        "modules_to_not_convert": [fqn for fqn, module in model.named_modules() if type(module) is nn.Linear],
        "use_rms_norm": norms_inside,
        "rms_norm_eps": eps,
    }
