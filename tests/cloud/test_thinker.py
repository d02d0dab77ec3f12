"""Estimates of LLM-TRM: parameters are exact, operations are those that torch counts, memory is what torch keeps."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.cloud import estimate, places, thinker
from wrinklefree.cloud.thinker import ANSWER, PROMPT, sizes_of
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.batch import Batch
from wrinklefree.data import chains
from wrinklefree.objectives.base import Objective
from wrinklefree.thinking.grpo import GRPO
from wrinklefree.thinking.injection import Injection
from wrinklefree.thinking.network import LatentThinker, make_thinker
from wrinklefree.thinking.recursion import Recursion
from wrinklefree.thinking.speech import Speaker

pytestmark = pytest.mark.numeric

PROBLEMS, THOUGHTS, WORDS = 2, 3, 32

TOKENIZER = chains.tokenizer()


def small(kind: type[Any], layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = kind(**shape, num_hidden_layers=layers, vocab_size=len(TOKENIZER), head_dim=16)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made.requires_grad_(False)


def config_of(stage: str, *settings: str) -> Config:
    network = {"max_thoughts": THOUGHTS, "hidden_size": 64, "num_heads": 4, "n_latent_steps": 2, "n_deep_recursions": 2}
    given = [f"thinking.network.{name}={value}" for name, value in network.items()]
    if stage not in ("trm_pairs", "trm_eval"):
        given += [f"training.batch_size={PROBLEMS}", "training.max_steps=1"]
    given += [
        f"thinking.pairs.max_new_tokens={WORDS}",
        "thinking.grpo.group_size=2",
        "thinking.grpo.max_answer_tokens=9",
    ]
    fixed = ["model=tiny", f"training={stage}", "thinking.d_compressed=32", "training.precision=fp32"]
    return load_config([*fixed, *given, *settings])


def batch_of(model: PreTrainedModel) -> Batch:
    """Hidden pairs as long as the estimate takes them."""

    def ids(length: int) -> Tensor:
        return torch.randint(0, len(TOKENIZER), (PROBLEMS, length))

    def all_of(length: int) -> Tensor:
        return torch.full((PROBLEMS,), length)

    return {
        "input_ids": ids(PROMPT),
        "prompt_length": all_of(PROMPT),
        "prompt_states": torch.randn(PROBLEMS, PROMPT, 32),
        "thought_ids": ids(WORDS),
        "thought_length": all_of(WORDS),
        "answer_ids": ids(ANSWER),
        "answer_length": all_of(ANSWER),
        "thoughts": torch.randn(PROBLEMS, THOUGHTS, 32),
        "tokens": ids(THOUGHTS),
        "num_thoughts": all_of(THOUGHTS),
    }


def recursion(config: Config, made: LatentThinker, speaker: Speaker) -> Objective:
    made.adapter.requires_grad_(False)
    assert config.thinking is not None
    return Recursion(made, speaker.decoder, config.thinking.network)


def injection(config: Config, made: LatentThinker, speaker: Speaker) -> Objective:
    made.network.requires_grad_(False)
    assert config.thinking is not None
    return Injection(made, speaker, config.thinking.injection)


def grpo(config: Config, made: LatentThinker, speaker: Speaker) -> Objective:
    """Answers never end, and each group has right ones and wrong ones, so that none is dropped."""
    assert config.thinking is not None
    if config.thinking.grpo.trains == "adapter":
        made.network.requires_grad_(False)
    made.keep_average()
    speaker.ends = set()
    objective, rewards = GRPO(made, speaker, config.thinking.grpo), cycle([0.0, 1.0])
    objective._reward = lambda said, right: next(rewards)  # type: ignore[method-assign]
    return objective


@pytest.mark.parametrize(
    ("stage", "make", "settings"),
    [
        ("trm_recursion", recursion, ["thinking.network.sampled_from=1"]),
        ("trm_recursion", recursion, ["thinking.network.sampled_from=0"]),
        ("trm_recursion", recursion, ["thinking.network.mode=final"]),
        ("trm_injection", injection, []),
        ("trm_grpo", grpo, []),
        ("trm_grpo", grpo, ["thinking.grpo.trains=all"]),
    ],
)
def test_operations_are_those_of_a_step(stage: str, make: Callable[..., Objective], settings: list[str]) -> None:
    """What torch counts in one step of the stage itself, without those of attention between tokens, within 15 %."""
    model, config = small(LlamaConfig, 2), config_of(stage, *settings)
    assert config.thinking is not None
    made = make_thinker(model, config.thinking)
    made.compressor.requires_grad_(False)
    nn.init.constant_(made.network.halt.bias, -9)  # it thinks as long as it may
    nn.init.constant_(made.network.halt.weight, 0)
    objective = make(config, made, Speaker(model, TOKENIZER))
    if made.average is not None:
        nn.init.constant_(made.average.halt.bias, -9)
    objective.on_step(0, 1)
    with FlopCounterMode(display=False) as counted:
        loss, _ = next(iter(objective(objective.prepare(batch_of(model)))))
        (loss if isinstance(loss, Tensor) else sum(loss.values(), torch.zeros(()))).backward()
    flops = counted.get_flop_counts()["Global"]
    products = sum(number for operation, number in flops.items() if "attention" not in str(operation))
    work = thinker.STAGES[stage](config, sizes_of(config, model), model)
    assert work.operations == pytest.approx(products, rel=0.15)


@pytest.mark.parametrize("settings", [[], ["thinking.objective=fisher"], ["thinking.network.ema_decay=0"]])
def test_a_thinker_has_the_parameters_that_are_told(settings: list[str]) -> None:
    model, config = small(LlamaConfig, 1), config_of("trm_recursion", *settings)
    assert config.thinking is not None
    made, told = make_thinker(model, config.thinking), sizes_of(config, model)
    assert told.thinker == made.num_parameters()
    assert told.network == sum(p.numel() for p in made.network.parameters())
    assert told.adapter == made.pause.numel() + sum(p.numel() for p in made.adapter.parameters())


def kept(work: Callable[[], Any], parameters: list[Tensor]) -> int:
    """Bytes that torch keeps for going back, without parameters and copies of them."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    shapes = {tuple(p.shape) for p in parameters} | {tuple(p.T.shape) for p in parameters if p.dim() == 2}
    found: dict[int, tuple[int, Tensor]] = {}  # the tensors too: a storage that is freed gives its address to another

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own and tuple(tensor.shape) not in shapes:
            found[key] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_layer_keeps_what_is_told(kind: type[Any], precision: str) -> None:
    """Of one layer more and 31 tokens more, within 15 %."""
    sizes = {}
    for layers in (1, 2):
        for tokens in (33, 64):
            model, soft = small(kind, layers), torch.randn(1, tokens, 96, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                sizes[layers, tokens] = kept(
                    lambda m=model, s=soft: m.base_model(inputs_embeds=s, use_cache=False), list(model.parameters())
                )
    measured = (sizes[2, 64] - sizes[1, 64] - sizes[2, 33] + sizes[1, 33]) / 31
    told = sizes_of(config_of("trm_injection", f"training.precision={precision}"), small(kind, 1)).kept
    assert told == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (2, 3, 2)])
def test_the_network_keeps_what_is_told(shape: tuple[int, int, int], precision: str) -> None:
    names = ("num_layers", "n_latent_steps", "n_deep_recursions")
    given = [f"thinking.network.{name}={value}" for name, value in zip(names, shape, strict=True)]
    model, config = small(LlamaConfig, 1), config_of("trm_recursion", f"training.precision={precision}", *given)
    assert config.thinking is not None
    network = make_thinker(model, config.thinking).network
    states, mask = torch.randn(8, PROMPT, 32), torch.ones(8, PROMPT, dtype=torch.bool)

    def think() -> None:
        network.step(network.context(states, mask), torch.randn(8, 32), torch.zeros(8, dtype=torch.long))

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        measured = kept(think, list(network.parameters()))
    assert thinker.network_keeps(sizes_of(config, model), 8) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("stage", thinker.STAGES)
def test_every_stage_has_an_estimate_with_its_formulas(stage: str) -> None:
    """Tokens, steps, time, memory and cost: on the command line, and each the sum or product that it says it is."""
    out = CliRunner().invoke(app, ["plan", "-m", "smollm3_3b", f"training={stage}"]).stdout
    rows = [line.split()[0] for line in out.splitlines() if line]
    assert rows[:5] == ["estimate", stage, "tokens", "time", "memory"]
    assert "$3.85" in out
    config, cloud = load_config(["model=smollm3_3b", f"training={stage}"]), places.clouds()["nebius"]
    model = estimate.skeleton(config)
    assert model is not None
    told, work = (
        thinker.estimate_thinker(config, model, cloud),
        thinker.STAGES[stage](config, sizes_of(config, model), model),
    )
    gpu = places.gpus()["H100"]
    rate = gpu.flops32 if stage in thinker.FP32 else gpu.flops
    assert told.hours[0] == pytest.approx((work.operations / rate + work.moved / gpu.bandwidth) / 0.45 / 3600)
    assert told.hours[1] == pytest.approx(3 * told.hours[0])
    assert told.peak >= sum(work.memory.values()) + 4 * 3_075_098_624


def test_a_stage_that_does_not_fit_is_told_the_batch_that_does() -> None:
    out = CliRunner().invoke(app, ["plan", "-m", "smollm3_3b", "training=trm_grpo"]).stdout
    assert "warning: trm_grpo takes" in out
    advice = out.partition("it fits with ")[2].split()
    assert [word.partition("=")[0] for word in advice] == [thinker.BATCH, thinker.ACCUMULATION]
    again = CliRunner().invoke(app, ["plan", "-m", "smollm3_3b", "training=trm_grpo", *advice]).stdout
    assert "warning" not in again
    tokens = [next(line.split() for line in text.splitlines() if line.startswith("tokens")) for text in (out, again)]
    assert tokens[0] == tokens[1]


def test_a_thinker_takes_one_gpu() -> None:
    result = CliRunner().invoke(app, ["plan", "-m", "smollm3_3b", "training=trm_grpo", "--gpus", "8"])
    assert result.exit_code == 2
    assert "trains in one process" in result.stderr
