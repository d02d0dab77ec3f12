"""Uploads beside a training: a store that fails ends nothing and loses nothing."""

import itertools
import json
import threading
from pathlib import Path

import pytest
from toyrun import resolved, run, toy_files

from wrinklefree.core.errors import UserError
from wrinklefree.training import checkpoint, storage, uploads
from wrinklefree.training.uploads import Uploads


class Store:
    """A store that can be down, or take its time."""

    def __init__(self) -> None:
        self.down, self.calls, self.held = False, 0, threading.Event()
        self.held.set()
        self.names: list[str] = []
        self.removed: list[str] = []

    def push(self, local: Path, url: str) -> None:
        self.calls += 1
        self.held.wait(10)
        if self.down:
            raise UserError(f"{url}: 500, server error")
        self.names.append(url)

    def listing(self, url: str) -> list[str]:
        return sorted({name.rpartition("/")[2] for name in self.names if name.startswith(f"{url}/")})

    def remove(self, url: str) -> None:
        self.names.remove(url)
        self.removed.append(url)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(storage, "push", made.push)
    monkeypatch.setattr(storage, "names", made.listing)
    monkeypatch.setattr(storage, "remove", made.remove)
    monkeypatch.setattr(storage, "check_writable", lambda url: None)
    monkeypatch.setattr(uploads, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(uploads, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(uploads, "LAST_TRY", 5.0)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_files(tmp_path)
    return tmp_path


def steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.step_folders(folder / "run" / "checkpoints")]


UPLOADING = ["training.save_interval=1", "training.upload_to=s3://bucket/run", "training.save_total_limit=2"]


def uploaded(store: Store) -> list[str]:
    names = [url.removeprefix("s3://bucket/run/") for url in store.names]
    return [name for name in names if name not in uploads.ALONGSIDE]


def test_a_store_that_is_down_ends_no_run_and_the_next_run_uploads_what_is_missing(
    folder: Path, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "LAST_TRY", 0.1)
    store.down = True
    run(resolved(folder, *UPLOADING))
    assert (folder / "run" / "final" / "config.json").is_file()
    assert store.calls > 1
    assert caplog.text.count("500, server error") == 1
    assert "not uploaded to s3://.../run: step_3, step_4, step_5, step_6; they are in" in caplog.text
    assert steps(folder) == [3, 4, 5, 6]  # two, and two more that wait for the store
    store.down = False
    run(resolved(folder, *UPLOADING, "training.resume_from=latest"))
    assert uploaded(store) == ["step_5", "step_6"]  # as many as are to be kept
    calls = store.calls
    run(resolved(folder, *UPLOADING, "training.resume_from=latest"))
    assert store.calls == calls  # uploads.json knows


def test_what_waits_is_uploaded_in_order_when_the_store_is_back(folder: Path, store: Store) -> None:
    store.down = True

    def on_step(model: object, step: int) -> None:
        store.down = step < 4

    run(resolved(folder, *UPLOADING), on_step=on_step)
    assert uploaded(store) == ["step_5", "step_6"]
    assert [name for name in store.removed if name.rpartition("/")[2] == "step_4"]


def test_a_slow_store_delays_no_step(folder: Path, store: Store) -> None:
    """While an upload hangs, the training goes on to its last step."""
    store.held.clear()
    seen = []

    def on_step(model: object, step: int) -> None:
        seen.append(step)
        if step == 5:
            store.held.set()

    run(resolved(folder, *UPLOADING), on_step=on_step)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert uploaded(store)[-1] == "step_6"


def test_a_record_that_is_broken_or_of_another_place_uploads_everything(folder: Path, store: Store) -> None:
    run(resolved(folder, *UPLOADING))
    record = folder / "run" / uploads.RECORD
    for text in ("{", "[]", json.dumps({"store": "another", "done": ["step_5", "step_6"]})):
        record.write_text(text)
        store.names.clear()
        run(resolved(folder, *UPLOADING, "training.resume_from=latest"))
        assert uploaded(store) == ["step_5", "step_6"]


def test_closing_waits_only_so_long(tmp_path: Path, store: Store) -> None:
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    store.held.clear()
    waiting = Uploads(tmp_path / "checkpoints", "s3://bucket/run")
    waiting.close(seconds=0.1)
    assert waiting.waiting() == ["step_1"]
    store.held.set()


@pytest.mark.slow
def test_what_is_gone_is_not_said_to_be_there(tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A store that hangs: meanwhile an old checkpoint is pruned."""
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    store.held.clear()
    copies = Uploads(tmp_path / "checkpoints", "s3://bucket/run")
    (tmp_path / "checkpoints" / "step_1").rmdir()
    copies.close(0.05)
    store.held.set()
    assert "step_1: removed before it could be uploaded" in caplog.text
    assert "not uploaded to s3://.../run: step_2; they are in" in caplog.text


def test_the_log_in_the_store_has_all_rows_before_its_checkpoints(folder: Path, store: Store) -> None:
    """A machine may be lost between the two; rows past a checkpoint are left out by a resume, missing ones stay so."""
    run(resolved(folder, "training.save_interval=2", "training.upload_to=s3://bucket/run"))
    first = [name.rpartition("/")[2] for name in store.names]
    assert first[0] == "training_log.csv"
    assert any(checkpoint.is_step(name) for name in first)
    assert all(before == "training_log.csv" for before, name in itertools.pairwise(first) if checkpoint.is_step(name))
