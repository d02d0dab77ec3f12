"""`--format gguf`: one file for llama.cpp, weights and tokenizer.

    ternary layers     TQ2_0 (2.0625 bits a weight) or TQ1_0 (1.6875): blocks of 256 columns with one fp16 scale each;
                       Q8_0 (8.5 bits, codes still exact) where a row is no multiple of 256
    embeddings, head   F16            norms, biases   F32

The weights are written ternary already: TQ2_0's own quantizer, given masters, picks other codes for half of them. A
model with SubLN is llama.cpp's arch `bitnet`, a plain one `llama`, `qwen2` or `qwen3`. `llama` pairs rotary dimensions
(i, i + 1) where transformers pairs (i, i + d/2), so rows of its Q and K change places. llama.cpp rounds activations to
int8 in blocks of 256, not by token: logits are close to the trained ones, not equal.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.dense import refuse_norms, unquantized_state
from wrinklefree.export.views.ternary import Ternary, ternary_layers
from wrinklefree.families.architectures import FAMILIES, head_dim
from wrinklefree.tracking.terminal import short_size

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

BLOCK, SMALL_BLOCK = 256, 32  # of TQ1_0 and TQ2_0; of Q8_0


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
    gguf_type: GgufType = "tq2_0",
) -> list[list[str]]:
    """Write `folder/model.gguf`, read it back, compare codes and scales; lines of a table.

    Raises UserError for what llama.cpp cannot hold, CertificateError where the file is not what was trained.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("--format gguf needs its package: pip install 'wrinklefree[gguf]'") from error
    arch = architecture(model)
    layers = ternary_layers(model, "gguf")
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, arch)
    describe(writer, model, gguf_type)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    kinds = [_add_tensor(writer, name, t, model, layers, gguf_type) for name, t in tensors(model).items()]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(file, model, layers)
    large = sum(kind == "Q8_0" for kind in kinds)
    return [
        ["file", f"{file.name}, {short_size(file.stat().st_size)}"],
        ["architecture", arch],
        ["ternary layers with identical codes", f"{len(layers)} of {len(layers)}"],
        ["of these as Q8_0, rows no multiple of 256", str(large)],
    ]


def architecture(model: PreTrainedModel) -> str:
    """llama.cpp's name. Raises UserError for a model that it has no place for."""
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
    if config.rope_parameters["rope_type"] != "default":
        raise UserError(
            f"--format gguf: rotary positions of type {config.rope_parameters['rope_type']} are not written: "
            f"use --format dense and llama.cpp's own converter"
        )
    return ARCHITECTURES[name]


def describe(writer: Any, model: PreTrainedModel, gguf_type: GgufType) -> None:
    """Sizes and settings of the model."""
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
    """Weights and biases by transformers' names, without trained scales, and without a tied head."""
    layers = quant_layers(model)
    return unquantized_state(model, layers) | {f"{fqn}.weight": layer.weight.detach() for fqn, layer in layers.items()}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor. Raises UserError for one that it does not have."""
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
    """Add one tensor; the type it got."""
    import gguf

    fqn = name.rpartition(".")[0]
    if fqn in layers and name.endswith(".weight"):
        kind = ternary_type(layers[fqn], gguf_type)
        values = rotated(layers[fqn].weight(), name, model).float().cpu().numpy()
        qtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, qtype), raw_dtype=qtype)
        return kind
    kind = "F16" if tensor.ndim > 1 else "F32"
    dtype = np.float16 if kind == "F16" else np.float32
    writer.add_tensor(gguf_name(name), rotated(tensor, name, model).float().cpu().numpy().astype(dtype))
    return kind


def ternary_type(layer: Ternary, gguf_type: GgufType) -> str:
    """The smallest type whose blocks lie within the layer's groups of columns."""
    size = layer.codes.shape[1] // layer.scales.shape[1]
    if size % BLOCK == 0:
        return gguf_type.upper()
    return "Q8_0" if size % SMALL_BLOCK == 0 else "F16"


def rotated(tensor: Tensor, name: str, model: PreTrainedModel) -> Tensor:
    """Rows of Q and K in the order in which llama.cpp's `llama` pairs rotary dimensions; all else as it is."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    part = name.split(".")[-2]
    if ARCHITECTURES[type(model).__name__] != "llama" or part not in heads:
        return tensor
    return tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)


def check(file: Path, model: PreTrainedModel, layers: Mapping[str, Ternary]) -> None:
    """Read the file back: every code the same, every scale to fp16. Raises CertificateError."""
    import gguf

    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for fqn, layer in layers.items():
        found = stored[gguf_name(f"{fqn}.weight")]
        values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
        expected = rotated(layer.weight(), f"{fqn}.weight", model).cpu()
        if not torch.equal(values.sign(), expected.sign()) or not torch.allclose(values, expected, rtol=1e-3, atol=0):
            raise CertificateError(f"{fqn}: differs after reading the GGUF file back")


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """A byte-level BPE tokenizer. Raises UserError for another kind."""
    import gguf

    pieces = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(pieces))
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    special = {entry["id"] for entry in pieces["added_tokens"] if entry["special"]}
    added = {entry["id"] for entry in pieces["added_tokens"]} - special
    kinds = {**dict.fromkeys(special, gguf.TokenType.CONTROL), **dict.fromkeys(added, gguf.TokenType.USER_DEFINED)}
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(
        [kinds.get(i, gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED) for i in range(vocab_size)]
    )
    merges = pieces["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if ids[kind] is not None:
            add(ids[kind])
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(pieces: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut before BPE. Raises UserError for a way that it may not know."""
    model, before = pieces["model"], pieces["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            return "llama-bpe" if r"\p{N}{1,3}" in steps[0]["pattern"]["Regex"] else "qwen2"
    raise UserError(
        f"--format gguf: tokenizers of kind {model['type']} with {kinds} are not written, only byte-level BPE as of "
        f"GPT-2, SmolLM, Qwen2 and Llama 3: use --format dense and llama.cpp's own converter"
    )
