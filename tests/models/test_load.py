"""Loading: every folder of ours comes back exactly, everything else is one line that says what to do."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny import batches, ids, llama, tokenizer, toy, with_toy_method
from transformers import BertConfig, BertForMaskedLM

from wrinklefree.commands import export as export_command
from wrinklefree.config.compose import config_yaml
from wrinklefree.config.schema import Config, DataConfig, DistillationConfig, ModelConfig, TrainingConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, quant_layers
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.models import find
from wrinklefree.models.check import check_sizes
from wrinklefree.models.find import model_folder, resolve_pretrained
from wrinklefree.models.headers import read_header
from wrinklefree.models.load import load_model, load_pretrained
from wrinklefree.packed.quantizer import FORMAT
from wrinklefree.training import checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _method() -> Iterator[None]:
    with with_toy_method():
        yield


def config(method: QuantMethod | None) -> Config:
    return Config(
        output_dir="unused",
        model=ModelConfig(name="tiny", pretrained="unused"),
        data=DataConfig(source="stdlib"),
        training=TrainingConfig(stage="test", max_seq_length=32),
        distillation=DistillationConfig(name="none"),
        method=method,
    )


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    out = tmp_path / "packed"
    export_packed(toy().prepare(llama()), tokenizer(), toy(), out, card="", force=False, batches=batches())
    return out


@pytest.fixture
def trained() -> torch.nn.Module:
    """Scales that training has moved away from where the method starts."""
    model = toy().prepare(llama())
    with torch.no_grad():
        for layer in quant_layers(model).values():
            layer.scales *= 1.37
    return model


def test_a_training_checkpoint_comes_back_bit_for_bit(tmp_path: Path, trained: torch.nn.Module) -> None:
    checkpoint.save(tmp_path / "final", trained, tokenizer(), config_yaml(config(toy())), None)
    model, words = load_model(tmp_path / "final")
    assert not model.training
    assert len(words) == len(tokenizer())
    expected, got = trained.state_dict(), model.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert torch.equal(model(ids()).logits, trained(ids()).logits)


def test_a_run_folder_means_final_or_else_the_newest_checkpoint(tmp_path: Path) -> None:
    for number in (9, 10):
        step = tmp_path / f"checkpoints/step_{number}"
        checkpoint.save(step, toy().prepare(llama()), tokenizer(), config_yaml(config(toy())), None)
    assert model_folder(tmp_path).name == "step_10"
    checkpoint.save(tmp_path / "final", toy().prepare(llama()), tokenizer(), config_yaml(config(toy())), None)
    assert model_folder(tmp_path).name == "final"
    assert len(quant_layers(load_model(tmp_path)[0])) == 14


def test_a_checkpoint_without_a_method_is_a_plain_model(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "final", llama(), tokenizer(), config_yaml(config(None)), None)
    assert torch.equal(load_model(tmp_path / "final")[0](ids()).logits, llama()(ids()).logits)


def test_a_training_checkpoint_is_not_cast(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "final", toy().prepare(llama()), tokenizer(), config_yaml(config(toy())), None)
    with pytest.raises(UserError, match="wf export"):
        load_model(tmp_path / "final", dtype=torch.bfloat16)


def test_plain_and_packed_folders_load_in_their_own_dtype_or_the_one_asked_for(plain: Path, packed: Path) -> None:
    assert load_model(plain)[0].dtype == torch.float32
    assert load_model(packed)[0].dtype == torch.bfloat16
    assert load_model(plain, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load_pretrained(ModelConfig(name="x", pretrained=str(packed)))[0].dtype == torch.float32


def test_export_command_packs_a_run_and_refuses_twice(tmp_path: Path, trained: torch.nn.Module) -> None:
    checkpoint.save(tmp_path / "final", trained, tokenizer(), config_yaml(config(toy())), None)
    export_command.run(tmp_path, "hf", None, False)
    assert torch.equal(
        load_model(tmp_path / "packed", dtype=torch.float32)[0].model.norm.weight, trained.model.norm.weight
    )
    with pytest.raises(UserError, match="--force"):
        export_command.run(tmp_path, "hf", None, False)
    with pytest.raises(UserError, match="available: hf"):
        export_command.run(tmp_path, "hff", None, False)
    with pytest.raises(UserError, match="--gguf-type: has no effect with --format hf, it is for --format gguf"):
        export_command.run(tmp_path, "hf", tmp_path / "x", False, gguf_type="tq1_0", factored_rank=None)
    with pytest.raises(UserError, match="--factored-rank"):
        export_command.run(tmp_path, "gguf", None, False, factored_rank=8)
    assert export_command.default_out(tmp_path / "final", "hf") == tmp_path / "final-packed"


def test_export_command_refuses_what_was_not_quantized(tmp_path: Path, plain: Path) -> None:
    checkpoint.save(tmp_path / "final", llama(), tokenizer(), config_yaml(config(None)), None)
    with pytest.raises(UserError, match="without quantization"):
        export_command.run(tmp_path, "hf", None, False)
    with pytest.raises(UserError, match="wf train"):
        export_command.run(plain, "hf", None, False)


def truncate(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


BROKEN = {
    "no such folder": (shutil.rmtree, "no such folder"),
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "cut tail": (lambda folder: truncate(folder / "model.safetensors", 9999), "truncated, 9,999 of"),
    "cut header": (lambda folder: truncate(folder / "model.safetensors", 99), "truncated"),
    "cut to nothing": (lambda folder: truncate(folder / "model.safetensors", 0), "truncated"),
    "not safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "not a safetensors"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not readable JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a model config"),
    "no model_type": (lambda folder: (folder / "config.json").write_text("{}"), "no model_type"),
    "unknown model_type": (lambda folder: edit(folder / "config.json", model_type="nope"), "cannot load it"),
    "other widths": (lambda folder: edit(folder / "config.json", intermediate_size=32), "cannot load it"),
    "more layers": (lambda folder: edit(folder / "config.json", num_hidden_layers=3), "layers.2.*missing"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "no tokenizer"),
    "missing shard": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
            and (folder / "model.safetensors.index.json").write_text(
                json.dumps(
                    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
                )
            )
        ),
        "model-00002-of-00002.safetensors is missing",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line(name: str, plain: Path) -> None:
    damage, message = BROKEN[name]
    damage(plain)
    with pytest.raises(UserError, match=message) as caught:
        load_model(plain)
    assert str(plain) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_model(plain: Path) -> None:
    with pytest.raises(UserError, match="a model is a folder"):
        load_model(plain / "config.json")


def test_a_masked_language_model_is_refused(tmp_path: Path) -> None:
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertForMaskedLM(small).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertForMaskedLM, not a causal language model"):
        load_model(tmp_path)


def test_a_checkpoint_of_another_method_or_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "final", llama(), tokenizer(), config_yaml(config(toy())), None)  # no scales in it
    with pytest.raises(UserError, match="does not fit this model and method"):
        load_model(tmp_path / "final")


def test_a_packed_folder_of_a_newer_format_is_refused(packed: Path) -> None:
    values = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit(packed / "config.json", quantization_config=values | {"format": FORMAT + 1})
    with pytest.raises(UserError, match="upgrade"):
        load_model(packed)


def test_a_packed_folder_of_an_unknown_method_is_refused(packed: Path) -> None:
    values = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit(packed / "config.json", quantization_config=values | {"method": {"name": "toyy"}})
    with pytest.raises(UserError, match="did you mean 'toy'"):
        load_model(packed)


def test_a_packed_folder_with_a_scale_missing_is_refused(packed: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.scales is missing"):
        load_model(packed)


def test_builtin_models_are_folders_of_the_package(monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    monkeypatch.setattr(find, "BUILTIN", plain.parent)
    assert resolve_pretrained("builtin:plain") == str(plain)
    with pytest.raises(UserError, match="there are: plain"):
        resolve_pretrained("builtin:nope")


@pytest.mark.parametrize("name", ["./nope", "/nope/model", "a/b/c", "~/nope"])
def test_a_path_is_never_asked_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        resolve_pretrained(name)


def test_an_unreachable_hub_is_said_at_once_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE.*-m tiny"):
        resolve_pretrained("someone/model")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")  # nobody listens there any more
    with pytest.raises(UserError, match="does not answer: use -m tiny"):
        resolve_pretrained("someone/model")


def test_without_the_hub_a_cached_copy_is_used(monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(find, "try_to_load_from_cache", lambda name, file: str(plain / file))
    assert resolve_pretrained("someone/model") == str(plain)


@pytest.mark.parametrize("offsets", [[None, None], ["0", "8"], [0], {}, None, [0, [8]]])
def test_a_header_with_odd_offsets_is_one_line(tmp_path: Path, offsets: object) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"truncated, or not a safetensors file") as refused:
        read_header(file)
    assert "\n" not in str(refused.value)


def test_json_that_transformers_does_not_read_may_hold_anything(plain: Path) -> None:
    (plain / "notes.json").write_text("")
    (plain / "log.json").write_text('{"a": 1}\n{"a": 2}\n')
    (plain / "deep.json").write_text("[" * 10_000)
    assert load_model(plain)[0].config.vocab_size == 96


def test_a_width_for_each_layer_is_no_number_of_layers() -> None:
    """Gemma 3n and 4 have such keys; a model of few tensors may be as wide as it likes."""
    check_sizes(Path("config.json"), {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}, 40)
    with pytest.raises(UserError, match="num_hidden_layers=41, but the files have 40 tensors"):
        check_sizes(Path("config.json"), {"num_hidden_layers": 41}, 40)
