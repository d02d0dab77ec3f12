"""`--format gguf`: one file for llama.cpp, with weights and tokenizer.

| tensor | type | bits per weight |
|---|---|---|
| ternary layers | TQ2_0 or TQ1_0: blocks of 256 columns, each with an fp16 scale | 2.0625 or 1.6875 |
| the same, if rows or groups are no multiple of 256 | Q8_0: codes are still exact | 8.5 |
| embeddings, head | F16 | 16 |
| norms, biases | F32 | 32 |

A model with SubLN becomes llama.cpp's arch `bitnet`; others become `llama`, `qwen2` or `qwen3`. Logits are close to
the trained ones, not equal: llama.cpp rounds activations to int8 in blocks of 256, not per token.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.export.gguf import tokens
from wrinklefree.export.proof.agreement import compare, judge
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.dense import dense_model, refuse_norms, unquantized_state
from wrinklefree.export.views.settings import refuse_settings
from wrinklefree.export.views.ternary import Ternary, ternary_layers
from wrinklefree.families.architectures import FAMILIES, head_dim
from wrinklefree.tracking.terminal import short_size

NEEDS = "gguf"
NEXT = "llama-cli -m {target}/model.gguf -p 'def '"
OPTIONS = {
    "gguf_type": {
        "choices": ["tq2_0", "tq1_0"],
        "help": "GGUF: ternary layers at 2.06 (tq2_0, the default) or 1.69 bits a weight.",
    }
}

GgufType = Literal["tq2_0", "tq1_0"]

ARCHITECTURES = {family.causal_lm: family.gguf for family in FAMILIES if family.gguf is not None}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# Classes whose biases are a setting, and llama.cpp's architecture has a place for them.
BIASES = {"LlamaForCausalLM": ("attention_bias", "mlp_bias"), "BitNetForCausalLM": ("attention_bias",)}

# Architectures that transformers reads from GGUF files.
READ_BACK = ("llama", "qwen2", "qwen3")
KL = 1e-3  # nats allowed for scales and embeddings in fp16
PROBE = 64  # token ids whose logits are compared

BLOCK, SMALL_BLOCK = 256, 32  # columns per block in TQ1_0 and TQ2_0, and in Q8_0


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
    gguf_type: GgufType = "tq2_0",
) -> list[list[str]]:
    """Write `folder/model.gguf`, read it back, compare codes, scales, token ids and logits. Returns rows of a table.

    Raises UserError if llama.cpp cannot hold the model, CertificateError if the file is not the trained model.
    """
    import gguf

    arch = architecture(model)
    layers = ternary_layers(model, "gguf")
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, arch)
    describe(writer, model, gguf_type)
    tokens.add(writer, tokenizer, model.config.vocab_size)
    kinds = [_add_tensor(writer, name, t, model, layers, gguf_type) for name, t in tensors(model).items()]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(file, model, layers)
    tokens.check(file, tokenizer)
    read = read_back(file, model, arch)
    large = sum(kind == "Q8_0" for kind in kinds)
    return [
        ["file", f"{file.name}, {short_size(file.stat().st_size)}"],
        ["architecture", arch],
        ["ternary layers with identical codes", f"{len(layers)} of {len(layers)}"],
        ["of these as Q8_0, rows no multiple of 256", str(large)],
        ["texts with the same token ids", f"{len(tokens.PROBES)} of {len(tokens.PROBES)}"],
        *read,
    ]


def architecture(model: PreTrainedModel) -> str:
    """Return llama.cpp's name for the model's architecture. Raises UserError if it has no place for the model."""
    refuse_norms(model, "gguf")
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        raise UserError(f"--format gguf: {name} is none of {', '.join(ARCHITECTURES)}: use --format dense or hf")
    if name == "BitNetForCausalLM" and not config.tie_word_embeddings:
        raise UserError(
            "--format gguf: llama.cpp's bitnet takes its output matrix from the embeddings, and this model has one of "
            "its own: train with method.norm_mode=none, or use --format bitnet"
        )
    if config.hidden_act != "silu":
        raise UserError(f"--format gguf: activation {config.hidden_act}; llama.cpp's {ARCHITECTURES[name]} has silu")
    refuse_settings(model, "gguf", BIASES.get(name, ()))
    if config.rope_parameters["rope_type"] != "default":
        raise UserError(
            f"--format gguf: rotary positions of type {config.rope_parameters['rope_type']} are not written: "
            f"use --format dense and llama.cpp's own converter"
        )
    return ARCHITECTURES[name]


def describe(writer: Any, model: PreTrainedModel, gguf_type: GgufType) -> None:
    """Write the model's sizes and settings into the file's metadata."""
    import gguf

    c = model.config
    writer.add_name(f"{type(model).__name__} by wrinklefree")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{gguf_type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    width = head_dim(c.to_dict())
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return weights and biases under transformers' names, without trained scales and without a tied head."""
    layers = quant_layers(model)
    return unquantized_state(model, layers) | {f"{fqn}.weight": layer.weight.detach() for fqn, layer in layers.items()}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name for a tensor. Raises UserError if it has none."""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    number, _, part = module.removeprefix("model.layers.").partition(".")
    if part not in NAMES:
        raise UserError(f"--format gguf: llama.cpp has no place for {name}")
    return f"blk.{number}.{NAMES[part]}.{kind}"


def _add_tensor(
    writer: Any, name: str, tensor: Tensor, model: PreTrainedModel, layers: Mapping[str, Ternary], gguf_type: GgufType
) -> str:
    """Add one tensor to the file. Returns its type."""
    import gguf

    fqn = name.rpartition(".")[0]
    if fqn in layers and name.endswith(".weight"):
        kind = ternary_type(layers[fqn], gguf_type)
        # Ternary already: from masters, TQ2_0's own quantizer would pick other codes for half of them.
        values = rotated(layers[fqn].weight(), name, model).float().cpu().numpy()
        qtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, qtype), raw_dtype=qtype)
        return kind
    kind = "F16" if tensor.ndim > 1 else "F32"
    dtype = np.float16 if kind == "F16" else np.float32
    writer.add_tensor(gguf_name(name), rotated(tensor, name, model).float().cpu().numpy().astype(dtype))
    return kind


def ternary_type(layer: Ternary, gguf_type: GgufType) -> str:
    """Return the smallest type whose blocks lie within the layer's groups of columns."""
    size = layer.codes.shape[1] // layer.scales.shape[1]
    if size % BLOCK == 0:
        return gguf_type.upper()
    return "Q8_0" if size % SMALL_BLOCK == 0 else "F16"


def rotated(tensor: Tensor, name: str, model: PreTrainedModel) -> Tensor:
    """Return Q and K of a `llama` with their rows in llama.cpp's order, and any other tensor unchanged."""
    # llama.cpp's `llama` pairs the rotary dimensions (i, i + 1), transformers pairs (i, i + d/2).
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    part = name.split(".")[-2]
    if ARCHITECTURES[type(model).__name__] != "llama" or part not in heads:
        return tensor
    return tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)


def check(file: Path, model: PreTrainedModel, layers: Mapping[str, Ternary]) -> None:
    """Read the file back. Raises CertificateError if a code differs, or a scale by more than fp16 rounds."""
    import gguf

    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for fqn, layer in layers.items():
        found = stored[gguf_name(f"{fqn}.weight")]
        values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
        expected = rotated(layer.weight(), f"{fqn}.weight", model).cpu()
        if not torch.equal(values.sign(), expected.sign()) or not torch.allclose(values, expected, rtol=1e-3, atol=0):
            raise CertificateError(f"{fqn}: differs after reading the GGUF file back")


@torch.no_grad()
def read_back(file: Path, model: PreTrainedModel, arch: str) -> list[list[str]]:
    """Load the file with transformers and compare logits. Returns rows of a table.

    Raises CertificateError if the file is another model than the trained one without its int8 activations.
    """
    if arch not in READ_BACK:
        return [["read back by transformers", f"no, it knows no {arch}"]]
    # transformers does not read the width of a qwen3's heads.
    width = {name: value for name, value in model.config.to_dict().items() if name == "head_dim"}
    back = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False, **width
    )
    length = min(PROBE, model.config.max_position_embeddings)
    ids = (torch.arange(length) * 7919 % model.config.vocab_size).unsqueeze(0)
    plain = dense_model(model)
    plain.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # `dense_model` is made to be saved, not to run
    agreement = compare(plain, back.to(model.device), [{"input_ids": ids}])
    judge(agreement, KL, "--format gguf")
    return [["read back by transformers", "yes"], *agreement.rows()]
