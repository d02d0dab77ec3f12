"""The functions of the ANEMLL guide, under its import name. They call `wrinklefree.methods.anemll` and our trainer.

model = AutoModelForCausalLM.from_pretrained(folder)
replace_linear_with_anemll_v2(model)
train_e2e(model, tokenizer, "caches/tiny", "runs/v2", max_steps=1000)
snap_model_for_ane_v2(model)
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat_lora.files import layers_in, put, read_state, said
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config as RunConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.core.ste import round_fp16 as ste_fp16
from wrinklefree.methods.anemll import Config, LutLinear
from wrinklefree.methods.anemll.lowrank import Factors
from wrinklefree.objectives.kinds.cached_kd import Objective as CachedKD
from wrinklefree.runs import setup

__all__ = [
    "convert_model_to_fp16_v2",
    "evaluate_kd_loss",
    "freeze_Q_all",
    "load_v2_checkpoint",
    "replace_linear_with_anemll_v2",
    "set_batched_forward_v2",
    "set_factored_inference_v2",
    "snap_model_for_ane_v2",
    "ste_fp16",
    "train_e2e",
]

Bits = Literal[2, 3, 4]


def replace_linear_with_anemll_v2(
    model: nn.Module,
    lut_bits: Bits = 2,
    scale_rank: int = 32,
    attn_lut_bits: Bits = 4,
    attn_scale_rank: int = 8,
    quantize_attn: bool = True,
) -> int:
    """Replace the linear layers of a model, in place, by lookup tables with frozen codes.

    Returns how many layers there are. Raises UserError if the model has no linear layer.
    """
    sizes = {"rank": scale_rank, "attn_rank": attn_scale_rank}
    config = Config(view="v2", train="scales", bits=lut_bits, attn_bits=attn_lut_bits, **sizes)  # type: ignore[arg-type]
    if not quantize_attn:
        config.exclude_names += config.attn_names
    config.prepare(model)
    return len(_layers(model))


def _layers(model: nn.Module) -> dict[str, LutLinear]:
    return {fqn: layer for fqn, layer in quant_layers(model).items() if isinstance(layer, LutLinear)}


def _reconfigured(model: nn.Module, **settings: object) -> int:
    """Change settings in all quantized layers, and return how many there are."""
    for layer in _layers(model).values():
        layer.config = replace(layer.config, **settings)  # type: ignore[arg-type]
        layer.effective.clear()
    return len(_layers(model))


def freeze_Q_all(model: nn.Module) -> int:  # noqa: N802  # the guide's name
    """Freeze the codes of all layers that still train them (V1). No weight changes. Returns the layer count."""
    layers = _layers(model)
    if layers:
        replace(_method(layers), view="v2", train="scales").prepare(model)
    return len(layers)


def _method(layers: dict[str, LutLinear]) -> Config:
    """The method's config, from those of an MLP and an attention layer. Raises UserError if there are no layers."""
    if not layers:
        raise UserError("this model has no lookup tables: call replace_linear_with_anemll_v2 first")
    config = next(iter(layers.values())).config
    kinds = {config.is_attention(fqn): layer for fqn, layer in layers.items()}
    sizes = {"bits": kinds[False].config.bits, "rank": len(kinds[False].scale_B)} if False in kinds else {}
    if True in kinds:
        sizes |= {"attn_bits": kinds[True].config.bits, "attn_rank": len(kinds[True].scale_B)}
    return replace(config, **sizes)  # type: ignore[arg-type]


def set_factored_inference_v2(model: nn.Module, enabled: bool) -> int:
    """Let layers compute one rank after the other, or else with the effective weight. Returns the layer count."""
    return _reconfigured(model, forward="factored" if enabled else "weight")


def set_batched_forward_v2(model: nn.Module, enabled: bool) -> int:
    """Let layers compute all ranks at once, or else with the effective weight. Returns the layer count."""
    return _reconfigured(model, forward="batched" if enabled else "weight")


@torch.no_grad()
def snap_model_for_ane_v2(model: nn.Module) -> int:
    """Replace tables and factors by their fp16 values, and latent weights by the weights that these give.

    The model's outputs do not change, because training already computes with the fp16 values.
    Returns how many layers there are.
    """
    for layer in _layers(model).values():
        codes = layer.encode()
        layer.weight.copy_(layer.decode(codes))
        layer.take(Factors(codes.tensors["lut"], codes.tensors["a"], codes.tensors["b"]), codes.index)
    return len(_layers(model))


def convert_model_to_fp16_v2(model: nn.Module) -> nn.Module:
    """Round tables, factors and biases to fp16, and return the model. As in the guide, nothing else changes."""
    snap_model_for_ane_v2(model)
    for layer in _layers(model).values():
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.half().float()
    return model


def load_v2_checkpoint(model: nn.Module, path: str | Path) -> int:
    """Load a `.pt` state dict into a model whose layers have been replaced, and return the number of layers.

    It prints how many of them have frozen codes.

    Raises UserError if the file is no state dict, or does not fit the model.
    """
    file = Path(path)
    state = read_state(file)
    layers = layers_in(state, file)
    said(layers)
    return put(model, state, layers, file)


def _config(model: PreTrainedModel, cache_dir: str | Path, *settings: str) -> RunConfig:
    training = ["training=anemll_v2", "training.objective=cached_kd", f"distillation.cache={cache_dir}"]
    return load_config([f"model={model.name_or_path}", "data=stdlib", *training, *settings])


def train_e2e(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    output_dir: str | Path,
    max_steps: int = 1000,
    lr: float = 5e-5,
    batch_size: int = 8,
    temperature: float = 2.0,
    hard_top1: float = 0.2,
    hard_full: float = 0.00005,
) -> float:
    """Train all parameters with `requires_grad` on a KD cache, and save the run in `output_dir`.

    Returns the held-out KD loss after training.
    """
    values = {"training.max_steps": max_steps, "training.lr": lr, "training.optimizer.scale_lr": lr}
    values |= {"training.batch_size": batch_size, "distillation.temperature": temperature}
    values |= {"distillation.hard_top1": hard_top1, "distillation.hard_full": hard_full}
    config = _config(model, cache_dir, *(f"{k}={v}" for k, v in values.items()), f"output_dir={output_dir}")
    config.method = _method(_layers(model))  # the config that checkpoints store
    run = setup.open_run(config, load=lambda _: (model, tokenizer))
    run.begin()
    run.fit(model, CachedKD(model, config.distillation))
    return evaluate_kd_loss(model, tokenizer, cache_dir, temperature)


def evaluate_kd_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path, temperature: float = 2.0
) -> float:
    """KL to the cached teacher on the held-out sequences, times the square of the temperature."""
    config = _config(model, cache_dir, f"distillation.temperature={temperature}")
    return float(setup.evaluator(config, tokenizer)(model)["eval_kl"])
