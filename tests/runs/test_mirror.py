"""A run's store: a machine that is new goes on from it, and a finished run is whole there."""

import logging
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
from toyrun import overrides, rows, toy_files

from wrinklefree.core.errors import UserError
from wrinklefree.runs import launch, mirror
from wrinklefree.training import storage, uploads


def url(folder: Path) -> str:
    return f"file://{folder / 'store'}"


def settings(folder: Path, *more: str) -> list[str]:
    own = [
        "training.save_interval=2",
        f"training.upload_to={url(folder)}",
        "training.resume_from=latest",
        "training.pack=false",
    ]
    return overrides(folder, *own, *more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_files(tmp_path)
    return tmp_path


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def test_a_new_machine_goes_on_from_the_store_to_the_same_bits(folder: Path) -> None:
    """The first machine takes four of six steps, and is gone."""
    launch.run_stage(
        settings(folder, f"output_dir={folder / 'whole'}", f"training.upload_to=file://{folder / 'other'}")
    )
    launch.run_stage(settings(folder, "training.scheduler.name=wsd"))
    store = folder / "store"
    assert {"step_4", "step_6", "final", "results.json", mirror.FINISHED} <= set(storage.names(url(folder)))
    shutil.rmtree(folder / "run")
    for name in ("step_6", mirror.FINISHED, "final", "results.json"):
        path = store / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    launch.run_stage(settings(folder))
    assert weights(folder / "run") == weights(folder / "whole")
    assert rows(folder / "run") == rows(folder / "whole")
    assert (store / mirror.FINISHED).is_file()


def test_a_finished_run_is_fetched_and_not_run_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    launch.run_stage(settings(folder))
    before = weights(folder / "run")
    shutil.rmtree(folder / "run")
    caplog.set_level(logging.INFO)
    caplog.clear()
    launch.run_stage(settings(folder))
    assert weights(folder / "run") == before
    assert "finished before" in caplog.text
    assert "loading" not in caplog.text


def test_a_checkpoint_that_is_cut_off_in_the_store_is_passed_over(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    launch.run_stage(settings(folder))
    for name in (mirror.FINISHED, "step_6/model.safetensors"):
        (folder / "store" / name).unlink()
    shutil.rmtree(folder / "run")
    caplog.set_level(logging.INFO)
    launch.run_stage(settings(folder))
    assert "not whole" in caplog.text
    assert "step_4 fetched from its store" in caplog.text


def test_latest_without_a_store_is_still_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        launch.run_stage(overrides(folder, "training.resume_from=latest"))


def test_a_final_model_that_cannot_be_uploaded_is_an_error_and_the_next_run_tries_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = storage.push
    monkeypatch.setattr(mirror, "FINAL_WAIT", 0.1)
    monkeypatch.setattr(uploads, "LAST_TRY", 0.1)

    def down(local: Path, to: str) -> None:
        raise UserError(f"{to}: 500")

    monkeypatch.setattr(storage, "push", down)
    with pytest.raises(UserError, match="done, but not uploaded"):
        launch.run_stage(settings(folder))
    monkeypatch.setattr(storage, "push", push)
    monkeypatch.setattr(mirror, "FINAL_WAIT", 60.0)
    launch.run_stage(settings(folder))
    assert {"step_4", "step_6", mirror.FINISHED, "final"} <= set(storage.names(url(folder)))  # save_total_limit is 2


def test_stages_of_one_command_have_places_of_their_own(folder: Path) -> None:
    chain = [
        settings(folder, "training.stage=a", "training.max_steps=2", f"output_dir={folder / 'outputs' / 'a'}"),
        settings(folder, "training.stage=b", "training.max_steps=2", f"output_dir={folder / 'outputs' / 'b'}"),
    ]
    launch.run_chain(chain, False, None, None)
    assert {"a", "b"} <= set(storage.names(url(folder)))
    shutil.rmtree(folder / "outputs")
    launch.run_chain(chain, False, None, None)
    assert (folder / "outputs" / "a" / "results.json").is_file()


@pytest.mark.slow
def test_killed_at_twenty_moments_a_run_ends_with_the_bits_of_one_that_was_not(folder: Path) -> None:
    """Each time on a new machine, which has what is in the store and nothing else."""
    more = ["training.max_steps=40", "training.save_interval=1", "training.eval_interval=10"]
    apart = [f"output_dir={folder / 'whole'}", f"training.upload_to=file://{folder / 'other'}"]
    began = time.monotonic()
    launch.run_stage(settings(folder, *more, *apart))
    seconds, draw, killed, ended = time.monotonic() - began, random.Random(0), 0, False
    while killed < 20 and not ended:
        machine = multiprocessing.get_context("fork").Process(target=launch.run_stage, args=(settings(folder, *more),))
        machine.start()
        machine.join(draw.uniform(0.05, 0.6) * seconds)
        ended = not machine.is_alive()
        machine.kill()
        machine.join()
        killed += not ended
        assert not ended or machine.exitcode == 0
        shutil.rmtree(folder / "run", ignore_errors=True)
    launch.run_stage(settings(folder, *more))
    assert killed >= 3
    assert weights(folder / "run") == weights(folder / "whole")
    assert rows(folder / "run")[-1] == rows(folder / "whole")[-1]
