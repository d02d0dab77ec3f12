"""Exports for other programs: what each target holds, that it is what was trained, and what is refused and why."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ggufs import OTHERS, other
from safetensors.torch import load_file
from tiny import family, ids, llama, qwen, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from toyrun import overrides, toy_files
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.commands import export as export_command
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.export.flags import formats
from wrinklefree.export.formats import bitnet, compressed_tensors, dense
from wrinklefree.export.formats import gguf as gguf_export
from wrinklefree.export.proof.agreement import Agreement
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.levels import Levels
from wrinklefree.export.views.settings import refuse_settings
from wrinklefree.export.views.ternary import ternary_layers
from wrinklefree.generate.open import open_model
from wrinklefree.gguf import tokens
from wrinklefree.gguf.header import read_header
from wrinklefree.gguf.names import gguf_names, heads_of
from wrinklefree.gguf.values import read_weight
from wrinklefree.methods import fairy2, uniform
from wrinklefree.methods.bitdistill import Config
from wrinklefree.packed.products.choose import exactly

BATCHES = [{"input_ids": ids(4, 32)}]
WORDS = tokenizer()


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the toy models' vocabulary would not fit: one of its own."""
    return train_tokenizer(["def f(x):\n    return x + 1\n" * 20], vocab_size=262)


def prepared(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """A ternary model with weights that have moved since it was prepared."""
    model = Config(**settings).prepare(model, BATCHES)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in quant_layers(model).values():
            layer.weight += 0.01 * torch.randn(layer.weight.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(ids(4, 32)).logits
    return result


def open_plainly(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- dense


def test_dense_is_the_effective_weights_in_a_plain_model(tmp_path: Path) -> None:
    model = prepared(llama(), norm_mode="none", activation_bits=None)
    dense.write(model, WORDS, tmp_path, BATCHES)
    plain = open_plainly(tmp_path)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    weight = plain.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, quant_layers(model)["model.layers.0.mlp.up_proj"].effective_weight(torch.float32))
    torch.testing.assert_close(logits(plain), logits(model))


def test_dense_holds_other_methods_too(tmp_path: Path) -> None:
    model = fairy2.Config(num_stages=1).prepare(qwen())
    dense.write(model.eval(), WORDS, tmp_path, BATCHES)
    torch.testing.assert_close(logits(open_plainly(tmp_path)), logits(model))


def test_dense_of_a_subln_model_is_a_bitnet_class(tmp_path: Path) -> None:
    dense.write(prepared(llama()), WORDS, tmp_path, BATCHES)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "bitnet"
    assert "quantization_config" not in config


# --- bitnet


@pytest.mark.parametrize(
    "settings", [{}, {"norm_mode": "none"}, {"norm_mode": "per_linear"}, {"scale_mode": "learned"}]
)
def test_transformers_bitnet_gives_the_trained_logits(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = prepared(llama(), **settings)
    bitnet.write(model, WORDS, tmp_path, BATCHES)
    back = open_plainly(tmp_path)
    with torch.compiler.set_stance("force_eager"):
        difference = (logits(back) - logits(model)).abs().max() / logits(model).abs().max()
    assert difference < 1e-5
    assert back.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8  # packed in memory as well
    if settings.get("norm_mode") is None:
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bitnet"


def test_biases_survive_in_bitnet(tmp_path: Path) -> None:
    model = prepared(qwen(intermediate_size=80), norm_mode="none")
    bitnet.write(model, WORDS, tmp_path, BATCHES)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(logits(open_plainly(tmp_path)), logits(model), atol=1e-4, rtol=1e-4)


def test_four_codes_a_byte() -> None:
    codes = torch.randint(-1, 2, (8, 5), dtype=torch.int8)
    packed = bitnet.pack(codes)
    assert packed.shape == (2, 5)
    assert torch.equal(bitnet.unpack(packed), codes)
    assert ((packed[1] >> 2) & 3).tolist() == (codes[3] + 1).tolist()  # row 1, second pair of bits: row 1 + 8 / 4


def test_a_wrong_scale_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other convention, multiplying by the scale, loads without a word; the comparison does not let it pass."""
    right = bitnet.one_scale
    monkeypatch.setattr(bitnet, "one_scale", lambda *args: 1 / right(*args))
    with pytest.raises(CertificateError, match="KL to the trained model"):
        bitnet.write(prepared(llama()), WORDS, tmp_path, BATCHES)


# --- compressed-tensors


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_compressed_tensors_opens_in_plain_transformers(tmp_path: Path, granularity: str) -> None:
    model = prepared(llama(), norm_mode="none", granularity=granularity, group_size=32, activation_bits=None)
    compressed_tensors.write(model, WORDS, tmp_path, BATCHES)
    torch.testing.assert_close(logits(open_plainly(tmp_path)), logits(model), atol=1e-5, rtol=1e-4)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.5 * sum(p.numel() * 4 for p in model.parameters())
    # vLLM makes room for [out, groups] scales, and takes no strategy but these two.
    fqn, layer = next(iter(quant_layers(model).items()))
    scales = load_file(tmp_path / "model.safetensors")[f"{fqn}.weight_scale"]
    assert scales.shape == (layer.out_features, layer.in_features // 32 if granularity == "group" else 1)
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["strategy"] == ("group" if granularity == "group" else "channel")


def test_compressed_tensors_holds_rows_of_one_group_beside_rows_of_several(tmp_path: Path) -> None:
    """Three groups of 32 columns in `down_proj`, whose inputs are 96 wide here, and one of 32 everywhere else."""
    model = prepared(llama(hidden_size=32), norm_mode="none", granularity="group", group_size=32, activation_bits=None)
    compressed_tensors.write(model, WORDS, tmp_path, BATCHES)
    torch.testing.assert_close(logits(open_plainly(tmp_path)), logits(model), atol=1e-5, rtol=1e-4)


def test_compressed_tensors_states_int8_activations(tmp_path: Path) -> None:
    compressed_tensors.write(prepared(llama(), norm_mode="none"), WORDS, tmp_path, BATCHES)
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == 2
    assert group["input_activations"]["strategy"] == "token"


# --- GGUF


def stored_tensors(file: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


def field(file: Path, name: str) -> Any:
    return gguf.GGUFReader(file).get_field(name).contents()


WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 262}


@pytest.mark.parametrize("gguf_type", ["tq2_0", "tq1_0"])
def test_ternary_codes_are_exact_in_gguf(tmp_path: Path, gguf_type: Any) -> None:
    model = prepared(llama(**WIDE), scale_mode="learned")
    gguf_export.write(model, bytes_tokenizer(), tmp_path, [], gguf_type)
    stored = stored_tensors(tmp_path / "model.gguf")
    down = stored["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == gguf_type.upper()
    values = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    trained = ternary_layers(model, "gguf")["model.layers.1.mlp.down_proj"]
    assert torch.equal(values.sign(), trained.codes.float())
    torch.testing.assert_close(values, trained.weight(), rtol=1e-3, atol=0)
    assert field(tmp_path / "model.gguf", "general.architecture") == "bitnet"
    assert {"blk.0.attn_sub_norm.weight", "blk.0.ffn_sub_norm.weight", "token_embd.weight"} <= stored.keys()
    assert "output.weight" not in stored


def test_a_layer_that_does_not_fit_the_type_gets_one_that_every_llama_cpp_has(tmp_path: Path) -> None:
    model = prepared(llama(**(WIDE | {"hidden_size": 64})), norm_mode="none")
    gguf_export.write(model, bytes_tokenizer(), tmp_path, [], "tq2_0")
    stored = stored_tensors(tmp_path / "model.gguf")
    assert stored["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == "TQ2_0"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: prepared(llama(**WIDE), norm_mode="none"), "TQ1_0"),
        (lambda: prepared(llama(**WIDE), norm_mode="none", granularity="group", group_size=128), "Q2_0"),
        (lambda: prepared(llama(**WIDE), norm_mode="none", granularity="group", group_size=64), "Q2_0"),
        (lambda: prepared(llama(**WIDE), norm_mode="none", granularity="group", group_size=32), "Q4_0"),
        (lambda: prepared(llama(**WIDE), norm_mode="none", granularity="group", group_size=16), "F16"),
        (lambda: uniform.Config(bits=4, granularity="group").prepare(llama(**WIDE)), "Q4_0"),
        (lambda: uniform.Config(bits=8).prepare(llama(**WIDE)), "Q8_0"),
    ],
)
def test_the_smallest_type_holds_every_layer_bit_for_bit(
    tmp_path: Path, make: Callable[[], PreTrainedModel], kind: str
) -> None:
    model = make().eval()
    gguf_export.write(model, bytes_tokenizer(), tmp_path, BATCHES)
    header = read_header(tmp_path / "model.gguf")
    for fqn, layer in quant_layers(model).items():
        name = f"{fqn}.weight"
        assert header.tensors[gguf_names(name, "llama")[0]].kind == kind
        heads = heads_of(name, "llama", model.config.num_attention_heads, model.config.num_key_value_heads)
        assert torch.equal(read_weight(header, name, heads), layer.effective_weight(torch.float32))


def test_one_bit_a_weight_is_q1_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method without a form, whose weights are one magnitude per row with a sign."""
    model = prepared(llama(**WIDE), norm_mode="none")
    layers = {f"{fqn}.weight": layer for fqn, layer in quant_layers(model).items()}
    signs = {name: torch.where(layer.weight > 0, 0.5, -0.5) for name, layer in layers.items()}
    found = {name: Levels(sign.sign().to(torch.int8), torch.full((len(sign), 1), 0.5)) for name, sign in signs.items()}
    assert {gguf_export.layer_kind(layer, "auto") for layer in found.values()} == {"Q1_0"}
    up = "model.layers.1.mlp.up_proj.weight"
    with_zero = Levels(found[up].integers.clone(), torch.ones(512, 1))
    with_zero.integers[3, 5] = 0
    assert gguf_export.layer_kind(with_zero, "q1_0") == "Q4_0"
    monkeypatch.setattr(gguf_export, "levels", lambda model: found)
    monkeypatch.setattr(gguf_export, "measured", lambda *args: Agreement(0, 0.0, 0.0, 1.0))
    gguf_export.write(model, bytes_tokenizer(), tmp_path, [])
    header = read_header(tmp_path / "model.gguf")
    assert torch.equal(read_weight(header, up), signs[up])


@pytest.mark.parametrize(("kind", "error"), [("q8_0", 0.01), ("q6_k", 0.05)])
def test_embeddings_are_rounded_on_request_and_the_loss_is_measured(tmp_path: Path, kind: Any, error: float) -> None:
    model = prepared(llama(**WIDE), norm_mode="none")
    table = dict(gguf_export.write(model, bytes_tokenizer(), tmp_path, BATCHES, "auto", kind))
    stored = stored_tensors(tmp_path / "model.gguf")["token_embd.weight"]
    assert stored.tensor_type.name == kind.upper() == table["embeddings and head"]
    values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    trained = model.model.embed_tokens.weight.detach()
    assert 0 < (values - trained).norm() / trained.norm() < error
    assert float(table["KL(trained, exported), nats"]) > 0


def test_blocks_that_do_not_fill_the_rows_of_the_embedding_are_refused(tmp_path: Path) -> None:
    model = prepared(llama(**(WIDE | {"hidden_size": 64})), norm_mode="none")
    with pytest.raises(
        UserError, match="--gguf-embedding q6_k: has blocks of 256 columns, the embedding has 64: use q8_0"
    ):
        gguf_export.write(model, bytes_tokenizer(), tmp_path, [], "auto", "q6_k")


def test_llama_q_and_k_rows_change_places_and_nothing_else(tmp_path: Path) -> None:
    """Row 2 i + j of a head in the file is row i + j d / 2 of the trained one."""
    model = prepared(llama(**WIDE), norm_mode="none")
    gguf_export.write(model, bytes_tokenizer(), tmp_path, [])
    stored, layers = stored_tensors(tmp_path / "model.gguf"), ternary_layers(model, "gguf")
    for part, name in (("attn_q", "self_attn.q_proj"), ("attn_v", "self_attn.v_proj")):
        found = stored[f"blk.0.{part}.weight"]
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        trained = layers[f"model.layers.0.{name}"].weight().numpy()
        row = trained[64 + 32 + 1] if part == "attn_q" else trained[64 + 3]  # head 1 of width 64, i = 1, j = 1
        np.testing.assert_allclose(values[64 + 3], row, rtol=1e-3)


def test_qwen_has_its_own_architecture_with_biases_and_norms(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Qwen3Config(**sizes, num_key_value_heads=2, head_dim=64, vocab_size=262, max_position_embeddings=64)
    for number, (model, arch, extra) in enumerate(
        (
            (qwen(**sizes, vocab_size=262), "qwen2", "blk.0.attn_q.bias"),
            (Qwen3ForCausalLM(config).eval(), "qwen3", "blk.0.attn_q_norm.weight"),
        )
    ):
        out = tmp_path / str(number)
        out.mkdir()
        gguf_export.write(prepared(model, norm_mode="none"), bytes_tokenizer(), out, [])
        assert field(out / "model.gguf", "general.architecture") == arch
        assert {extra, "output.weight"} <= stored_tensors(out / "model.gguf").keys()


READ_BY_TRANSFORMERS = ("llama 3", "mistral", "phi3", "gemma2", "gemma3", "starcoder2", "qwen2moe", "qwen3moe")
HALF_ROTATED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_written_and_read_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers, where it knows the architecture, and by `-m FILE.gguf`, with the logits of the trained model."""
    *_, arch, tensor = OTHERS[name]
    model, file = prepared(sharp(other(name)), norm_mode="none", activation_bits=None), tmp_path / "model.gguf"
    rows = dict(gguf_export.write(model, bytes_tokenizer(), tmp_path, [], "tq1_0"))
    assert field(file, "general.architecture") == arch
    assert tensor in stored_tensors(file)
    assert rows["read back by transformers"].startswith("yes" if name in READ_BY_TRANSFORMERS else "no")
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(tmp_path / "cache"))
    back, _ = open_model(str(file))
    tokens = (torch.arange(40) * 37 % 262).unsqueeze(0)
    with torch.no_grad(), exactly(back):
        expected, found = (m(tokens).logits.double().log_softmax(-1) for m in (model, back))
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-4  # embeddings in bf16


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    """With weights so large that tokens matter: a wrong order of rows or a missing window shows."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
    return model


@pytest.mark.parametrize("make", [lambda: family("qwen2_moe"), lambda: family("mixtral"), lambda: family("gpt2")])
def test_a_dense_folder_has_experts_and_turned_weights_as_the_model_has_them(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = prepared(make(), norm_mode="none", activation_bits=None)
    rows = dict(dense.write(model, WORDS, tmp_path, BATCHES))
    assert float(rows["KL(trained, exported), nats"]) < 1e-6


@pytest.mark.parametrize("name", ["mistral", "phi3", "starcoder2", "qwen3moe"])
def test_a_file_says_no_longer_context_than_a_window_of_all_layers(name: str, tmp_path: Path) -> None:
    """llama.cpp has no window in these architectures."""
    model = other(name, sliding_window=40, **({"use_sliding_window": True} if name == "qwen3moe" else {}))
    gguf_export.write(prepared(model, norm_mode="none"), bytes_tokenizer(), tmp_path, [], "tq1_0")
    assert field(tmp_path / "model.gguf", f"{OTHERS[name][3]}.context_length") == 40


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 31}, "query_pre_attn_scalar is 31"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1] * 7}, "no_rope_layers"),
        ("phi3", {"rope_parameters": HALF_ROTATED}, "partial_rotary_factor"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("qwen3moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ],
)
def test_what_an_architecture_takes_for_granted_is_compared(
    name: str, changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        gguf_export.write(prepared(other(name, **changed), norm_mode="none"), bytes_tokenizer(), tmp_path, [])


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    words = bytes_tokenizer()
    gguf_export.write(prepared(llama(**WIDE)), words, tmp_path, [])
    file = tmp_path / "model.gguf"
    assert field(file, "tokenizer.ggml.tokens") == [words.convert_ids_to_tokens(i) for i in range(262)]
    assert field(file, "tokenizer.ggml.eos_token_id") == words.eos_token_id
    assert field(file, "tokenizer.ggml.pre") == "gpt-2"
    assert field(file, "tokenizer.chat_template") == words.chat_template
    assert field(file, "tokenizer.ggml.token_type")[words.eos_token_id] == gguf.TokenType.CONTROL


# --- refusals

HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def windowed() -> PreTrainedModel:
    return qwen(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1)


def windowed_wide() -> PreTrainedModel:
    """Sharp attention, so that a window of 8 tokens shows."""
    return qwen(**WIDE, use_sliding_window=True, sliding_window=8, max_window_layers=0, initializer_range=0.5)


def with_setting(model: PreTrainedModel, **values: Any) -> PreTrainedModel:
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], Any, str]] = {
    "complex codes": (lambda: fairy2.Config().prepare(llama()), bitnet, "q_proj is not ternary (fairy2)"),
    "complex codes, gguf": (
        lambda: fairy2.Config().prepare(llama()),
        gguf_export,
        "is not integers times fp16 scales (fairy2)",
    ),
    "scales by row": (lambda: prepared(llama(), norm_mode="none", granularity="row"), bitnet, "has 64 scales"),
    "no int8 activations": (lambda: prepared(llama(), activation_bits=None), bitnet, "always rounds them"),
    "SubLN inside": (lambda: prepared(qwen(intermediate_size=80)), bitnet, "method.norm_mode=per_linear"),
    "rows no multiple of 4": (lambda: prepared(qwen(), norm_mode="none"), bitnet, "77 rows, no multiple of 4"),
    "norms in a dense model": (lambda: prepared(qwen()), dense, "has a norm inside"),
    "norms in gguf": (lambda: prepared(llama(), norm_mode="per_linear"), gguf_export, "has a norm inside"),
    "an untied head": (lambda: prepared(llama(tie_word_embeddings=False)), gguf_export, "output matrix from the embed"),
    "another activation": (lambda: prepared(llama(hidden_act="relu2")), gguf_export, "activation relu2"),
    "SubLN in vLLM": (lambda: prepared(llama()), compressed_tensors, "no class with SubLN"),
    "a window": (
        lambda: prepared(windowed(), norm_mode="none"),
        gguf_export,
        "layer_types (attention in a sliding window",
    ),
    "a scaled embedding": (
        lambda: prepared(with_setting(llama(), embedding_multiplier=12.0), norm_mode="none"),
        gguf_export,
        "setting embedding_multiplier (12.0)",
    ),
    "a capped head": (
        lambda: prepared(with_setting(qwen(), final_logit_softcapping=30.0), norm_mode="none"),
        gguf_export,
        "setting final_logit_softcapping (30.0)",
    ),
    "half the positions": (
        lambda: prepared(llama(rope_parameters=HALF_ROPE), norm_mode="none"),
        gguf_export,
        "setting rope_parameters.partial_rotary_factor (0.5)",
    ),
    "experts in vLLM": (
        lambda: prepared(family("mixtral"), norm_mode="none"),
        compressed_tensors,
        "under other names than vLLM reads",
    ),
    "words in gguf": (lambda: prepared(llama()), gguf_export, "only byte-level BPE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_cannot_hold_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    make, target, reason = REFUSED[case]
    with pytest.raises(UserError) as refused:
        target.write(make(), WORDS, tmp_path, BATCHES)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_notes_in_a_config_change_no_logit_and_unknown_settings_are_refused() -> None:
    """What real folders carry beside the settings of their model."""
    model = llama()
    notes = {"_model_name_or_path": "Some 135M", "unk_token_id": 0, "rope_interleaved": False, "is_llama_config": True}
    for name, value in {**notes, "transformers.js_config": {"dtype": "q4"}}.items():
        setattr(model.config, name, value)
    refuse_settings(model, "gguf", ())
    model.config.logit_scale = 0.5
    with pytest.raises(UserError, match="the model's setting logit_scale"):
        refuse_settings(model, "gguf", ())


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
    ],
)
def test_the_way_text_is_cut_is_recognized(steps: list[Any], name: str) -> None:
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    inner.decoder = decoders.ByteLevel()
    assert tokens.cut_of(json.loads(inner.to_str())) == name


SMOLLM = {"type": "Sequence", "pretokenizers": tokens.CUTS["smollm"]}
LLAMA3_SPLIT = tokens.CUTS["llama-bpe"][0]


def mutated(change: Callable[[dict[str, Any]], object]) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with one part of its tokenizer.json changed."""
    words = bytes_tokenizer()
    pieces = json.loads(words.backend_tokenizer.to_str())
    change(pieces)
    same = {"bos_token": words.bos_token, "eos_token": words.eos_token, "pad_token": words.pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(pieces)), **same)


def cut(*steps: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    trimmed = [step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {}) for step in steps]
    return lambda pieces: pieces.update(pre_tokenizer={"type": "Sequence", "pretokenizers": trimmed})


UNKNOWN_PARTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a regex of the same shape": (
        cut(LLAMA3_SPLIT | {"pattern": {"Regex": tokens.SPLIT % "{1,3}" + r"|\d"}}, tokens.CUTS["qwen2"][1]),
        "pre_tokenizer",
    ),
    "merged pieces": (cut(LLAMA3_SPLIT | {"behavior": "Removed"}, tokens.CUTS["qwen2"][1]), "pre_tokenizer"),
    "a space put first": (cut(tokens.CUTS["gpt-2"][0] | {"add_prefix_space": True}), "pre_tokenizer"),
    "digits in threes": (cut({"type": "Digits", "individual_digits": False}, tokens.CUTS["gpt-2"][0]), "pre_tokenizer"),
    "lower case": (lambda p: p.update(normalizer={"type": "Lowercase"}), "normalizer"),
    "NFC, which GPT-2 has not": (lambda p: p.update(normalizer={"type": "NFC"}), "normalizer"),
    "whole words first": (lambda p: p["model"].update(ignore_merges=True), "model.ignore_merges"),
    "an ending": (lambda p: p["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
    "byte fallback": (lambda p: p["model"].update(byte_fallback=True), "model.byte_fallback"),
    "a greedy token": (lambda p: p["added_tokens"][0].update(lstrip=True), "added token"),
    "an unknown token": (lambda p: (p["model"]["vocab"].pop("Ã"), p["model"].update(unk_token="a")), "model.unk_token"),
    "another decoder": (lambda p: p.update(decoder=None), "decoder"),
}


@pytest.mark.parametrize("case", UNKNOWN_PARTS)
def test_a_part_of_a_tokenizer_that_llama_cpp_does_not_know_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, name = UNKNOWN_PARTS[case]
    with pytest.raises(UserError) as refused:
        gguf_export.write(prepared(llama(**WIDE)), mutated(change), tmp_path, [])
    assert f"the tokenizer's {name}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", tokens.CUTS)
def test_the_tokenizer_in_the_file_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    def change(pieces: dict[str, Any]) -> None:
        cut(*tokens.CUTS[name])(pieces)
        pieces["model"]["ignore_merges"] = name in tokens.WHOLE_WORDS

    words = mutated(change)
    gguf_export.write(prepared(llama(**WIDE), norm_mode="none"), words, tmp_path, [])
    assert field(tmp_path / "model.gguf", "tokenizer.ggml.pre") == name
    found = tokens.read(tmp_path / "model.gguf")
    for text in (*tokens.PROBES, f"a{words.eos_token} b"):
        assert found.encode(text).ids == words(text, add_special_tokens=False).input_ids


def test_a_tokenizer_that_differs_in_the_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "cut_of", lambda pieces: "smollm")  # a guess: it has single digits, GPT-2 has not
    words = train_tokenizer(["x = 1234567 + 1234567\n" * 20], vocab_size=280)
    with pytest.raises(CertificateError, match="the tokenizer in it gives other ids for"):
        gguf_export.write(prepared(llama(**(WIDE | {"vocab_size": 280}))), words, tmp_path, [])


def test_a_file_that_transformers_reads_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "refuse_model", lambda *args: None)
    model = prepared(windowed_wide(), norm_mode="none")
    with pytest.raises(CertificateError, match="KL to the trained model"):
        gguf_export.write(model, bytes_tokenizer(), tmp_path, [])


# --- the command


def test_export_writes_each_format_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_files(tmp_path)
    stage = [*overrides(tmp_path, "training.max_steps=1"), "training=stage2_pretrain", "training.start_from=[]"]
    stage = [word for word in stage if word != "training=fairy2_w2"]
    result = CliRunner().invoke(app, ["train", *stage, "training.gradient_accumulation_steps=1"])
    assert result.exit_code == 0, result.output
    for format in ("dense", "bitnet"):
        result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", format])
        assert result.exit_code == 0, result.output
        card = (tmp_path / "run" / format / "README.md").read_text()
        assert f"The export to `{format}` was read back" in card
        assert "same most likely token" in card
        again = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", format])
        assert again.exit_code == 2
    monkeypatch.setattr(export_command, "formats", lambda: {name: formats()[name] for name in ("hf", "dense", "gguf")})
    whole = CliRunner().invoke(
        app, ["export", str(tmp_path / "run"), "--format", "all", "--out", str(tmp_path / "all")]
    )
    assert whole.exit_code == 0, whole.output
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"hf", "dense"}
    assert re.search(r"^hf +[\d,]+ +(yes|KL \S+) +\d+\.\d\d% +wf generate ", whole.output, re.MULTILINE)
    assert re.search(r"^gguf +.*only byte-level BPE", whole.output, re.MULTILINE)
    assert "wrote 2 of 3 formats" in whole.output
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", "gguf"])
    assert refused.exit_code == 2
    assert "only byte-level BPE" in refused.output
    assert not (tmp_path / "run" / "gguf").exists()
