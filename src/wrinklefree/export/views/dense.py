"""Quantized models as plain ones, whose linear layers hold the effective weights."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, quant_layers
from wrinklefree.core.rotation import rotation
from wrinklefree.core.stack import as_one
from wrinklefree.core.turned import is_turned


def refuse_norms(model: PreTrainedModel, target: str) -> None:
    """Raises UserError if a quantized layer has a norm inside, which the format `target` has no place for."""
    normed = [fqn for fqn, layer in quant_layers(model).items() if layer.rms_norm is not None]
    if normed:
        raise UserError(
            f"--format {target}: {normed[0]} has a norm inside ({len(normed)} such layers), which a plain "
            f"{type(model).__name__} has no place for: use --format hf"
        )


def refuse_rotation(layers: Mapping[str, QuantLinear], target: str) -> None:
    """Raises UserError if layers rotate their inputs, which the format `target` has no place for."""
    if any(layer.config.rotate_inputs for layer in layers.values()):
        raise UserError(
            f"--format {target}: the layers rotate their inputs (method.rotate_inputs), which it has no place for: "
            f"use --format hf, or dense"
        )


def unquantized_state(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, Tensor]:
    """Return what is stored beside the quantized weights: biases, norms, embeddings, and a head that is not tied."""
    quantized = quant_layers(model)
    own = {f"{fqn}.{name}" for fqn in layers for name, _ in quantized[fqn].named_parameters(recurse=False)}
    left_out = {name for name in own if not name.endswith(".bias")}
    if model.config.tie_word_embeddings:
        left_out.add("lm_head.weight")
    return {n: t.detach().contiguous() for n, t in model.state_dict().items() if n not in left_out}


def plain_weight(layer: QuantLinear) -> Tensor:
    """The weight that a plain layer needs to do the same: fp32 [out, in], or [in, out] if the model has it so."""
    weight = layer.effective_weight(torch.float32)
    weight = rotated_back(weight) if layer.config.rotate_inputs else weight
    return weight.T.contiguous() if is_turned(layer) else weight


def rotated_back(x: Tensor) -> Tensor:
    """Compute R^T x over the last dimension [..., in], for the rotation R of `core/rotation.py`."""
    signs, matrix = rotation(x)
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2) * signs


@torch.no_grad()
def dense_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class without quantization. Its linear layers hold the effective weights in fp32."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    layers = quant_layers(model)
    if "lm_head" in layers:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        plain = type(model)(config)
    wanted = plain.state_dict().keys()
    effective = {f"{fqn}.weight": plain_weight(layer) for fqn, layer in layers.items()}
    state = as_one(model.state_dict() | effective, model)
    state = {name: tensor for name, tensor in state.items() if name in wanted}
    plain.load_state_dict({name: t.detach().float() for name, t in state.items()}, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain
