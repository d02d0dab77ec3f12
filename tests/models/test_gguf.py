"""GGUF files as models: what is run and trained from is what the file holds, and broken files are refused in a line."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ggufs import other
from tiny import ids, llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from wrinklefree.config.compose import load_config
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.export.formats import gguf as gguf_export
from wrinklefree.export.views.dense import dense_model
from wrinklefree.generate.open import open_engine, open_model
from wrinklefree.gguf import tokens
from wrinklefree.gguf.header import read_header
from wrinklefree.methods import bitdistill, uniform
from wrinklefree.models.gguf import gguf_folder
from wrinklefree.models.load import load_pretrained
from wrinklefree.packed.pack import packed_layers
from wrinklefree.packed.products.choose import exactly

WORDS = train_tokenizer(["def f(x):\n    return x + 1\n" * 20], vocab_size=262)
WORDS.chat_template = "{{ messages[0].content }}"
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 262, "max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(tmp_path / "cache"))


def ternary(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """Ternary without int8 activations, which a file has no word for."""
    return bitdistill.Config(activation_bits=None, norm_mode="none", **settings).prepare(model).eval()


def qwen3() -> PreTrainedModel:
    """With norms of heads, whose width is not that of the model divided by their number."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return Qwen3ForCausalLM(Qwen3Config(**(WIDE | sizes), tie_word_embeddings=False)).eval()


def experts() -> PreTrainedModel:
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    model = other("qwen3moe", **wide, tie_word_embeddings=False)
    for table in (model.model.embed_tokens, model.lm_head):  # else rounding them chooses other experts
        table.weight.data = table.weight.data.bfloat16().float()
    return model


def file_of(model: PreTrainedModel, folder: Path, *kinds: Any) -> Path:
    folder.mkdir(exist_ok=True)
    gguf_export.write(model, WORDS, folder, [], *kinds)
    return folder / "model.gguf"


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, ...], set[str]]] = {
    "TQ1_0": (lambda: ternary(llama(**WIDE)), ("tq1_0",), {"TQ1_0", "F16", "F32"}),
    "TQ2_0 and Q8_0": (lambda: ternary(llama(**WIDE)), ("tq2_0", "q8_0"), {"TQ2_0", "Q8_0", "F32"}),
    "Q2_0, groups": (
        lambda: ternary(llama(**WIDE), granularity="group", group_size=128),
        ("q2_0",),
        {"Q2_0", "F16", "F32"},
    ),
    "Q4_0": (
        lambda: uniform.Config(bits=4, granularity="group").prepare(llama(**WIDE)).eval(),
        (),
        {"Q4_0", "F16", "F32"},
    ),
    "SubLN": (
        lambda: bitdistill.Config(activation_bits=None).prepare(llama(**WIDE)).eval(),
        ("q2_0",),
        {"Q2_0", "F16", "F32"},
    ),
    "experts": (lambda: ternary(experts()), ("tq2_0",), {"TQ2_0", "F16", "F32"}),
    "Q8_0": (lambda: uniform.Config(bits=8).prepare(qwen3()).eval(), ("auto", "q8_0"), {"Q8_0", "F32"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_runs_with_the_weights_that_were_written(tmp_path: Path, name: str) -> None:
    make, options, kinds = MODELS[name]
    model = make()
    file = file_of(model, tmp_path / "out", *options)
    assert {tensor.kind for tensor in read_header(file).tensors.values()} == kinds
    back, tokenizer = open_model(str(file))
    weights = packed_layers(back)
    for fqn, layer in quant_layers(model).items():
        assert torch.equal(weights[fqn].decoded(), layer.effective_weight(torch.float32)), fqn
    with torch.no_grad(), exactly(back):
        expected, found = model(ids(2, 16)).logits, back(ids(2, 16)).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # embeddings in bf16, or as Q8_0
    text = "def f(x): return 12\n"
    assert tokenizer(text).input_ids == WORDS(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == WORDS.eos_token_id
    assert tokenizer.chat_template == WORDS.chat_template


@pytest.mark.numeric
def test_the_native_loop_runs_the_file_and_says_on_which_kernels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ternary(llama(**WIDE), granularity="group", group_size=64)
    file = file_of(model, tmp_path / "out", "q2_0", "q8_0")
    with caplog.at_level("INFO", logger="wrinklefree"):
        engine, _, said = open_engine(str(file), threads=1)
    assert isinstance(engine, Engine)
    assert "native" in said
    assert "14 Q2_0 (native kernels), 1 Q8_0 (native kernels, as int8 with a scale per row)" in caplog.text
    exact = Engine.from_folder(gguf_folder(file, "packed"), threads=1, mode="exact")
    back, _ = open_model(str(file))
    prompt = ids(1, 8)
    with exactly(back):
        expected = back.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert list(exact.generate(prompt[0].tolist(), Sampling(max_new_tokens=12))) == expected[0, 8:].tolist()


def test_scales_that_are_equal_along_a_row_are_one(tmp_path: Path) -> None:
    by_row = gguf_folder(file_of(ternary(llama(**WIDE), granularity="row"), tmp_path / "row", "q2_0"), "packed")
    grouped = ternary(llama(**WIDE), granularity="group", group_size=128)
    by_group = gguf_folder(file_of(grouped, tmp_path / "group", "q2_0"), "packed")
    name = "model.layers.0.mlp.down_proj"
    for folder, groups in ((by_row, 1), (by_group, 4)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert packed_layers(model)[name].spec.tensors["scales"] == [256, groups]


def test_a_training_starts_from_the_weights_of_a_file(tmp_path: Path) -> None:
    """Exactly: fp16 has all digits of a scale. The folder is written once."""
    model = ternary(llama(**WIDE))
    file = file_of(model, tmp_path / "out")
    loaded, tokenizer = load_pretrained(load_config([f"model={file}", "training=fairy2_w1"]).model)
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    for name, parameter in dense_model(model).named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.half().float()), name
    assert tokenizer("def").input_ids == WORDS("def").input_ids
    folder = gguf_folder(file, "dense")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf_folder(file, "dense") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_other_types_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    """Q5_1, say: the package `gguf` decodes it for both."""
    file = written(tmp_path / "other.gguf", kind="Q5_1")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(gguf_folder(file, "packed"), dtype=torch.float32)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=2**-8, atol=0)
    assert AutoTokenizer.from_pretrained(gguf_folder(file, "packed")).get_vocab() == WORDS.get_vocab()


def written(file: Path, kind: str = "F32", change: Callable[[Any, dict[str, Any]], None] | None = None) -> Path:
    """A small Llama, by the package `gguf`. `change(writer, tensors)` may add settings or change tensors."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens.add(writer, WORDS, 262)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (262, 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64)}
    shapes |= {"blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64)}
    shapes |= {"blk.0.ffn_down": (64, 96)}
    found: dict[str, Any] = {name: draw.standard_normal(size, dtype=np.float32) / 8 for name, size in shapes.items()}
    found |= {name: np.ones(64, dtype=np.float32) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    if change is not None:
        change(writer, found)
    for name, values in found.items():
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(f"{name}.weight", values)
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_small_file_itself_is_read(tmp_path: Path) -> None:
    open_model(str(written(tmp_path / "plain.gguf")))


def _without(name: str) -> Callable[[Any, dict[str, Any]], None]:
    return lambda writer, tensors: tensors.pop(name)


def _with(name: str, shape: tuple[int, ...], value: float = 1.0) -> Callable[[Any, dict[str, Any]], None]:
    return lambda writer, tensors: tensors.update({name: np.full(shape, value, dtype=np.float32)})


def test_names_of_a_cut_that_mean_the_same_are_read(tmp_path: Path) -> None:
    file = written(tmp_path / "x.gguf")
    name = gguf.GGUFReader(file).fields["tokenizer.ggml.pre"]
    assert bytes(name.parts[-1]) == b"gpt-2"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"\x05" + bytes(7) + b"gpt-2", b"\x05" + bytes(7) + b"phi-2"))
    _, tokenizer = open_model(str(file))
    assert tokenizer("def f(x): 12").input_ids == WORDS("def f(x): 12").input_ids


DAMAGED: dict[str, tuple[Callable[[Any, dict[str, Any]], None], str]] = {
    "a tensor is missing": (_without("blk.0.ffn_up"), "blk.0.ffn_up.weight is missing"),
    "no embedding": (_without("token_embd"), "token_embd.weight is missing"),
    "one too many": (_with("blk.0.ffn_gate_inp", (8, 64)), "a llama has no such tensor"),
    "another shape": (_with("blk.0.ffn_up", (95, 64)), "its settings say"),
    "no numbers": (_with("blk.0.attn_norm", (64,), float("nan")), "holds values that are no numbers"),
    "experts": (lambda writer, _: writer.add_expert_count(8), "llama.expert_count=8 is not read here"),
    "scaled positions": (_with("rope_freqs", (8,), 3.0), "scaled rotary positions other than Llama 3's"),
    "positions twice as far": (lambda writer, _: writer.add_rope_scaling_factor(2.0), "rope.scaling.factor=2.0"),
    "another width of heads": (lambda writer, _: writer.add_rope_dimension_count(8), "heads have 16 columns"),
    "a size of nothing": (lambda writer, _: writer.add_key_length(0), "key_length=0 is no size"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_not_the_model_it_says_is_refused(tmp_path: Path, name: str) -> None:
    change, said = DAMAGED[name]
    with pytest.raises(UserError, match=said) as refused:
        open_model(str(written(tmp_path / "x.gguf", change=change)))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("cache/gguf/*"))


def _at(place: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:place] + data + whole[place + len(data) :]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "empty, so no GGUF file"),
    "no magic": (_at(0, b"GGML"), "no GGUF file: it begins with"),
    "another version": (_at(4, struct.pack(">I", 3)), "GGUF version 50331648"),
    "tensors without end": (_at(8, struct.pack("<Q", 2**62)), "entries are due"),
    "settings without end": (_at(16, struct.pack("<Q", 2**31)), "entries are due"),
    "a name without end": (_at(24, struct.pack("<Q", 2**40)), "entries are due"),
    "cut off in the header": (lambda whole: whole[:3000], "are due at"),
    "cut off in the weights": (lambda whole: whole[:-5000], "cut off, or written by"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    change, said = BROKEN[name]
    file = written(tmp_path / "x.gguf")
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=said) as refused:
        open_model(str(file))
    assert "\n" not in str(refused.value)


def test_blocks_of_another_branch_under_the_same_number_are_noticed(tmp_path: Path) -> None:
    """Before mainline had Q2_0 with blocks of 64, a branch used its number 42 for blocks of 128: 34 bytes, not 36."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name in ("a", "b"):
        writer.add_tensor_info(name, [64, 256], np.dtype(np.float32), 64 * 68, raw_dtype=42)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in range(2):
        writer.write_tensor_data(np.zeros(64 * 68, dtype=np.uint8))
    writer.close()
    with pytest.raises(UserError, match="a, Q2_0 in blocks of 64, takes 4,608 bytes, and has 4,352"):
        read_header(tmp_path / "x.gguf")
