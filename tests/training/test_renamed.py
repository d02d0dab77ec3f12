"""Families whose weights transformers renames in files: their checkpoints can be read, resumed, loaded and packed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, RENAMED, batches, family, ids, tokenizer
from toyrun import resolved, rows, run, tensors, toy_files
from transformers import AutoModelForCausalLM, PreTrainedModel

from wrinklefree.config.compose import config_yaml
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import find
from wrinklefree.core.stack import as_one
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.models.load import load_model
from wrinklefree.training import checkpoint, saved_state

torch.set_num_threads(1)

CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # another order of sums


def names(folder: Path) -> set[str]:
    with safe_open(folder / checkpoint.WEIGHTS, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("model_type", RENAMED)
def test_train_resume_keep_best_load_and_pack(model_type: str, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    settings = ["training.max_steps=2", "training.save_interval=1", "training.keep_best=true"]
    settings += ["training.eval_interval=1", "training.save_total_limit=9"]

    def losses(model: torch.nn.Module) -> dict[str, float]:
        return {"eval_loss": 1.0}  # so the first one stays the best

    for folder in (whole, halves):
        folder.mkdir()
        toy_files(folder, family(model_type))
        run(resolved(folder, *settings), evaluate=losses)
    shutil.rmtree(halves / "run" / "checkpoints" / "step_2")
    run(resolved(halves, *settings, "training.resume_from=latest"), evaluate=losses)
    states = [saved_state.load_state(folder / "run" / "checkpoints" / "step_2") for folder in (whole, halves)]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*map(tensors, states), strict=True))
    assert [row["train_loss"] for row in rows(whole / "run")] == [row["train_loss"] for row in rows(halves / "run")]

    final = whole / "run" / "final"
    trained, _ = load_model(final)
    assert names(final) <= as_one(trained.state_dict(), trained).keys()  # as plain transformers reads it
    plain, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(plain.get_output_embeddings().weight, trained.get_output_embeddings().weight)
    best, _ = load_model(whole / "run" / "best")
    assert torch.equal(best(ids()).logits, trained(ids()).logits)

    method = find("fairy2")(name="fairy2", rotate_inputs=True)
    packed = tmp_path / "packed"
    exact = {"dense_dtype": "float32", "snap_scales": False, "card": "", "force": False}
    report = export_packed(trained, tokenizer(), method, packed, batches=batches(), **exact)
    assert report.certificate.max_logit_difference < 1e-5
    torch.testing.assert_close(load_model(packed, dtype=torch.float32)[0](ids()).logits, trained(ids()).logits, **CLOSE)


@pytest.mark.parametrize("model_type", RENAMED)
def test_a_checkpoint_under_the_names_of_hub_files_is_read(model_type: str, tmp_path: Path) -> None:
    """Version 0.1 wrote these, and left experts in full precision."""
    excluded = ["embed_tokens", "lm_head", "experts"]
    model = find("fairy2")(name="fairy2", exclude_names=excluded).prepare(family(model_type))
    toy_files(tmp_path, family(model_type))
    settings = config_yaml(resolved(tmp_path, f"method.exclude_names=[{','.join(excluded)}]"))
    checkpoint.save(tmp_path / "own", model, tokenizer(), settings, None)
    shutil.copytree(tmp_path / "own", tmp_path / "hub")
    model.save_pretrained(tmp_path / "hub")
    assert names(tmp_path / "hub") != names(tmp_path / "own")
    expected, found = (load_model(tmp_path / name)[0].state_dict() for name in ("own", "hub"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_plain_checkpoint_has_the_names_of_the_model(model_type: str, tmp_path: Path) -> None:
    model = family(model_type)
    checkpoint.save(tmp_path / "final", model, tokenizer(), "", None)
    again = family(model_type, initializer_range=0.5)
    checkpoint.load_weights(tmp_path / "final", again)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in again.state_dict().items())


def test_a_checkpoint_that_cannot_be_read_is_said_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if transformers began to rename the weights of another family."""
    write = PreTrainedModel.save_pretrained

    def renamed(model: PreTrainedModel, folder: Path, **options: object) -> None:
        write(model, folder, **options)
        stored = load_file(folder / checkpoint.WEIGHTS)
        stored["model.last_norm.weight"] = stored.pop("model.norm.weight")
        save_file(stored, folder / checkpoint.WEIGHTS)

    toy_files(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", renamed)
    with pytest.raises(UserError, match=r"nobody could load .* model\.last_norm\.weight") as refused:
        run(resolved(tmp_path, "training.save_interval=1"))
    assert "\n" not in str(refused.value)
    assert "step_1" in str(refused.value)
    assert not checkpoint.step_folders(tmp_path / "run" / "checkpoints")
