"""transformers' BitNet as a home for models with SubLN: a Llama with two more norms in every layer.

A checkpoint of such a model says in its config what transformers itself can do with it: read the fp32 masters, and
quantize weights and activations as it goes (`quant_method: bitnet`, `autobitlinear`, `online`).
"""

import torch
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM, LlamaForCausalLM, PreTrainedModel

from wrinklefree.core.norm import RMSNorm

# A layer whose input BitNet normalizes, and the name of that norm beside it.
NORMS = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}


def fits(model: nn.Module) -> bool:
    """Whether BitNet has a place for every weight of this model, and the shapes its norms need."""
    if not isinstance(model, LlamaForCausalLM):
        return False
    c = model.config
    return not c.attention_bias and not c.mlp_bias and c.head_dim * c.num_attention_heads == c.hidden_size


def from_llama(model: LlamaForCausalLM) -> BitNetForCausalLM:
    """The same weights in a BitNet, whose norms have gain 1."""
    own = model.config.to_dict()
    known = BitNetConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = BitNetConfig(**{name: own[name] for name in known & own.keys()})
    with torch.device("meta"):
        bitnet = BitNetForCausalLM(config)
    state = {name: p.detach() for name, p in model.named_parameters()}
    norms = [name for name in bitnet.state_dict() if name.rpartition(".")[0].endswith(tuple(NORMS.values()))]
    state |= {name: torch.ones(bitnet.get_parameter(name).shape, device=model.device) for name in norms}
    bitnet.load_state_dict(state, strict=False, assign=True)
    bitnet.tie_weights()
    bitnet.model.rotary_emb = type(bitnet.model.rotary_emb)(config).to(model.device)
    bitnet.generation_config = model.generation_config
    return bitnet.train(model.training)


def quicken(model: nn.Module) -> None:
    """Give a BitNet's further norms the same arithmetic in half the time: they see each layer's widest activations."""
    for name, norm in list(model.named_modules()):
        if name.endswith(tuple(NORMS.values())) and not isinstance(norm, RMSNorm):
            own = RMSNorm(norm.get_parameter("weight"), norm.variance_epsilon)
            own.weight = norm.get_parameter("weight")  # the very parameter, whoever else may hold it
            model.set_submodule(name, own.train(norm.training))


def norm_beside(model: nn.Module, fqn: str) -> nn.Module | None:
    """The norm of the inputs of the layer `fqn`, where `model` is a BitNet and has one."""
    parent, _, name = fqn.rpartition(".")
    if isinstance(model, BitNetForCausalLM) and name in NORMS:
        return model.get_submodule(f"{parent}.{NORMS[name]}")
    return None


def state_online(model: PreTrainedModel, norms_inside: bool, eps: float) -> None:
    """Make the config of a checkpoint say: ternary, int8 activations, perhaps an RMSNorm in every quantized layer."""
    model.config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": [fqn for fqn, m in model.named_modules() if type(m) is nn.Linear],
        "use_rms_norm": norms_inside,
        "rms_norm_eps": eps,
    }
