"""From Python what the commands do: the same runs, folders and proofs."""

import re
from pathlib import Path

import pytest
import torch
from tiny import ids, llama, tokenizer
from toyrun import overrides, toy_files
from transformers import AutoModelForCausalLM

import wrinklefree
from wrinklefree.config.compose import read_config
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.export.proof.certify import same_codes
from wrinklefree.export.rounded.scales import snapped
from wrinklefree.packed.pack import packed_layers
from wrinklefree.runs.quantized import training_for

OWN = ("model=", "training=", "data", "output_dir=", "training.start", "training.blockwise", "training.max_steps")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return [each for each in overrides(tmp_path) if not each.startswith(OWN)] + ["training.blockwise.steps=1"]


def test_a_folder_is_quantized_trained_and_exported(settings: list[str], tmp_path: Path) -> None:
    student = wrinklefree.quantize("./toy", "fairy2", *settings, bits=1, texts="text", folder="mine")
    assert all(layer.config.num_stages == 1 for layer in quant_layers(student.model).values())
    before = {fqn: layer.encode() for fqn, layer in quant_layers(student.model).items()}
    packed = student.train(steps=3).export("small", head_bits=8)
    assert student.results is not None
    assert student.results.rebuilt
    assert read_config(tmp_path / "mine" / "final" / "wrinklefree.yaml").training.max_steps == 3
    layers = packed_layers(AutoModelForCausalLM.from_pretrained(packed))
    trained = quant_layers(student.model)
    with snapped(student.model):
        assert all(same_codes(layer.encode(), layers[fqn].codes()) for fqn, layer in trained.items())
    assert not all(same_codes(layer.encode(), before[fqn]) for fqn, layer in trained.items())


def test_a_model_in_memory_stays_as_it_is(settings: list[str], tmp_path: Path) -> None:
    model = llama()
    before = model(ids()).logits
    texts = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(60)]
    student = wrinklefree.quantize(model, "uniform", *settings, texts=texts, tokenizer=tokenizer(), folder="mine")
    assert torch.equal(model(ids()).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not quant_layers(model)
    assert torch.equal(student.original(ids()).logits, before)
    target = student.export("small")  # not trained, but evaluated and saved
    assert "packed" not in {path.name for path in (tmp_path / "mine").iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert (loaded(ids()).logits - student.model(ids()).logits).abs().max() < 0.02
    with pytest.raises(UserError, match="exists already"):
        student.export("small")


@pytest.mark.slow
def test_a_second_run_asks_before_it_replaces_the_first(settings: list[str]) -> None:
    wrinklefree.quantize("./toy", "fairy2", *settings, texts="text", folder="mine")
    with pytest.raises(UserError, match="already holds a run"):
        wrinklefree.quantize("./toy", "fairy2", *settings, texts="text", folder="mine")
    wrinklefree.quantize("./toy", "fairy2", *settings, texts="text", folder="mine", force=True)


@pytest.mark.parametrize(
    ("method", "bits", "training"),
    [
        ("fairy2", None, "fairy2_w2"),
        ("fairy2", 1, "fairy2_w1"),
        ("bitdistill", 1.58, "ternary"),
        ("anemll", None, "anemll_q2a4"),
        ("anemll_q4a4", None, "anemll_q4a4"),
    ],
)
def test_methods_and_bits_mean_a_training(method: str, bits: float | None, training: str) -> None:
    assert training_for(method, bits) == training


@pytest.mark.parametrize(
    ("method", "bits", "said"),
    [
        ("fairy3", None, "fairy3: no such method or training (did you mean 'fairy2'?)"),
        ("fairy2", 5, "bits=5: fairy2 has no training with so many; give one of fairy2_w1 (1), fairy2_w2 (2)"),
    ],
)
def test_what_means_no_training_is_refused(method: str, bits: float | None, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        training_for(method, bits)


def test_a_model_from_nowhere_needs_a_tokenizer() -> None:
    with pytest.raises(UserError, match="tokenizer="):
        wrinklefree.quantize(llama())


def test_the_next_step_fits_the_model(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No Python for a model that has learned prose."""
    wrinklefree.quantize("./toy", "uniform", *settings, texts="text", folder="mine").train(steps=0)
    assert "wf generate mine --prompt 'The '" in capsys.readouterr().out
