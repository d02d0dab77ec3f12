"""Estimates: shapes are exact, activations are what torch keeps, sums are what their formulas say."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from wrinklefree.cloud import estimate, places
from wrinklefree.cloud.estimate import activations_of
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config, DistillationConfig
from wrinklefree.core.method import find
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.objectives.kinds.language_modelling import Objective

# Parameters as the models' own pages state them.
COUNTS = {
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm3_3b": 3_075_098_624,
    "qwen3_0_6b": 596_049_920,
    "qwen3_4b": 4_022_468_096,
    "llama_3b": 3_212_749_824,
    "llama_7b": 6_738_415_616,
}


def config_of(*settings: str) -> Config:
    return load_config(list(settings))


@pytest.mark.parametrize("name", COUNTS)
def test_shapes_have_the_parameters_that_the_models_have(name: str) -> None:
    model = estimate.skeleton(config_of(f"model={name}"))
    assert model is not None
    assert model.num_parameters() == COUNTS[name]


def small(kind: type[Any], layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = kind(**shape, num_hidden_layers=layers, vocab_size=128, tie_word_embeddings=True, head_dim=16)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made


def kept(model: PreTrainedModel, method: str, bf16: bool, tokens: int) -> int:
    """Bytes that torch keeps for the backward pass of a student, without its parameters."""
    student = find(method)().prepare(model, ())
    student.train()
    parameters = {p.untyped_storage()._cdata for p in student.parameters()}
    found: dict[int, Any] = {}  # the tensors too: a storage that is freed gives its address to another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in parameters:
            found[key] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens)[None]}
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        list(Objective(student, DistillationConfig(name="none"))(batch))
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize(
    ("method", "bf16"), [("fairy2", False), ("fairy2", True), ("uniform", True), ("bitdistill", True)]
)
def test_activations_are_what_torch_keeps(kind: type[Any], method: str, bf16: bool) -> None:
    """Of one layer more and of 32 tokens more, within 15 %."""
    sizes = {(n, t): kept(small(kind, n), method, bf16, t) for n in (1, 2) for t in (32, 64)}
    per_layer = [sizes[2, t] - sizes[1, t] for t in (32, 64)]
    measured = (per_layer[1] - per_layer[0]) / 32
    config = config_of("model=tiny", f"training={'ternary' if method == 'bitdistill' else 'fairy2_w2'}")
    told = activations_of(config, decoder_layers(small(kind, 1))[0], 2 if bf16 else 4)
    assert told == pytest.approx(measured, rel=0.15)
    # What does not grow with the text are the layer's effective weights.
    linear = sum(m.weight.numel() for m in decoder_layers(small(kind, 1))[0].modules() if isinstance(m, nn.Linear))
    assert per_layer[0] - 32 * measured == pytest.approx(linear * (2 if bf16 else 4), rel=0.01)


def test_memory_follows_its_formulas() -> None:
    config = config_of("model=qwen3_4b", "training=fairy2_w2", "distributed=fsdp_multi")
    model = estimate.skeleton(config)
    assert model is not None
    alone = config_of("model=qwen3_4b", "training=fairy2_w2", "training.optimizer.name=muon")
    N = COUNTS["qwen3_4b"]
    whole, shared = estimate.memory_of(alone, model, 4096, 8), estimate.memory_of(config, model, 4096, 8)
    assert (whole["two models"], whole["gradients and moments"]) == (8 * N, 8 * N)
    assert (shared["two models"], shared["gradients and moments"]) == (N, 12 * N / 8)
    assert shared["activations"] < whole["activations"] / 5  # gradient checkpointing
    large = config_of("model=qwen3_4b", "training=fairy2_w2", "distributed=fsdp_large")
    assert estimate.memory_of(large, model, 4096, 8)["two models"] == 0


def test_hours_tokens_and_money_follow_their_formulas() -> None:
    cloud = places.clouds()["nebius"]
    config = config_of("model=smollm2_135m", "training=fairy2_w2", "training.total_tokens=1000000000")
    model = estimate.skeleton(config)
    assert model is not None
    one, eight = (estimate.estimate(config, model, cloud, gpus, 1) for gpus in (1, 8))
    assert one.tokens_per_step == 8 * 2048
    assert one.steps == 1_000_000_000 // one.tokens_per_step
    assert one.traffic == 0
    seconds = one.tokens * one.flops_per_token / (989e12 * 0.45)
    assert one.hours[0] == pytest.approx(seconds / 3600)
    assert one.hours[0] / 8 < eight.hours[0] < one.hours[0]
    spent = estimate.money([one], cloud, 1, False)
    assert spent is not None
    assert spent[1] == pytest.approx(one.hours[1] * 3.85)
    assert estimate.money([one], places.clouds()["kubernetes"], 1, False) is None


def test_a_model_that_does_not_fit_is_told_the_scale_that_does() -> None:
    config = config_of("model=llama_7b", "training=fairy2_w2")
    model = estimate.skeleton(config)
    assert model is not None
    cloud = places.clouds()["nebius"]
    alone = estimate.estimate(config, model, cloud, 1, 1)
    assert not estimate.fits(alone, places.gpus()["H100"])
    scale = estimate.fitting_scale(config, model, cloud)
    assert scale == "xlarge"


def test_minutes_end_a_stage() -> None:
    config = config_of("model=smollm2_135m", "training=fairy2_w2", "training.max_minutes=30")
    model = estimate.skeleton(config)
    assert model is not None
    assert estimate.estimate(config, model, places.clouds()["nebius"], 1, 1).hours == (0.5, 0.5)
