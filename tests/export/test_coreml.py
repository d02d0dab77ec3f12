"""The Core ML package: what lies on the disk is what was trained, as far as that shows without macOS."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ids, llama, qwen, tokenizer
from torch import Tensor
from toyrun import overrides, toy_files
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.core.errors import UserError
from wrinklefree.export.formats import coreml
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.lut import Palette, palettes
from wrinklefree.methods import anemll, bitdistill, fairy2

logging.getLogger("coremltools").setLevel(logging.ERROR)  # before its first import, as the command does it
ct = pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder, Function, Program, types  # noqa: E402

from wrinklefree.export.coreml import interpreter, program  # noqa: E402

BATCHES = [{"input_ids": ids(2, 8)}]
WORDS = tokenizer()
WIDE = {"max_position_embeddings": 128}


def small() -> PreTrainedModel:
    """One block, where two show no more."""
    return llama(num_hidden_layers=1)


def qwen3() -> Qwen3ForCausalLM:
    """Grouped heads wider than the hidden size allows, a norm over each, and norms that are not all one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(**shape, num_key_value_heads=2, head_dim=32, vocab_size=96, max_position_embeddings=64)
    return moved_norms(Qwen3ForCausalLM(config).eval())


def moved_norms(model: Any) -> Any:
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def table_model(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """2 bits and rank 1 in the MLP, 4 bits and rank 4 in attention, if not told otherwise."""
    values = {"bits": 2, "rank": 1, "attn_rank": 4, "als_iterations": 1} | settings
    prepared = anemll.Config(**values).prepare(model)
    assert isinstance(prepared, PreTrainedModel)
    return prepared.eval()


def write(model: PreTrainedModel, folder: Path, **settings: Any) -> dict[str, str]:
    return dict(coreml.write(model, WORDS, folder, BATCHES, **settings))


def kl(table: dict[str, str]) -> float:
    return float(table["KL(trained, exported), nats"])


# --- one layer


def one_layer(layer: Palette, folder: Path) -> Any:
    """A package of one layer on [1, in, 1, 5], and its function read back."""
    width = layer.index.shape[1]
    with Function({"x": Builder.placeholder((1, width, 1, 5), dtype=types.fp16)}, opset_version=ct.target.iOS18) as f:
        f.set_outputs([Builder.identity(x=program.palettized(f.inputs["x"], layer, "layer"), name="y")])
    written = Program()
    written.add_function("main", f)
    with coreml._no_progress_bars():
        made = ct.convert(written, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    made.save(str(folder / "one.mlpackage"))
    return coreml.read(folder / "one.mlpackage")["main"]


def filled(size: int) -> int:
    """To a multiple of 64 bytes."""
    return -(-size // 64) * 64


def random_palette(bits: int, rank: int) -> Palette:
    generator = torch.Generator().manual_seed(bits)
    index = torch.randint(0, 2**bits, (24, 40), generator=generator, dtype=torch.uint8)
    lut = torch.linspace(-1, 1, 2**bits).half()
    a, b = (torch.randn(shape, generator=generator).half() for shape in ((24, rank), (rank, 40)))
    return Palette(index, bits, lut, a, b)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_layer_is_one_palettized_convolution_between_two_products(tmp_path: Path, bits: int, rank: int) -> None:
    layer = random_palette(bits, rank)
    function = one_layer(layer, tmp_path)
    operations = {operation.name: operation for operation in function.operations}
    kinds = [operation.op_type for operation in function.operations if operation.op_type != "const"]
    assert kinds[:4] == ["constexpr_lut_to_dense", "mul", "conv", "mul"]
    assert kinds.count("conv") == 1
    assert coreml._same_palette(operations, "layer", layer)
    x = torch.randn(1, 40, 1, 5).half().float()
    y = interpreter.Function(function)({"x": x}, {})["y"]
    torch.testing.assert_close(y[0, :, 0], layer.weight() @ x[0, :, 0], rtol=1e-4, atol=1e-4)
    size = coreml.weights_bytes(tmp_path / "one.mlpackage")
    assert filled(size) == 64 + sum(64 + filled(n) for entries, n in layer.constants() if entries >= 10)
    assert layer.constants()[0] == (24 * 40, 24 * 40 * bits // 8)


def test_a_wrong_code_in_the_package_is_noticed(tmp_path: Path) -> None:
    layer = random_palette(2, 1)
    operations = {operation.name: operation for operation in one_layer(layer, tmp_path).operations}
    layer.index[3, 5] ^= 1
    assert not coreml._same_palette(operations, "layer", layer)


# --- whole models


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, grouped heads": lambda: table_model(moved_norms(llama(num_key_value_heads=2))),
    "llama, 3 bits": lambda: table_model(small(), bits=3, attn_bits=3),
    "llama, frozen codes": lambda: table_model(small(), view="v2"),
    "qwen2, biases and a head of its own": lambda: table_model(qwen()),
    "qwen3, norms over heads": lambda: table_model(qwen3()),
    "a quantized head": lambda: table_model(qwen(), exclude_names=["embed_tokens"]),
    "a layer left out": lambda: table_model(small(), exclude_names=["embed_tokens", "lm_head", "v_proj"]),
    "llama 3's rotary positions": lambda: table_model(
        llama(
            num_hidden_layers=1,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        )
    ),
    "ternary": lambda: bitdistill.Config(norm_mode="none", activation_bits=None).prepare(small()),
    "ternary, scales by row": lambda: bitdistill.Config(
        norm_mode="none", activation_bits=None, granularity="row"
    ).prepare(small()),
    "ternary, SubLN": lambda: bitdistill.Config(activation_bits=None).prepare(small()),
    "ternary, norms inside": lambda: bitdistill.Config(norm_mode="per_linear", activation_bits=None).prepare(small()),
}


QUICK = ("llama, grouped heads", "llama, frozen codes", "qwen2, biases and a head of its own", "ternary, SubLN")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_the_stored_program_gives_the_trained_logits(name: str, tmp_path: Path) -> None:
    table = write(MODELS[name]().eval(), tmp_path)
    assert kl(table) < 1e-7
    assert float(table["KL with all results rounded to fp16, nats"]) < 1e-5
    count, total = re.fullmatch(r"(\d+) of (\d+)", table["layers with identical codes"]).groups()  # type: ignore[union-attr]
    assert count == total
    assert {path.name for path in tmp_path.iterdir()} >= {"model.mlpackage", "tokenizer.json"}
    assert not list(tmp_path.glob("prefill*"))


def test_prefill_and_decode_share_the_cache(tmp_path: Path) -> None:
    """70 ids: one pass of 64, then six of one. A padded pass of 64 leaves the same logits for the ids it has."""
    model = table_model(llama(num_key_value_heads=2, **WIDE))
    write(model, tmp_path)
    program = interpreter.Decoder(coreml.read(tmp_path / "model.mlpackage"))
    x = ids(1, 70)
    with torch.no_grad():
        expected: Tensor = model(x).logits
    torch.testing.assert_close(program(x).logits, expected, rtol=0, atol=1e-3 * expected.abs().max().item())

    states = program.prefill.new_states()
    padded = torch.nn.functional.pad(x[:, :40], (0, 24))
    program.prefill({"input_ids": padded, "position": torch.tensor([0])}, states)
    then = [program.decode({"input_ids": x[:, k : k + 1], "position": torch.tensor([k])}, states) for k in (40, 41)]
    found = torch.cat([step["logits"] for step in then], 1)
    torch.testing.assert_close(found, expected[:, 40:42], rtol=0, atol=1e-3 * expected.abs().max().item())


def test_the_weights_file_is_as_large_as_predicted(tmp_path: Path) -> None:
    """To the byte, and stored once for both functions, where no two tensors are equal."""
    for number, factored in enumerate((8, 0)):
        out = tmp_path / str(number)
        out.mkdir()
        table = write(table_model(moved_norms(llama(**WIDE))), out, factored_rank=factored)
        sizes = re.findall(r"[\d,]+", table["weights, bytes found (predicted)"])
        found, expected = (int(size.replace(",", "")) for size in sizes)
        assert filled(found) == expected
        assert found == coreml.weights_bytes(out / "model.mlpackage")


def test_many_scale_products_are_baked_and_the_table_says_so(tmp_path: Path) -> None:
    model = table_model(llama(), rank=6, attn_rank=1)
    table = write(model, tmp_path, factored_rank=4)
    assert table["layers with identical codes"] == "8 of 14"
    assert table["of these as one convolution, of rank 1"] == "8"
    assert table["layers baked in fp16, above rank 4"] == "6"
    assert kl(table) < 1e-6
    for function in coreml.read(tmp_path / "model.mlpackage").values():
        kinds = [operation.op_type for operation in function.operations]
        assert kinds.count("constexpr_lut_to_dense") == 8
        up = next(o for o in function.operations if o.name == "model_layers_1_mlp_up_proj")
        layer = palettes(model, "coreml")["model.layers.1.mlp.up_proj"]
        assert np.array_equal(up.weight.val[:, :, 0, 0], layer.weight().half().numpy())


def test_activations_trained_in_int8_stay_close(tmp_path: Path) -> None:
    table = write(bitdistill.Config(norm_mode="none").prepare(llama()).eval(), tmp_path)
    assert 0 < kl(table) < 0.05


def test_packages_are_for_ios_18_and_hold_states(tmp_path: Path) -> None:
    write(table_model(llama()), tmp_path)
    spec = ct.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True).get_spec()
    assert spec.specificationVersion == 9
    functions = {function.name: function for function in spec.description.functions}
    assert functions.keys() == {"prefill", "decode"}
    assert spec.description.defaultFunctionName == "decode"
    assert [state.name for state in functions["decode"].state] == ["k_cache", "v_cache"]
    assert [list(i.type.multiArrayType.shape) for i in functions["prefill"].input] == [[1, 64], [1]]


@pytest.mark.slow
def test_a_package_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign error in the rotation, which no code shows; a layer with other codes; a weight stored twice."""
    model = table_model(llama(initializer_range=0.2))  # attention that looks at something
    right = program.rotary_tables
    with monkeypatch.context() as wrong:
        wrong.setattr(program, "rotary_tables", lambda *args: (right(*args)[0], -right(*args)[1]))
        with pytest.raises(CertificateError, match="KL to the trained model"):
            write(model, tmp_path)
    other = palettes(model, "coreml")
    other["model.layers.0.mlp.up_proj"].index[0, 0] ^= 1
    with pytest.raises(CertificateError, match=r"model\.layers\.0\.mlp\.up_proj: codes, table or scales differ"):
        coreml.check_constants(coreml.read(tmp_path / "model.mlpackage"), other, 8)
    monkeypatch.setattr(coreml, "predicted_bytes", lambda *_: 1000)
    (tmp_path / "again").mkdir()
    with pytest.raises(CertificateError, match="stored twice"):
        write(model, tmp_path / "again")


# --- refusals

REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "complex codes": (lambda: fairy2.Config().prepare(llama()), "(fairy2) is not a table times low-rank scales"),
    "scales by group": (
        lambda: bitdistill.Config(norm_mode="none", granularity="group", group_size=32).prepare(llama()),
        "(bitdistill) is not a table",
    ),
    "nothing quantized": (llama, "nothing in this model is quantized"),
    "another activation": (lambda: table_model(llama(hidden_act="relu2")), "activation relu2"),
    "changing positions": (
        lambda: table_model(llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
        "rotary positions of type dynamic",
    ),
    "a sliding window": (
        lambda: table_model(qwen(use_sliding_window=True, sliding_window=8, max_window_layers=0)),
        "sliding window",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_program_cannot_hold_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(UserError) as refused:
        write(make(), tmp_path)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    model = table_model(llama())
    model.__class__ = type("OtherForCausalLM", (type(model),), {})
    with pytest.raises(UserError, match="OtherForCausalLM is none of LlamaForCausalLM"):
        write(model, tmp_path)


# --- the command


def test_the_command_writes_a_package_and_says_what_was_not_run(tmp_path: Path) -> None:
    toy_files(tmp_path)
    stage = [*overrides(tmp_path, "training.max_steps=1"), "training=anemll_q2a4", "method.rank=1"]
    stage = [word for word in stage if word != "training=fairy2_w2"]
    result = CliRunner().invoke(app, ["train", *stage, "training.gradient_accumulation_steps=1"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", "coreml", "--factored-rank", "1"])
    assert result.exit_code == 0, result.output
    assert "no, that takes macOS 15" in result.output
    card = (tmp_path / "run" / "coreml" / "README.md").read_text()
    assert "--format coreml --factored-rank 1" in card
