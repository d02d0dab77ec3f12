"""`--format gguf`: one file for llama.cpp, with weights and tokenizer.

| tensor | type | bits per weight |
|---|---|---|
| quantized layers | the smallest that holds their integers and scales exactly, see `gguf/blocks.py` | 1.125 to 8.5 |
| the same, if no block of any type lies within a group of columns that share a scale | F16, still exact | 16 |
| embeddings, head | F16, or rounded to Q8_0 or Q6_K | 16, 8.5, 6.5625 |
| norms, biases, routers of experts | F32 | 32 |

Experts that transformers has in one tensor are one in the file, too, with the smallest type that holds all of them. A
model with SubLN becomes llama.cpp's arch `bitnet`, Mistral becomes `llama`; others have an architecture of their own
(export/views/llamacpp.py). Logits are close to the trained ones, not equal: llama.cpp rounds activations to int8 in
blocks of 32 or 256, not per token.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, quant_layers
from wrinklefree.core.stack import as_one, masters
from wrinklefree.export.proof.agreement import Agreement, compare, judge
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.dense import dense_model, refuse_norms, refuse_rotation, unquantized_state
from wrinklefree.export.views.levels import Levels, below_each_other, levels_of
from wrinklefree.export.views.llamacpp import (
    ROPE_DIVISORS,
    describe_more,
    longest_text,
    refuse_model,
    rope_divisors,
    told_by_hand,
)
from wrinklefree.families.architectures import head_dim
from wrinklefree.gguf import tokens
from wrinklefree.gguf.architectures import WRITTEN_AS
from wrinklefree.gguf.blocks import FLOATS, INTEGERS, Q6_K, Array, Kind, pack, rounded_q6_k, rounded_q8_0
from wrinklefree.gguf.header import read_header
from wrinklefree.gguf.names import IN_FULL, above_one, gguf_names, heads_of, paired, piece, stored_shape
from wrinklefree.gguf.values import read_weight
from wrinklefree.tracking.terminal import short_size

NEEDS = "gguf"
NEXT = "wf generate {target}/model.gguf --prompt {prompt}, or llama-cli -m {target}/model.gguf -p {prompt}"
USE = """\
```bash
wf generate {name}/model.gguf --prompt {prompt}
llama-cli -m {name}/model.gguf -p {prompt}
```

`wf serve {name}/model.gguf` and `llama-server -m {name}/model.gguf` answer over HTTP.
"""
LIBRARY = "gguf"
WEIGHTS = "*.gguf"
OPTIONS = {
    "gguf_type": {
        "choices": ["auto", "q2_0", "q1_0", "tq2_0", "tq1_0"],
        "help": "GGUF: type of quantized layers; auto (default) is the smallest that holds each layer exactly. "
        "Q2_0 and Q1_0 need a llama.cpp of July 2026 or newer.",
    },
    "gguf_embedding": {
        "choices": ["f16", "q8_0", "q6_k"],
        "help": "GGUF: type of embeddings and head, f16 (default) or rounded; what rounding costs is measured.",
    },
}

GgufType = Literal["auto", "q2_0", "q1_0", "tq2_0", "tq1_0"]
EmbeddingType = Literal["f16", "q8_0", "q6_k"]

# Architectures that transformers reads from GGUF files.
READ_BACK = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "starcoder2", "qwen2moe", "qwen3moe")
KL = 1e-3  # nats allowed for scales and embeddings in fp16
PROBE = 64  # token ids whose logits are compared with those of transformers
MEASURED = 2048  # tokens of text on which the file is compared with the trained model

# Files by the type of most of their weights, as llama.cpp numbers them.
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "TQ1_0": 36, "TQ2_0": 37, "Q1_0": 40, "Q2_0": 41}
NEW = ("Q1_0", "Q2_0")  # of July 2026

KINDS = INTEGERS | FLOATS | {"Q6_K": Q6_K}
SMALLEST_FIRST = sorted(INTEGERS, key=lambda name: INTEGERS[name].bits)
OLD = ("Q4_0", "Q8_0")  # what every llama.cpp has, for layers that do not fit the type that was asked for


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
    gguf_type: GgufType = "auto",
    gguf_embedding: EmbeddingType = "f16",
) -> list[list[str]]:
    """Write `folder/model.gguf`, read it back, compare weights, token ids and logits. Returns rows of a table.

    Raises UserError if llama.cpp cannot hold the model, CertificateError if the file is not the trained model.
    """
    import gguf

    arch = architecture(model)
    layers = levels(model)
    refuse_width(model, gguf_embedding)
    plan = {name: kind_of(name, tensor, layers, gguf_type, gguf_embedding) for name, tensor in tensors(model).items()}
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name(tokens.named(f"{type(model).__name__} by wrinklefree", tokenizer))
    describe(writer, model, file_type(plan, layers))
    tokens.add(writer, tokenizer, model.config.vocab_size)
    write_tensors(writer, model, layers, plan)
    check(file, model, layers)
    check_tokens(file, tokenizer)
    used = [plan[name] for name in layers]
    return [
        ["file", f"{file.name}, {short_size(file.stat().st_size)}"],
        ["architecture", arch],
        ["quantized tensors with identical weights", f"{len(layers)} of {len(layers)}"],
        ["their types", ", ".join(f"{used.count(kind)} {kind}" for kind in dict.fromkeys(used))],
        ["bits per quantized weight", f"{bits(plan, layers):.4f}"],
        ["embeddings and head", gguf_embedding.upper()],
        *([["runs with", "llama.cpp of July 2026 or newer"]] if set(used) & set(NEW) else []),
        ["texts with the same token ids", _same_ids(tokenizer)],
        *measured(file, model, list(batches), gguf_embedding).rows(),
        *read_back(file, model, arch, set(plan.values())),
    ]


def architecture(model: PreTrainedModel) -> str:
    """Return llama.cpp's name for the model's architecture. Raises UserError if it has no place for the model."""
    refuse_norms(model, "gguf")
    name, config = type(model).__name__, model.config
    if name not in WRITTEN_AS:
        raise UserError(f"--format gguf: {name} is none of {', '.join(WRITTEN_AS)}: use --format dense or hf")
    if name == "BitNetForCausalLM" and not config.tie_word_embeddings:
        raise UserError(
            "--format gguf: llama.cpp's bitnet takes its output matrix from the embeddings, and this model has one of "
            "its own: train with method.norm_mode=none, or use --format bitnet"
        )
    refuse_model(model)
    return WRITTEN_AS[name]


def levels(model: PreTrainedModel) -> dict[str, Levels]:
    """Return every quantized parameter under its name in transformers, with the experts of a tensor below each other.

    Raises UserError if nothing is quantized, if a layer is no integers, or if only some experts of a tensor are.
    """
    layers = quant_layers(model)
    if not layers:
        raise UserError("--format gguf: nothing in this model is quantized; save it as it is with --format dense")
    refuse_rotation(layers, "gguf")
    found = {f"{fqn}.weight": _levels(fqn, layer) for fqn, layer in layers.items()}
    for stack, names in masters(model).items():
        inside = [found.pop(name) for name in names if name in found]
        if 0 < len(inside) < len(names):
            raise UserError(f"--format gguf: {stack}: {len(inside)} of {len(names)} experts are quantized: all or none")
        if inside:
            found[stack] = below_each_other(inside)
    return found


def _levels(fqn: str, layer: QuantLinear) -> Levels:
    found = levels_of(layer)
    if found is None:
        raise UserError(
            f"--format gguf: {fqn} is not integers times fp16 scales ({layer.config.name}), and no GGUF type holds "
            f"anything else exactly: use --format hf, or --format dense"
        )
    return found


def refuse_width(model: PreTrainedModel, embedding: EmbeddingType) -> None:
    """Raises UserError if blocks of the type do not fill the rows of the embedding."""
    width = model.config.hidden_size
    for name, kind in (("q6_k", Q6_K), ("q8_0", INTEGERS["Q8_0"])):
        if embedding == name and width % kind.columns:
            raise UserError(
                f"--gguf-embedding {name}: has blocks of {kind.columns} columns, the embedding has {width}: use "
                f"{'q8_0' if name == 'q6_k' and width % 32 == 0 else 'f16'}"
            )


def kind_of(
    name: str, tensor: Tensor, layers: Mapping[str, Levels], gguf_type: GgufType, embedding: EmbeddingType
) -> str:
    """Return the GGUF type of a parameter."""
    if name in layers:
        return layer_kind(layers[name], gguf_type)
    if tensor.ndim == 1 or name.endswith(IN_FULL):
        return "F32"
    return embedding.upper() if tensor.shape[-1] % KINDS[embedding.upper()].columns == 0 else "F16"


def layer_kind(layer: Levels, gguf_type: GgufType) -> str:
    """Return the type of a layer: the first that holds it exactly."""
    names = SMALLEST_FIRST if gguf_type == "auto" else (gguf_type.upper(), *OLD)
    return next((name for name in names if holds(INTEGERS[name], layer)), "F16")


def holds(kind: Kind, layer: Levels) -> bool:
    """Whether blocks of a type lie within the layer's groups of columns and have its integers."""
    least, most = int(layer.integers.min()), int(layer.integers.max())
    inside = layer.group % kind.columns == 0 and least >= kind.least and most <= kind.most
    return inside and (kind.zero or bool(layer.integers.all()))


def file_type(plan: Mapping[str, str], layers: Mapping[str, Levels]) -> int:
    """Return llama.cpp's number for a file whose quantized weights have mostly the type that they have here."""
    weights: dict[str, int] = {}
    for name, layer in layers.items():
        weights[plan[name]] = weights.get(plan[name], 0) + layer.integers.numel()
    return FILE_TYPES[max(weights, key=lambda kind: weights[kind])]


def bits(plan: Mapping[str, str], layers: Mapping[str, Levels]) -> float:
    """Return the bits per quantized weight in the file, scales counted."""
    total = sum(KINDS[plan[name]].bits * layer.integers.numel() for name, layer in layers.items())
    return total / sum(layer.integers.numel() for layer in layers.values())


def describe(writer: Any, model: PreTrainedModel, file_type: int) -> None:
    """Write the model's sizes and settings into the file's metadata."""
    import gguf

    c = model.config
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    width = head_dim(c.to_dict())
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(c.vocab_size)
    describe_more(writer, model)


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return weights and biases under transformers' names, without trained scales and without a tied head.

    Of what is quantized, only the shapes: the values are those of `levels`.
    """
    layers = quant_layers(model)
    shapes = {f"{fqn}.weight": layer.weight.detach().to("meta") for fqn, layer in layers.items()}
    return as_one(unquantized_state(model, layers) | shapes, model)


def write_tensors(writer: Any, model: PreTrainedModel, layers: Mapping[str, Levels], plan: Mapping[str, str]) -> None:
    """Write header and tensors, of which only one is in memory as it will be in the file."""
    arch, found = WRITTEN_AS[type(model).__name__], tensors(model)
    for name, tensor in found.items():
        kind, places = KINDS[plan[name]], gguf_names(name, arch)
        if not places:
            raise UserError(f"--format gguf: llama.cpp has no place for {name}")
        for place in places:
            shape = stored_shape(place, tuple(tensor.shape), len(places))
            nbytes = math.prod(shape) // kind.columns * kind.size
            # As floats, so that the library takes the shape as it is: it knows neither Q2_0 nor Q1_0.
            writer.add_tensor_info(place, list(shape), np.dtype(np.float32), nbytes, raw_dtype=kind.number)
    divisors = rope_divisors(model)
    if divisors is not None:
        writer.add_tensor_info(ROPE_DIVISORS, divisors.shape, np.dtype(np.float32), divisors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in found.items():
        for data in _data(name, tensor, model, layers.get(name), plan[name]):
            writer.write_tensor_data(data)
    if divisors is not None:
        writer.write_tensor_data(divisors)
    writer.close()


def _data(name: str, tensor: Tensor, model: PreTrainedModel, layer: Levels | None, kind: str) -> Iterator[Array]:
    """The bytes of a parameter's pieces, with rows in llama.cpp's order: arrays of any dtype."""
    arch, heads = WRITTEN_AS[type(model).__name__], heads_in(name, model)
    experts, pieces = (len(tensor) if tensor.ndim == 3 else 1), len(gguf_names(name, arch))
    for number in range(pieces):
        if layer is not None and kind in INTEGERS:
            parts = (layer.integers, layer.scales_of(INTEGERS[kind].columns))
            integers, scales = (piece(paired(part, heads), experts, number, pieces) for part in parts)
            yield pack(kind, integers.numpy(), scales.numpy())
            continue
        rows = layer.weight() if layer is not None else tensor.flatten(0, -2) if tensor.ndim == 3 else tensor
        rows = piece(paired(rows, heads), experts, number, pieces)
        yield _floats((rows.detach().float() + above_one(name, arch)).cpu().numpy(), kind)


def _floats(values: Array, kind: str) -> Array:
    if kind == "F16":
        return values.astype(np.float16)
    rounding = {"Q8_0": rounded_q8_0, "Q6_K": rounded_q6_k}.get(kind)
    return values if rounding is None else rounding(values)


def heads_in(name: str, model: PreTrainedModel) -> int | None:
    """How many heads the rows of a weight belong to, whose order GGUF changes; None for other weights."""
    config = model.config
    arch = WRITTEN_AS[type(model).__name__]
    return heads_of(name, arch, config.num_attention_heads, config.num_key_value_heads)


def check(file: Path, model: PreTrainedModel, layers: Mapping[str, Levels]) -> None:
    """Read the file back. Raises CertificateError if a weight of a quantized layer is not exactly the trained one."""
    header = read_header(file)
    for name, layer in layers.items():
        if not torch.equal(read_weight(header, name, heads_in(name, model)).flatten(0, -2), layer.weight()):
            raise CertificateError(f"{name}: differs after reading the GGUF file back")


def check_tokens(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises CertificateError if the tokenizer in the file gives other ids for a probe or a special token."""
    inside = tokens.read(file)
    for text in tokens.probes(tokenizer):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        if inside.encode(text, add_special_tokens=False).ids != expected:
            raise CertificateError(f"{file.name}: the tokenizer in it gives other ids for {text!r}")


def _same_ids(tokenizer: PreTrainedTokenizerBase) -> str:
    """For how many texts `check_tokens` has found the same ids, and which it has left out."""
    tried, all_of_them = len(tokens.probes(tokenizer)), len(tokens.PROBES) + 2 * len(tokenizer.all_special_tokens)
    left_out = "" if tried == all_of_them else "; llama.cpp puts a space in front of the others, or stops at them"
    return f"{tried} of {all_of_them}{left_out}"


@torch.no_grad()
def measured(
    file: Path, model: PreTrainedModel, batches: list[Mapping[str, Tensor]], embedding: EmbeddingType
) -> Agreement:
    """Compare the trained model, without its int8 activations, with the weights in the file.

    Raises CertificateError if they differ by more than embeddings in fp16 explain. Rounded ones are measured only.
    """
    plain = _runnable(model)
    agreement = compare(plain, _filled(plain, file, model), list(_few(batches)) or [_probe(model)])
    if embedding == "f16":
        judge(agreement, KL, "--format gguf")
    return agreement


def _few(batches: list[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    """The first batches that hold about MEASURED tokens."""
    left = MEASURED
    for batch in batches:
        if left <= 0:
            return
        left -= batch["input_ids"].numel()
        yield batch


def _runnable(model: PreTrainedModel) -> PreTrainedModel:
    """The model without quantization and on its own device; `dense_model` is made to be saved, not to run."""
    plain = dense_model(model)
    plain.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    for fqn, buffer in plain.named_buffers():
        if buffer.is_meta:  # it is not saved, as the factor of Gemma's embedding
            owner, _, name = fqn.rpartition(".")
            setattr(plain.get_submodule(owner), name, model.get_buffer(fqn).clone())
    return plain.to(model.device)


def _filled(plain: PreTrainedModel, file: Path, model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `plain` with the weights in the file. The original shares embeddings with the trained model."""
    header, back = read_header(file), copy.deepcopy(plain)
    for name, parameter in back.named_parameters():
        parameter.copy_(read_weight(header, name, heads_in(name, model)))
    return back


def _probe(model: PreTrainedModel) -> dict[str, Tensor]:
    length = min(PROBE, longest_text(model))
    return {"input_ids": (torch.arange(length) * 7919 % model.config.vocab_size).unsqueeze(0)}


@torch.no_grad()
def read_back(file: Path, model: PreTrainedModel, arch: str, kinds: set[str]) -> list[list[str]]:
    """Load the file with transformers and compare logits on a few tokens. Returns rows of a table.

    Raises CertificateError if transformers finds another model than is in the file.
    """
    unknown = sorted(kinds & set(NEW))
    if arch not in READ_BACK or unknown:
        return [["read back by transformers", f"no, it knows no {unknown[0] if unknown else arch}"]]
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False, **told_by_hand(model)
    )
    ours = _filled(_runnable(model), file, model)
    judge(compare(ours, theirs.to(model.device), [_probe(model)]), KL, "--format gguf, read by transformers")
    return [["read back by transformers", "yes, the same logits"]]
