"""The whole of `wf fairy2` and `wf train` on a toy model: what it leaves behind, and that it is what was trained."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, ids, llama, tokenizer, tokenizer_of
from toyrun import overrides, resolved, rows, toy_files
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.config.compose import read_config
from wrinklefree.core.method import quant_layers
from wrinklefree.export.proof.certify import same_codes
from wrinklefree.export.rounded.scales import snapped
from wrinklefree.models.load import load_model
from wrinklefree.packed.pack import packed_layers
from wrinklefree.packed.products.choose import exactly
from wrinklefree.runs.setup import open_run
from wrinklefree.runs.stage import prepare_student, prompts
from wrinklefree.training import checkpoint

PNG = b"\x89PNG\r\n\x1a\n"


def wf(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.stdout, result.stderr


def fairy2(folder: Path, *more: str, mode: str = "w2") -> tuple[int, str, str]:
    """`wf fairy2 -m FOLDER --mode MODE ...` at a few steps."""
    return wf("fairy2", "-m", str(folder / "toy"), "--mode", mode, *fairy2_settings(folder, *more))


def fairy2_settings(folder: Path, *more: str) -> list[str]:
    """What `wf fairy2` does not set by itself."""
    return [o for o in overrides(folder, *more) if not o.startswith(("model=", "training="))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished W2 run and what it printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    toy_files(folder)
    code, out, err = fairy2(folder, "training.save_interval=4")
    assert (code, err.count("error")) == (0, 0), err
    return folder, out


def test_everything_promised_is_there(finished: tuple[Path, str]) -> None:
    out = finished[0] / "run"
    names = {path.name for path in out.iterdir()}
    assert names == {"training_log.csv", "plots", "checkpoints", "final", "packed", "results.json"}
    assert [path.name for path in checkpoint.step_folders(out / "checkpoints")] == ["step_4", "step_6"]
    assert (out / "plots" / "loss.png").read_bytes().startswith(PNG)
    assert len(rows(out)) == 6
    assert read_config(out / "final" / "wrinklefree.yaml").method.num_stages == 2


def test_the_packed_folder_is_the_trained_model(finished: tuple[Path, str]) -> None:
    trained, _ = load_model(finished[0] / "run")
    packed, tokenizer = load_model(finished[0] / "run" / "packed", dtype=torch.float32)
    layers = packed_layers(packed)
    assert len(layers) == 14
    with torch.no_grad(), snapped(trained), exactly(packed):
        assert all(same_codes(layer.encode(), layers[fqn].codes()) for fqn, layer in quant_layers(trained).items())
        difference = (trained(ids()).logits - packed(ids()).logits).abs().max()
    assert difference < 0.02  # embeddings and norms are stored in bf16
    assert tokenizer("w3").input_ids == [3]


def test_results_are_measured_figures(finished: tuple[Path, str]) -> None:
    folder = finished[0] / "run"
    results = json.loads((folder / "results.json").read_text())
    assert results["context"] == 16
    for state in ("full_precision", "one_shot", "trained"):
        assert results[state]["ppl"] == pytest.approx(math.exp(results[state]["nll"]))
        assert 0 < results[state]["tokens"] <= 64
    assert results["full_precision"]["kl"] == 0
    assert results["one_shot"]["kl"] > 0
    files = sum(path.stat().st_size for path in (folder / "packed").glob("*.safetensors"))
    assert results["packed_bytes"] == pytest.approx(files, rel=0.02)
    assert 2 < results["bits_per_quantized_weight"] < 3  # 2 and the scales of a very small model
    assert min(results["tokens_per_second"].values()) > 0


def test_the_figure_before_training_is_that_of_the_quantized_model(finished: tuple[Path, str]) -> None:
    config = resolved(finished[0], f"output_dir={finished[0] / 'again'}", "training.max_steps=0")
    opened = open_run(config)
    student = prepare_student(config, opened.model)
    quality = opened.quality(student, opened.heldout(config.training.final_eval_tokens))
    results = json.loads((finished[0] / "run" / "results.json").read_text())
    assert quality.nll == pytest.approx(results["one_shot"]["nll"], rel=1e-6)


def test_the_table_and_the_next_steps_are_printed(finished: tuple[Path, str]) -> None:
    out = finished[1]
    for label in ("held-out perplexity", "bits per quantized weight", "whole file", "tokens/s"):
        assert sum(line.startswith(label) for line in out.splitlines()) == 1
    assert "step 6/6" in out
    assert "wf generate" in out


def test_the_card_shows_figures_and_a_sample(finished: tuple[Path, str]) -> None:
    card = (finished[0] / "run" / "packed" / "README.md").read_text()
    assert "import wrinklefree" in card
    assert "held-out perplexity" in card
    assert "## Sample" in card
    results = json.loads((finished[0] / "run" / "results.json").read_text())
    assert f"{results['trained']['ppl']:.2f}" in card


@pytest.mark.parametrize("wrong", ["data.path=nowhere", "training.max_seq_length=4096", "training.freeze_names=[nope]"])
def test_a_mistake_costs_no_earlier_run(tmp_path: Path, wrong: str) -> None:
    toy_files(tmp_path)
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "kept").write_text("mine")
    code, _, err = wf(
        "fairy2", "-m", str(tmp_path / "toy"), "--mode", "w2", "--force", *fairy2_settings(tmp_path), wrong
    )
    assert code == 2, err
    assert (tmp_path / "run" / "final" / "kept").read_text() == "mine"
    code, _, _ = wf(
        "fairy2",
        "-m",
        str(tmp_path / "toy"),
        "--mode",
        "w2",
        *fairy2_settings(tmp_path),
        wrong,
        f"output_dir={tmp_path}/new",
    )
    assert code == 2
    assert not (tmp_path / "new").exists()


def test_a_second_run_is_refused_and_force_starts_over(finished: tuple[Path, str], tmp_path: Path) -> None:
    toy_files(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_log.csv").write_text("step,train_loss\n1,3\n")
    code, _, err = fairy2(tmp_path)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "--force" in err
    assert (tmp_path / "run" / "training_log.csv").read_text() == "step,train_loss\n1,3\n"
    assert fairy2(tmp_path, "--force", "training.max_steps=1")[0] == 0
    assert len(rows(tmp_path / "run")) == 1


@pytest.mark.parametrize("settings", [["distillation=none"], ["method.preset=paper"], ["training.optimizer.name=muon"]])
def test_other_settings_run_to_the_end(tmp_path: Path, settings: list[str]) -> None:
    toy_files(tmp_path)
    code, _, err = fairy2(tmp_path, "training.max_steps=2", *settings, mode="w1")
    assert code == 0, err
    assert (tmp_path / "run" / "packed" / "model.safetensors").is_file()
    assert ("train_kl" in rows(tmp_path / "run")[0]) == (settings != ["distillation=none"])


def test_the_control_trains_in_full_precision(tmp_path: Path) -> None:
    toy_files(tmp_path)
    settings = [o.replace("fairy2_w2", "full_precision") for o in overrides(tmp_path, "training.max_steps=3")]
    code, out, err = wf("train", *settings)
    assert code == 0, err
    model, _ = load_model(tmp_path / "run")
    assert not quant_layers(model)
    assert not (tmp_path / "run" / "packed").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["one_shot"] is None
    assert results["trained"]["nll"] != results["full_precision"]["nll"]
    assert "packed/" not in out


@pytest.mark.parametrize("vocabulary", [96, 128])
def test_a_teacher_of_the_same_tokenizer_may_have_a_padded_head(tmp_path: Path, vocabulary: int) -> None:
    """As Qwen2.5-7B (152,064 rows) for Qwen2.5-0.5B (151,936)."""
    toy_files(tmp_path)
    llama(intermediate_size=160, vocab_size=vocabulary).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    code, _, err = fairy2(tmp_path, "training.max_steps=1", f"distillation.teacher={tmp_path / 'teacher'}")
    assert code == 0, err


@pytest.mark.parametrize("where", ["distillation.teacher", "training.start_from"])
def test_a_model_of_another_tokenizer_is_refused_with_the_id_that_differs(tmp_path: Path, where: str) -> None:
    """Its vocabulary has the same size and the same words, but two ids are exchanged."""
    toy_files(tmp_path)
    llama().save_pretrained(tmp_path / "other")
    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"<unk>": VOCAB - 2, "<eos>": VOCAB - 1}
    tokenizer_of(words | {"w3": 5, "w5": 3}).save_pretrained(tmp_path / "other")
    value = f"[{tmp_path / 'other'}]" if where == "training.start_from" else tmp_path / "other"
    code, _, err = fairy2(tmp_path, "training.max_steps=1", f"{where}={value}")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {where}")
    assert err.splitlines()[-1].endswith(
        "has another tokenizer than the model: id 3 is 'w5', the model's is 'w3'; 2 ids differ"
    )
    assert not (tmp_path / "run" / "final").exists()


MISTAKES = {
    "a longer sequence than positions": (["training.max_seq_length=65"], "has 64 positions"),
    "fewer tokens than a step": (["training.max_steps=null", "training.total_tokens=31"], "less than one step"),
    "empty data": (["data.path=EMPTY"], "EMPTY: no"),
    "no such data": (["data.path=/nowhere"], "no such file or folder"),
    "all layers excluded": (["method.exclude_names=['*']"], "no linear layer to quantize"),
    "an unread setting": (["data.subset=x"], "no effect"),
    "a misspelt key": (["training.batchsize=2"], "did you mean 'training.batch_size'?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_run(tmp_path: Path, mistake: str) -> None:
    settings, message = MISTAKES[mistake]
    toy_files(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    code, _, err = fairy2(tmp_path, *(s.replace("EMPTY", str(tmp_path / "EMPTY")) for s in settings))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1)
    assert message.replace("EMPTY", str(tmp_path / "EMPTY")) in errors[0]
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "final").exists()
    assert not (tmp_path / "run" / "training_log.csv").exists()


def test_dry_run_writes_nothing_and_says_what_auto_means(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_files(tmp_path)
    with caplog.at_level("INFO", "wrinklefree"):
        code, out, _ = fairy2(tmp_path, "--dry-run", "training.lr=auto")
    assert code == 0
    assert "num_stages: 2" in out
    assert "learning rate 0.0001 (table" in caplog.text
    assert not (tmp_path / "run").exists()


def test_a_scale_needs_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    toy_files(tmp_path)
    code, _, err = fairy2(tmp_path, "--scale", "large")
    assert code == 2
    assert "--scale large needs 4 GPU(s), this machine has 0" in err
    code, out, _ = fairy2(tmp_path, "--scale", "large", "--dry-run")
    assert code == 0
    assert "gradient_accumulation_steps: 2" in out


def test_a_window_of_special_tokens_still_gives_a_prompt() -> None:
    from tiny import tokenizer

    window = {"input_ids": torch.full((1, 16), 95)}
    assert prompts([window], tokenizer()) == [" ".join(["<eos>"] * 8)]
    assert prompts([window, {"input_ids": torch.arange(16)[None]}], tokenizer()) == ["w0 w1 w2 w3 w4 w5 w6 w7"]


@pytest.mark.slow
def test_the_shipped_model_goes_all_the_way(tmp_path: Path) -> None:
    """The demo at two steps."""
    settings = ["training.max_steps=2", "training.batch_size=2", "training.max_seq_length=64"]
    settings += ["training.eval_tokens=256", "training.final_eval_tokens=256", f"output_dir={tmp_path / 'run'}"]
    code, out, err = wf("fairy2", "-m", "tiny", "--mode", "w2", *settings)
    assert code == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["full_precision"]["ppl"] < results["one_shot"]["ppl"]
    assert 2 < results["bits_per_quantized_weight"] < 2.2
    assert results["packed_linear_bytes"] < results["original_linear_bytes"] / 7
    assert "held-out perplexity" in out
