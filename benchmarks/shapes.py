"""Make native engines and models with random weights in the shapes of known models, to measure their speed.

This prints the tokens per second of one sequence:

    python -m benchmarks.shapes --shape llama_1b --kind ternary --threads 1
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from wrinklefree.core import library
from wrinklefree.core.codes import Codes
from wrinklefree.core.method import find
from wrinklefree.engine.binding import Layer, Linear, Model
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.methods.uniform import Config as Uniform
from wrinklefree.packed.layer import PackedLinear, TiedEmbedding
from wrinklefree.packed.pack import pack_layer
from wrinklefree.packed.products import native
from wrinklefree.packed.products.fused import fuse

KINDS = ("ternary", "w1", "w2", "lut2_rank1", "uniform4", "int8", "bf16")
METHODS = {"ternary": "bitdistill", "w1": "fairy2", "w2": "fairy2", "lut2_rank1": "anemll"}  # for `random_model`


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    vocab: int
    hidden: int
    intermediate: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int = 2048


SHAPES = {
    "smollm2_135m": Shape(49152, 576, 1536, 30, 9, 3, 64),
    "llama_1b": Shape(32000, 2048, 5632, 22, 32, 4, 64),
    "qwen3_600m": Shape(151936, 1024, 3072, 28, 16, 8, 128),
}


def random_engine(
    shape: Shape | str,
    kind: str,
    threads: int,
    slots: int = 1,
    mode: Any = "int8",
    head: str = "int8",
    seed: int = 0,
    rotated: bool = False,
) -> Engine:
    """An engine whose layers are of `kind`. The head, which is tied to the embedding, is of the kind `head`.

    `rotated` says whether the layers rotate their inputs.
    """
    chosen = SHAPES[shape] if isinstance(shape, str) else shape
    generator = torch.Generator().manual_seed(seed)
    table = random_matrix(head, chosen.vocab, chosen.hidden, generator)
    layers = [random_layer(chosen, kind, generator, rotated) for _ in range(chosen.num_layers)]
    sizes = {name: value for name, value in vars(chosen).items() if name != "context"}
    halves = np.arange(0, chosen.head_dim, 2) / chosen.head_dim
    frequencies = (1e4**-halves).astype(np.float32)
    norm = np.ones(chosen.hidden, np.float32)
    model = Model(sizes, 1e-6, [frequencies], [1.0], "silu", table, norm, Linear(table), layers)
    return Engine(model, library.Pool(threads), context=chosen.context, slots=slots, mode=mode)


def random_layer(shape: Shape, kind: str, generator: torch.Generator, rotated: bool = False) -> Layer:
    hidden, inner = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    sizes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    linears = {name: Linear(random_matrix(kind, n, k, generator), rotated=rotated) for name, (n, k) in sizes.items()}
    ones = np.ones(hidden, np.float32)
    return Layer(linears, {"attention_norm": ones, "mlp_norm": ones}, shape.head_dim**-0.5)


def random_matrix(kind: str, n: int, k: int, generator: torch.Generator) -> native.Matrix:
    """A random matrix [n, k] of `kind`, scaled so that its outputs are about as large as its inputs."""
    size = k**-0.5
    if kind == "ternary":
        table, scales = torch.tensor([-1.0, 0.0, 1.0, 0.0]), torch.full((1, 1), size)
        return native.Matrix.table(_codes((n, k), 3, generator), table, scales)
    if kind in ("w1", "w2"):
        stages = int(kind[1])
        scales = size * torch.tensor([0.7, 0.35])[:stages].view(1, stages, 1, 1, 1).expand(2, stages, 2, 1, 1)
        return native.Matrix.complex(_codes((2, stages, n // 2, k // 2), 4, generator), scales)
    if kind == "lut2_rank1":
        table = torch.tensor([-1.0, -0.4, 0.4, 1.0])
        factors = {"row": torch.full((n,), size), "col": 0.5 + torch.rand(k, generator=generator)}
        return native.Matrix.table(_codes((n, k), 4, generator), table, torch.ones(1, 1), **factors)
    if kind == "uniform4":
        groups = torch.full((n, k // 32), size / 4)
        return native.Matrix.table(_codes((n, k), 16, generator), torch.arange(16.0) - 8, groups)
    if kind == "int8":
        whole = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        return native.Matrix.int8(whole, torch.full((n,), size / 73))
    return native.Matrix.dense(size * torch.randn(n, k, generator=generator))


def llama_config(shape: Shape, **more: Any) -> LlamaConfig:
    """The transformers config of a shape. The head is tied to the embedding, unless `more` changes that."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        **({"tie_word_embeddings": True} | more),
    )


def random_model(shape: Shape, kind: str, seed: int = 0, fused: bool = True) -> LlamaForCausalLM:
    """A transformers model with packed layers and a packed head, which is tied to the embedding."""
    generator = torch.Generator().manual_seed(seed)
    config = llama_config(shape, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    method, rounded = find(METHODS[kind])(name=METHODS[kind]), Uniform(bits=8)
    linears = {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}
    for fqn, linear in linears.items():
        n, k = linear.out_features, linear.in_features
        codes = head_codes(n, k, generator) if fqn == "lm_head" else random_codes(kind, n, k, generator)
        packed = pack_layer(PackedLinear, rounded if fqn == "lm_head" else method, codes)
        model.set_submodule(fqn, packed)
    model.set_submodule("model.embed_tokens", TiedEmbedding(model.lm_head))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
    if fused:
        fuse(model)
    return model.eval()


def random_codes(kind: str, n: int, k: int, generator: torch.Generator) -> Codes:
    """Random codes [n, k] of `kind`, with about the scales of `random_matrix`, rounded to fp16."""
    size = torch.tensor(k**-0.5).half().float()
    if kind == "ternary":
        return Codes(_codes((n, k), 3, generator), 2, {"scales": size.view(1, 1)}, (n, k))
    if kind == "lut2_rank1":
        tensors = {"lut": torch.tensor([-1.0, -0.5, 0.5, 1.0]), "a": size.expand(n, 1), "b": torch.ones(1, k)}
        return Codes(_codes((n, k), 4, generator), 2, tensors, (n, k))
    stages = int(kind[1])
    scales = size * torch.tensor([0.75, 0.375])[:stages].view(1, stages, 1, 1, 1).expand(2, stages, 2, 1, 1)
    scales = scales.half().float()
    return Codes(_codes((2, stages, n // 2, k // 2), 4, generator), 2, {"scales": scales}, (n, k))


def head_codes(n: int, k: int, generator: torch.Generator) -> Codes:
    return Codes(_codes((n, k), 255, generator) + 1, 8, {"scales": torch.full((n, 1), 2.0**-12)}, (n, k))


def _codes(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, count, shape, dtype=torch.uint8, generator=generator)


def tokens_per_second(engine: Engine, length: int = 32, prompt: int = 8, rounds: int = 3) -> float:
    """The speed of decoding one sequence: the best of `rounds`."""
    best = 0.0
    for turn in range(rounds):
        slot = engine.open([(7 * i + turn) % 1000 for i in range(prompt)], Sampling(length + 1))
        engine.step()
        start = time.perf_counter()
        for _ in range(length):
            engine.step()
        best = max(best, length / (time.perf_counter() - start))
        engine.close(slot)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama_1b")
    parser.add_argument("--kind", choices=KINDS, default="ternary")
    parser.add_argument("--head", choices=("int8", "uniform4", "bf16"), default="int8")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    engine = random_engine(options.shape, options.kind, options.threads, head=options.head)
    print(f"{engine.describe()}: {tokens_per_second(engine):.1f} tokens/s")


if __name__ == "__main__":
    main()
