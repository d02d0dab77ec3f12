"""Mistakes that are seen before a model is trained, each in one line."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import batches, llama, tokenizer, toy, with_toy_method
from toyrun import resolved, toy_files

from wrinklefree.commands import evaluate
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.data import sources
from wrinklefree.evaluate.perplexity import Quality, measure
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.runs.setup import open_run
from wrinklefree.runs.stage import train_stage

torch.set_num_threads(1)


def refusal(config: Config) -> str:
    """What a training that ends before its first step says."""
    with pytest.raises(UserError) as caught:
        train_stage(config, False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_packed_folder_is_not_trained(tmp_path: Path) -> None:
    """Neither as the model nor as the start. As a teacher, and to think with, it is a model like others."""
    toy_files(tmp_path)
    with with_toy_method():
        export_packed(
            toy().prepare(llama()), tokenizer(), toy(), tmp_path / "packed", card="", force=False, batches=batches()
        )
    packed = tmp_path / "packed"
    said = refusal(resolved(tmp_path, f"model={packed}"))
    assert f"{packed}: a packed folder, which runs but cannot be trained" in said
    assert "cannot be trained" in refusal(resolved(tmp_path, f"training.start_from=[{packed}]"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["run", "run/below"])
def test_a_file_as_output_folder_is_refused(place: str, tmp_path: Path) -> None:
    toy_files(tmp_path)
    (tmp_path / "run").write_text("a file")
    said = refusal(resolved(tmp_path, f"output_dir={tmp_path / place}"))
    assert said.startswith(f"output_dir={tmp_path / place}: {tmp_path / 'run'} is a file, and a run needs a folder")
    assert (tmp_path / "run").read_text() == "a file"


def test_a_folder_without_tokenizer_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = toy_files(tmp_path)
    for file in model.glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr("wrinklefree.models.load._open", lambda *given, **more: pytest.fail("weights were read"))
    assert f"{model}: no tokenizer" in refusal(resolved(tmp_path))


ROWS = {
    "alpaca_chat": {"instruction": "a", "input": "", "output": "b"},
    "dolly": {"instruction": "a", "context": "", "response": "b"},
    "sharegpt": {"conversations": []},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_another_format_are_told_which(name: str, tmp_path: Path) -> None:
    toy_files(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(ROWS[name]) + "\n" for _ in range(40)))
    said = refusal(resolved(tmp_path, f"data.path={tmp_path / 'rows.jsonl'}"))
    assert f"no column 'text'; set data.format={name}" in said
    assert sources.fitting_format({"title": "a"}) == ""


def test_nan_weights_are_named(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    batch = batches()[0]["input_ids"]
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight holds NaN.*the training has diverged"):
        measure(model, [{"input_ids": batch, "labels": batch}])


def test_a_diverged_perplexity_is_infinite_and_still_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Quality(nll=1e4, tokens=1, kl=0.0, same_top1=0.0).ppl == math.inf
    assert Quality(nll=709.0, tokens=1, kl=0.0, same_top1=0.0).ppl == math.exp(709.0)
    monkeypatch.setattr(evaluate, "open_model", lambda *given: (llama(), tokenizer()))
    monkeypatch.setattr(evaluate, "perplexity", lambda *given: {"perplexity": math.inf, "nll": 1e4})
    evaluate.run("x", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"path": "x", "perplexity": None, "nll": 1e4}


def test_a_seed_that_torch_takes_is_taken(tmp_path: Path) -> None:
    toy_files(tmp_path)
    assert open_run(resolved(tmp_path, f"seed={2**63 - 1}")).config.seed == 2**63 - 1
