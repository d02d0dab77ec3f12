"""What could be done about outliers, layer by layer, before any training: how much of each layer's output is lost.

    python -m benchmarks.outliers --model FOLDER --text FILE [--blocks 0,5,11,20,29] [--json]

The figure is tr(E H E^T) / tr(W H W^T) after calibration (wrinklefree/reconstruction/feedback.py), the mean over some
blocks. H are the second moments of the layer's inputs in the original, each token divided by its norm. E is the error
of the weight.

    plain     the layer as it is
    rotated   W R^T for inputs R x: random signs, then a Hadamard transform of each 512 (or else 64) columns
    awq       columns scaled by the inputs' root mean squares to the power of 1/4 (arXiv 2306.00978)
    folded    columns times the gain of the norm in front of them, so that the norm has none (arXiv 2405.16406)
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from wrinklefree.core.method import QuantLinear, QuantMethod
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.methods.bitdistill import Config as BitDistill
from wrinklefree.methods.fairy2 import Config as Fairy2
from wrinklefree.models.load import load_model
from wrinklefree.reconstruction import feedback
from wrinklefree.tracking.terminal import print_table

TOKENS, LENGTH = 8192, 256

METHODS: dict[str, QuantMethod] = {
    "w2": Fairy2(),
    "w1": Fairy2(num_stages=1),
    "ternary": BitDistill(scale_mode="learned", norm_mode="none", granularity="row"),
}

Pair = tuple[Tensor, Tensor]  # a weight [out, in], and its inputs' second moments [in, in]


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix of a power of two: fp32 [size, size]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotation(width: int) -> Tensor:
    """R [width, width]: random signs, then a Hadamard transform of each block of columns."""
    block = 512 if width % 512 == 0 else 64
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return torch.block_diag(*[hadamard(block)] * (width // block)) * signs


def rotated(weight: Tensor, moments: Tensor) -> Pair:
    """The layer behind a rotation of its inputs."""
    R = rotation(weight.shape[1])
    return weight @ R.T, R @ moments @ R.T


def awq(weight: Tensor, moments: Tensor) -> Pair:
    """The layer with its columns scaled by the size of their inputs."""
    return scaled(weight, moments, (moments.diagonal() / moments.diagonal().mean()).clamp_min(1e-4) ** 0.125)


def scaled(weight: Tensor, moments: Tensor, scale: Tensor) -> Pair:
    """The layer with its columns times `scale` [in], and inputs divided by it."""
    return weight * scale, moments / scale / scale.unsqueeze(1)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Pair]] = {
    "plain": lambda w, h, gain: (w, h),
    "rotated": lambda w, h, gain: rotated(w, h),
    "awq": lambda w, h, gain: awq(w, h),
    "folded": scaled,
}

# The norm in front of a layer, by names that Llama and its relatives have. Other layers have none.
NORMS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm")
NORMS |= dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm")


def gain(block: nn.Module, name: str) -> Tensor:
    """The gain [in] of the norm in front of a layer of the block; ones if there is none."""
    layer, norm = block.get_submodule(name), NORMS.get(name.rpartition(".")[2])
    weight = layer.get_parameter("weight")
    return torch.ones(weight.shape[1]) if norm is None else block.get_submodule(norm).get_parameter("weight").detach()


def calibrated(method: QuantMethod, weight: Tensor, moments: Tensor) -> QuantLinear:
    """A calibrated layer of this weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    layer = method.layer(linear, method)
    feedback.calibrate(layer, moments)
    return layer


def lost(error: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
    """The share of a layer's squared output that an error of its weight takes: tr(E H E^T) / tr(W H W^T)."""
    return ((error @ moments) * error).sum() / ((weight @ moments) * weight).sum()


def lost_by(method: QuantMethod, weight: Tensor, moments: Tensor) -> float:
    """What is lost once the layer is calibrated, in fp64."""
    error = weight - calibrated(method, weight, moments).quantized_weight().detach()
    return lost(error.double(), weight.double(), moments.double()).item()


@torch.no_grad()
def second_moments(model: PreTrainedModel, ids: Tensor, blocks: list[int]) -> dict[tuple[int, str], Tensor]:
    """H of every linear layer of some blocks, by the block's number and the layer's name."""
    found: dict[tuple[int, str], Tensor] = defaultdict(lambda: torch.zeros(()))

    def see(key: tuple[int, str], inputs: tuple[Tensor, ...]) -> None:
        x = torch.nn.functional.normalize(inputs[0].float().flatten(0, 1), dim=1)
        found[key] = found[key] + x.T @ x / TOKENS

    for number in blocks:
        for name, layer in decoder_layers(model)[number].named_modules():
            if isinstance(layer, nn.Linear):
                key = (number, name)
                layer.register_forward_pre_hook(lambda _, inputs, key=key: see(key, inputs))
    for rows in ids.split(8):
        model.base_model(input_ids=rows, use_cache=False)
    return found


def parser(description: str | None, blocks: str) -> argparse.ArgumentParser:
    """The arguments of a benchmark that looks at single layers."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True)
    made.add_argument("--text", type=Path, required=True)
    made.add_argument("--blocks", default=blocks)
    made.add_argument("--json", action="store_true")
    return made


def layers(arguments: argparse.Namespace) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """The linear layers of the chosen blocks: name, block, weight [out, in] and second moments [in, in]."""
    model, _ = load_model(arguments.model, dtype=torch.float32)
    text = arguments.text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(arguments.model)(text, return_tensors="pt", verbose=False).input_ids[0]
    blocks = [int(number) for number in arguments.blocks.split(",")]
    moments = second_moments(model, ids[TOKENS : 2 * TOKENS].view(-1, LENGTH), blocks)
    for (number, name), H in moments.items():
        block = decoder_layers(model)[number]
        yield name, block, block.get_submodule(name).get_parameter("weight").detach().float(), H


def main() -> None:
    arguments = parser(__doc__, "0,5,11,20,29").parse_args()
    losses: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for name, block, weight, H in layers(arguments):
        for kind, method in METHODS.items():
            for variant, change in VARIANTS.items():
                losses[kind, name, variant].append(lost_by(method, *change(weight, H, gain(block, name))))
    means = {key: sum(values) / len(values) for key, values in losses.items()}
    if arguments.json:
        print(json.dumps({" ".join(key): value for key, value in means.items()}))
        return
    rows = [
        [kind, name, *(f"{means[kind, name, variant]:.4f}" for variant in VARIANTS)]
        for kind, name in dict.fromkeys(key[:2] for key in means)
    ]
    print_table(["method", "layer", *VARIANTS], rows)


if __name__ == "__main__":
    main()
