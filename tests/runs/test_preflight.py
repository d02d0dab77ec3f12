"""What would end a run later ends it at the start: before the model is loaded, and before an old run is touched."""

import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from toyrun import overrides, resolved, rows, run, toy_files

from wrinklefree.commands import train
from wrinklefree.config.compose import load_config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import preflight, setup
from wrinklefree.runs.launch import run_stage
from wrinklefree.training import forecast, storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_files(tmp_path)
    return tmp_path


def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))


def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "pipe_file", lambda *args, **more: (_ for _ in ()).throw(PermissionError("read-only")))


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are wrong by themselves."""


PROBLEMS: dict[str, tuple[list[str], Callable[[pytest.MonkeyPatch], None], str]] = {
    "tracker": (["training.logging.wandb.enabled=true"], without_wandb, r"needs the wandb package: pip install"),
    "driver": (["training.upload_to=ftpx://bucket/run"], nothing, "use gs://, s3:// or a local path"),
    "access": (["training.upload_to=memory://bucket/run"], refusing, r"memory://\.\.\./run: read-only; is the service"),
    "teacher": (["distillation.teacher=./none"], nothing, r"\./none: no such folder"),
    "cache": (["training.objective=cached_kd", "distillation.cache=none"], nothing, "none: "),
    "data": (["data.path=nowhere"], nothing, "nowhere"),
    "heldout": (["data.heldout_path=nowhere"], nothing, "nowhere"),
    "disk": ([], full, r"the checkpoints of this run need \d.* and the disk has .* for them"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_is_found_before_the_model_is_loaded_and_the_old_run_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    settings, prepare, message = PROBLEMS[problem]
    (folder / "run" / "final").mkdir(parents=True)
    (folder / "run" / "final" / "config.json").write_text("{}")
    monkeypatch.chdir(folder)
    prepare(monkeypatch)
    monkeypatch.setattr(setup, "load_pretrained", lambda model: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=message) as refused:
        run_stage(overrides(folder, *settings), force=True)
    assert "\n" not in str(refused.value)
    assert (folder / "run" / "final" / "config.json").read_text() == "{}"


def test_a_bad_row_late_in_the_first_thousand_is_found_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['{"text": "w1 w2 w3"}'] * 700 + ['{"txt": "w1"}'] + ['{"text": "w4"}'] * 10
    (folder / "rows.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(setup, "load_pretrained", lambda model: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"rows.jsonl.*701"):
        run_stage(overrides(folder, f"data.path={folder / 'rows.jsonl'}"))


def test_a_place_that_takes_files_is_left_as_it_was() -> None:
    memory = fsspec.filesystem("memory")
    storage.check_writable("memory://bucket/place")
    assert not [path for path in memory.find("/bucket") if "probe" in path]


def test_files_that_a_run_does_not_replace_are_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "run").mkdir()
    with (folder / "run" / "notes.bin").open("wb") as file:
        file.truncate(1 << 30)
    full(monkeypatch)
    with pytest.raises(UserError, match=r"the disk has .* for them"):
        preflight.check_disk(resolved(folder))


def test_the_room_for_checkpoints_is_what_a_run_takes(folder: Path) -> None:
    config = resolved(folder, "training.save_interval=2", "training.save_total_limit=2", "training.keep_best=true")
    run(config)
    files = [file for file in (folder / "run").rglob("*.*") if file.suffix in (".safetensors", ".pt")]
    model = preflight.skeleton(config)
    assert model is not None
    parameters = model.num_parameters()
    said = preflight.checkpoint_bytes(config, parameters)
    written = sum(file.stat().st_size for file in files)
    # At its end a run has no checkpoint that is being written, and no best model but one.
    assert written == pytest.approx(said - parameters * (12 + 4), rel=0.15)


def test_many_passes_over_little_text_are_refused_unless_asked_for(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="wrinklefree")
    tokens = ["training.max_steps=null", "training.total_tokens=64000"]
    with pytest.raises(UserError, match=r"64,000 tokens are .* passes over data.path=.*: give more text.*max_passes="):
        run(resolved(folder, *tokens))
    assert "the plan goes through it 2" in caplog.text
    assert not (folder / "run").exists()
    tokens = ["training.max_steps=null", "training.total_tokens=320"]
    with pytest.raises(UserError, match=r"320 tokens are 0.1\d* passes"):
        run(resolved(folder, *tokens, "data.max_passes=0.1"))
    run(resolved(folder, *tokens, "data.max_passes=0.2"))
    assert rows(folder / "run")[-1]["step"] == "10"


TABLE = ["training.max_minutes=null"]  # what a GPU has: tokens by the table


def test_the_default_text_is_not_gone_through_hundreds_of_times(folder: Path) -> None:
    """`wf fairy2 -m FOLDER` without a budget: half a billion tokens by the table, and no data named."""
    out = [f"output_dir={folder / 'run'}", f"output_root={folder}"]
    config = load_config([f"model={folder / 'toy'}", "training=fairy2_w2", *out, *TABLE])
    with pytest.raises(UserError, match=r"500,000,000 tokens are \S+ passes over what the model writes itself"):
        setup.open_run(config)
    assert not (folder / "self_text").exists()


def test_a_dry_run_says_that_the_run_would_be_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="wrinklefree")
    out = f"output_dir={folder / 'run'}"
    train.run([f"model={folder / 'toy'}", "training=fairy2_w2", out, *TABLE], dry_run=True)
    assert "the run would be refused: 500,000,000 tokens are" in caplog.text
    assert "dry run: nothing was trained or written" in caplog.text
    assert not (folder / "run").exists()


def test_a_forecast_leaves_no_trace(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="wrinklefree")
    settings = ["training.gradient_accumulation_steps=2"]
    expected = run(resolved(folder, *settings))
    assert "s a step" not in caplog.text
    monkeypatch.setattr(forecast, "LONG", 4)
    found = run(resolved(folder, *settings, f"output_dir={folder / 'told'}"), forecast=True)
    assert "and what the optimizer and evaluations take" in caplog.text
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert rows(folder / "told") == rows(folder / "run")
