"""Folders with BitNet's and compressed-tensors' integers: what runs here is what transformers reads in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file
from tiny import ids, llama, qwen
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.export.formats import bitnet, compressed_tensors
from wrinklefree.families.bitnet import state_online
from wrinklefree.generate.open import open_engine, open_model, pretrained_of
from wrinklefree.methods.bitdistill import Config
from wrinklefree.models.integers import in_words, integers_folder
from wrinklefree.packed.pack import packed_layers
from wrinklefree.packed.products.choose import exactly

WORDS = train_tokenizer(["def f(x):\n    return x + 1\n" * 20], vocab_size=262)
SIZES: dict[str, Any] = {"vocab_size": 262, "hidden_size": 64, "intermediate_size": 128}
PROMPT = [5, 9, 77, 12]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(tmp_path / "cache"))


def exported(format: Any, make: Callable[..., PreTrainedModel], **settings: Any) -> Callable[[Path], None]:
    """A ternary model of ours in a format of others."""

    def write(folder: Path) -> None:
        format.write(Config(**settings).prepare(make(**SIZES)).eval(), WORDS, folder, [{"input_ids": ids(1, 16)}])

    return write


def online(folder: Path) -> None:
    """Masters, as BitNet's own training leaves them."""
    model = llama(**SIZES)
    state_online(model, False, 1e-6)
    model.save_pretrained(folder)
    WORDS.save_pretrained(folder)
    edit(folder, modules_to_not_convert=["lm_head"])


def multiplied(folder: Path) -> None:
    """As `bitlinear` writes it, but with scales to multiply by."""
    exported(bitnet, llama, norm_mode="none")(folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {name: 1 / value for name, value in weights.items() if name.endswith("weight_scale")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder, linear_class="autobitlinear")


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def by_library(bits: int, **weights: Any) -> Callable[[Path], None]:
    """Written by the library itself, from weights that it rounds."""

    def write(folder: Path) -> None:
        model = llama(**SIZES)
        scheme = {"num_bits": bits, "type": "int", "symmetric": True, **weights}
        groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
        config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized")
        apply_quantization_config(model, config)
        for layer in (m for m in model.modules() if hasattr(m, "weight_scale")):
            blocks = layer.weight.detach().unflatten(1, (layer.weight_scale.shape[-1], -1))
            layer.weight_scale.data = (blocks.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half().float()
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        WORDS.save_pretrained(folder)

    return write


FOLDERS: dict[str, Callable[[Path], None]] = {
    "bitnet": exported(bitnet, llama, norm_mode="none"),
    "bitnet with SubLN": exported(bitnet, llama),
    "bitnet with a norm in each layer": exported(bitnet, llama, norm_mode="per_linear"),
    "bitnet with biases": exported(bitnet, lambda **s: qwen(**(s | {"intermediate_size": 80})), norm_mode="none"),
    "bitnet, multiplied": multiplied,
    "bitnet, online": online,
    "compressed-tensors, tensor": exported(compressed_tensors, llama, norm_mode="none"),
    "compressed-tensors, rows": exported(compressed_tensors, qwen, norm_mode="none", granularity="row"),
    "compressed-tensors, groups": exported(
        compressed_tensors, llama, norm_mode="none", granularity="group", group_size=32, activation_bits=None
    ),
    "the library's 2 bits": by_library(2, strategy="group", group_size=32),
    "the library's 4 bits": by_library(4, strategy="group", group_size=32),
    "the library's 8 bits": by_library(8, strategy="channel"),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        found: Tensor = model(ids(2, 24)).logits
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_what_runs_is_what_transformers_reads(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    FOLDERS[name](folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    ours, tokenizer = open_model(str(folder))
    assert len(packed_layers(ours)) == 7 * ours.config.num_hidden_layers
    assert tokenizer.get_vocab() == WORDS.get_vocab()
    with exactly(ours):
        difference = (logits(ours) - logits(theirs)).abs().max() / logits(theirs).abs().max()
    assert difference < 2e-2  # int8 roundings that fall on the other side, and scales in fp16


@pytest.mark.parametrize("name", ["bitnet", "bitnet with SubLN", "compressed-tensors, groups", "the library's 4 bits"])
def test_the_native_engine_runs_them(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    FOLDERS[name](folder)
    engine, _, said = open_engine(str(folder))
    assert isinstance(engine, Engine), said
    native = list(engine.generate(PROMPT, Sampling(max_new_tokens=8)))
    model, _ = open_model(str(folder))
    tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert native == tokens[0, len(PROMPT) :].tolist()


def test_a_folder_is_converted_once_and_again_if_it_changes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    online(folder)
    first = pretrained_of(str(folder))
    assert pretrained_of(str(folder)) == first != str(folder)
    edit(folder, modules_to_not_convert=["lm_head", "model.layers.0.mlp.up_proj"])
    assert pretrained_of(str(folder)) != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"config_groups": {"a": {"weights": {"num_bits": 3, "type": "int", "symmetric": True}}}}, "weights of 3 bits"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, "weights of 4 bits, type float"),
    ],
)
def test_other_integers_are_left_to_transformers(
    tmp_path: Path, changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="wrinklefree")
    exported(compressed_tensors, llama, norm_mode="none")(tmp_path)
    edit(tmp_path, **changes)
    assert integers_folder(tmp_path) is None
    assert message in caplog.text


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("bitnet", "weight", torch.zeros(3, 64, dtype=torch.uint8), r"holds \[12, 64\] integers"),
        ("bitnet", "weight_scale", torch.tensor([float("nan")]), "no fp16 numbers"),
        ("bitnet", "weight_scale", None, "weight_scale is missing"),
        ("compressed-tensors, rows", "weight_packed", torch.zeros(3, 4), "not int32 words"),
        ("compressed-tensors, rows", "weight_scale", torch.ones(3), r"\[3, 1\] scales"),
    ],
)
def test_damaged_folders_are_refused_and_leave_nothing(
    tmp_path: Path, name: str, tensor: str, value: Tensor | None, message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    FOLDERS[name](folder)
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.layers.0.mlp.up_proj.{tensor}"]
    weights |= {} if value is None else {f"model.layers.0.mlp.up_proj.{tensor}": value}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        integers_folder(folder)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_read_as_the_library_writes_them(bits: int) -> None:
    low = -(2 ** (bits - 1))
    integers = torch.randint(low, -low, (5, 37), dtype=torch.int8)
    assert torch.equal(in_words(pack_to_int32(integers, bits), bits, 37), integers.to(torch.int16))
