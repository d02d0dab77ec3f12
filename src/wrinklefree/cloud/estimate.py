"""What a training will take, before anything is paid for: steps, hours, memory, links and money.

N parameters, n of them in the linear layers of the decoder, L decoder layers of width d, V words, T tokens
of a batch in one process, G processes. b is the bytes of the dtype of matrix products: 2 for bf16, 4 for fp32.

| figure | formula |
|---|---|
| tokens | training.max_steps x tokens of a step, or training.total_tokens |
| operations of a token | 2 (n + V d) forward, twice that backward; once more with gradient checkpointing or a teacher |
| hours | tokens x operations / (G x the GPU's operations a second x EFFICIENCY) |
| memory: two models | 8 N: original and student in fp32; with fsdp a G-th |
| memory: gradients, moments | 12 N for AdamW, 8 N for Muon; with fsdp a G-th |
| memory: effective weights | b n; with gradient checkpointing those of one layer |
| memory: activations | T a L, or T (4 d L + a) with gradient checkpointing; a is `activations_of` |
| memory: logits | 24 V x CHUNK |
| links, replicate | 8 N (G - 1) / G bytes a step: gradients are summed in a ring |
| links, fsdp | 12 N (G - 1) / G bytes a micro-batch: parameters gathered twice, gradients scattered |
| efficiency | computing time / (computing time + link time), as nothing overlapped |
| money | hours x GPUs x price |

What happens once is left out: loading, rebuilding blocks, evaluating, packing.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from wrinklefree.cloud import places
from wrinklefree.cloud.places import Cloud, Gpu
from wrinklefree.config.schema import Config
from wrinklefree.core import surgery
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.families.architectures import MLP, SUB_NORMS
from wrinklefree.models.find import at_hand
from wrinklefree.models.load import meta_model
from wrinklefree.objectives.language_model import find_objective
from wrinklefree.objectives.losses import CHUNK
from wrinklefree.training.plan import choose_length, choose_minutes, choose_steps, choose_tokens

SHAPES = Path(__file__).with_name("shapes.yaml")

# The share of a GPU's operations that a training reaches, from small models in small batches to large ones. No GPU was
# at hand to measure it: these are the bounds that trainings of this kind report.
EFFICIENCY = (0.15, 0.45)

CONTEXT = 1e9  # bytes that CUDA and its libraries take

ON_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Estimate:
    """What one stage takes on `processes` GPUs. Bytes, seconds, and a range of hours."""

    stage: str
    parameters: int
    tokens: int
    steps: int
    tokens_per_step: int
    flops_per_token: float
    memory: dict[str, float]  # bytes of one GPU by what they are for
    traffic: float  # bytes a step that leave one GPU
    hours: tuple[float, float]
    efficiency: float
    minutes: float | None = None  # the limit that ends the stage, if there is one
    tokens_from: str = ""  # how the tokens come about, for a person to read
    hours_from: str = ""

    @property
    def peak(self) -> float:
        """Bytes of one GPU."""
        return sum(self.memory.values())


def skeleton(config: Config) -> PreTrainedModel | None:
    """The model without weights. None if neither its config is on this machine, nor its shape known to this package.

    Shapes are in shapes.yaml, and in the configs of models that `wf pretrain` makes.
    """
    name, made = config.model.pretrained, config.model.architecture
    known = yaml.safe_load(SHAPES.read_text(encoding="utf-8"))
    source = at_hand(name)
    if source is not None:
        return meta_model(str(source), config.model.trust_remote_code)
    if made is not None:
        known[name] = {"model_type": "llama", **asdict(made)}
    if name not in known:
        return None
    shape = dict(known[name])
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(shape.pop("model_type"), **shape), trust_remote_code=False
        )
    return model


def estimate(config: Config, model: PreTrainedModel, cloud: Cloud, gpus: int, nodes: int) -> Estimate:
    """Estimate one stage on `nodes` machines of `cloud` with `gpus` GPUs each."""
    t, gpu, processes = config.training, places.gpus()[cloud.gpu], gpus * nodes
    minutes = choose_minutes(t, config.model, ON_GPU)
    length = choose_length(t.max_seq_length, model, None, minutes)
    per_step = t.batch_size * length * t.gradient_accumulation_steps * processes
    parameters = int(model.num_parameters())
    steps = int(choose_steps(t.max_steps, choose_tokens(t.total_tokens, parameters, config.model), per_step).value)
    flops = flops_per_token(config, model)
    traffic = bytes_per_step(config, parameters, processes)
    rate = gpu.flops32 if t.precision == "fp32" else gpu.flops
    busy = per_step * flops / (processes * rate)  # seconds of a step at the GPU's full speed
    link = traffic / (gpu.link if nodes == 1 else cloud.network)
    low, high = (steps * (busy / share + link) / 3600 for share in sorted(EFFICIENCY, reverse=True))
    limit = None if minutes is None else minutes.value
    middle = busy / (sum(EFFICIENCY) / 2)
    return Estimate(
        stage=t.stage,
        parameters=parameters,
        tokens=steps * per_step,
        steps=steps,
        tokens_per_step=per_step,
        flops_per_token=flops,
        memory=memory_of(config, model, t.batch_size * length, processes),
        traffic=traffic,
        hours=within(limit, (low, high), t.max_steps),
        efficiency=middle / (middle + link) if steps else 1.0,
        minutes=limit,
        tokens_from=f"{steps:,} steps x {per_step:,} tokens",
        hours_from=f"tokens x {flops:.2g} operations / (GPUs x {rate:.3g} a second x {EFFICIENCY[1]:.0%} to "
        f"{EFFICIENCY[0]:.0%})",
    )


def within(limit: float | None, hours: tuple[float, float], max_steps: int | None) -> tuple[float, float]:
    """The hours of a stage that ends after `limit` minutes, if it has such; with steps it may end before."""
    if limit is None:
        return hours
    if max_steps is None:
        return limit / 60, limit / 60
    return min(limit / 60, hours[0]), min(limit / 60, hours[1])


def flops_per_token(config: Config, model: PreTrainedModel) -> float:
    """Operations for one token of a training step, without those of attention between tokens."""
    text = model.config.get_text_config()
    forward = 2 * (linear_parameters(model) + text.vocab_size * text.hidden_size)
    passes = 3 + config.training.gradient_checkpointing + _has_teacher(config)
    return float(forward * passes)


def _has_teacher(config: Config) -> bool:
    return find_objective(config.training.objective).needs_teacher(config.distillation)


def linear_parameters(model: nn.Module) -> int:
    """n: parameters of the linear layers of the decoder."""
    return sum(linear.weight.numel() for _, linear in surgery.linears(decoder_layers(model), []))


def memory_of(config: Config, model: PreTrainedModel, tokens: int, processes: int) -> dict[str, float]:
    """Bytes of one GPU by what they are for, with `tokens` in a batch of one process."""
    t = config.training
    N, n, layers = int(model.num_parameters()), linear_parameters(model), len(decoder_layers(model))
    text = model.config.get_text_config()
    sharded = config.distributed.strategy == "fsdp" and processes > 1
    share = 1 / processes if sharded else 1.0
    moments = 8 if t.optimizer.name == "adamw" else 4
    b = 4 if t.precision == "fp32" else 2
    per_token = activations_of(config, decoder_layers(model)[0], b)
    parts = {
        "two models": 8 * N * share,
        "gradients and moments": 0.0 if t.max_steps == 0 else (4 + moments) * N * share,
        "effective weights": b * n / (layers if t.gradient_checkpointing else 1),
        "activations": float(tokens * per_token * layers),
        "logits": 24.0 * text.vocab_size * min(CHUNK, tokens),
        "CUDA": CONTEXT,
    }
    if t.gradient_checkpointing:
        parts["activations"] = float(tokens * (4 * text.hidden_size * layers + per_token))
    if sharded and config.distributed.cpu_offload:
        parts["two models"] = parts["gradients and moments"] = 0.0
    if sharded:  # two layers at a time are whole
        parts["gathered layers"] = 2 * 4 * (n / layers) + 4.0 * text.vocab_size * text.hidden_size
    return parts


def activations_of(config: Config, block: nn.Module, b: int) -> float:
    """Bytes that a decoder layer keeps of each token for its backward pass. Tests compare it with what torch keeps.

    - a norm keeps its input and the normalized one, in fp32
    - a linear layer keeps its input in the dtype of the product, each its own if it is cast or rounded to int8
    - what comes out of the layers that do not write into the residual stream is kept too, as is the gate's activation
    """
    method = config.method
    linears = [(name.rpartition(".")[2], linear) for name, linear in surgery.linears(block, [])]
    widths = {name: linear.out_features for name, linear in linears}
    rounded = method is not None and bool(method.int8_inputs)
    own_inputs = b == 2 or rounded
    inputs = sum(linear.in_features for _, linear in linears)
    if not own_inputs:
        shared = {_input_of(name): linear.in_features for name, linear in linears}
        inputs = sum(shared.values())
    outputs = sum(linear.out_features for name, linear in linears if name not in SUB_NORMS)
    gate = widths.get(MLP[0], 0)
    return float(b * (inputs + outputs + gate) + 8 * norms_of(block))


def norms_of(block: nn.Module) -> int:
    """How many numbers of a token pass through the norms of a decoder layer."""
    linears = surgery.linears(block, [])
    widths = {name.rpartition(".")[2]: linear.out_features for name, linear in linears}
    return sum(_norm_width(name, norm, widths) for name, norm in block.named_modules() if _is_norm(norm))


def _input_of(name: str) -> str:
    """Layers with the same answer read the same input."""
    if name in SUB_NORMS:
        return name
    return "mlp" if name in MLP else "attention"


def _is_norm(module: nn.Module) -> bool:
    weight = vars(module).get("_parameters", {}).get("weight")
    return weight is not None and weight.dim() == 1 and not list(module.children())


def _norm_width(name: str, norm: nn.Module, widths: dict[str, int]) -> int:
    """How many numbers of a token pass through a norm; those of Qwen3's heads see all heads."""
    of_heads = {"q_norm": "q_proj", "k_norm": "k_proj"}.get(name.rpartition(".")[2])
    weight = norm.get_parameter("weight")
    return widths.get(of_heads, weight.numel()) if of_heads is not None else weight.numel()


def bytes_per_step(config: Config, parameters: int, processes: int) -> float:
    """Bytes that leave one GPU in an optimizer step."""
    ring = (processes - 1) / processes
    if config.distributed.strategy == "fsdp":
        return 12 * parameters * ring * config.training.gradient_accumulation_steps
    return 8 * parameters * ring


def money(stages: Sequence[Estimate], cloud: Cloud, gpus: int, spot: bool) -> tuple[float, float] | None:
    """US dollars, from and to. None if no price is known."""
    price = cloud.spot if spot else cloud.price
    if price is None:
        return None
    low, high = (sum(stage.hours[end] for stage in stages) * gpus * price for end in (0, 1))
    return low, high


def fitting_scale(config: Config, model: PreTrainedModel, cloud: Cloud) -> str | None:
    """The smallest scale of `cloud` on which the model fits if it is sharded; None if it fits on none."""
    sharded = _sharded(config)
    for name, scale in places.scales().items():
        if cloud.counts and scale.gpus not in cloud.counts:
            continue
        length = choose_length(config.training.max_seq_length, model, None)
        parts = memory_of(sharded, model, scale.batch_size * length, scale.gpus)
        if sum(parts.values()) < places.gpus()[cloud.gpu].memory:
            return name
    return None


def _sharded(config: Config) -> Config:
    other = copy.deepcopy(config)
    other.distributed.strategy = "fsdp"
    other.training.gradient_checkpointing = True
    return other


def fits(stage: Estimate, gpu: Gpu) -> bool:
    """Whether one GPU has room for the stage."""
    return math.ceil(stage.peak) <= gpu.memory
