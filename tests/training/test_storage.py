"""Storage: what is pushed comes back, versions do not mix, and half a folder is never taken for a whole one."""

import sys
import uuid
from pathlib import Path

import fsspec
import pytest

from wrinklefree.core.errors import UserError
from wrinklefree.training import storage


@pytest.fixture
def url() -> str:
    return f"memory://bucket/{uuid.uuid4().hex}/step_10"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "state").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "state" / "data.pt").write_bytes(b"position")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folder_comes_back_whole(folder: Path, url: str, tmp_path: Path) -> None:
    storage.push(folder, url)
    fetched = storage.fetch(url, tmp_path / "cache")
    assert fetched.name == "step_10"
    assert contents(fetched) == contents(folder)
    assert storage.fetch(url + "/", tmp_path / "cache").name == "step_10"


def test_file_comes_back(folder: Path, url: str, tmp_path: Path) -> None:
    storage.push(folder / "model.safetensors", url)
    assert storage.fetch(url, tmp_path / "cache").read_bytes() == b"weights"


def test_local_path_is_itself(tmp_path: Path) -> None:
    assert storage.fetch(str(tmp_path)) == tmp_path
    assert not storage.is_remote("outputs/run")
    assert storage.is_remote("gs://bucket/run")


def test_same_version_is_downloaded_once_and_a_new_one_again(folder: Path, url: str, tmp_path: Path) -> None:
    storage.push(folder, url)
    first = storage.fetch(url, tmp_path / "cache")
    assert storage.fetch(url, tmp_path / "cache") == first
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    storage.push(folder, url)
    assert contents(storage.fetch(url, tmp_path / "cache")) == contents(folder)


def test_leftovers_of_an_older_push_are_not_fetched(folder: Path, url: str, tmp_path: Path) -> None:
    storage.push(folder, url)
    (folder / "state" / "data.pt").unlink()
    storage.push(folder, url)
    assert contents(storage.fetch(url, tmp_path / "cache")) == {"model.safetensors": b"weights"}


def test_folder_of_another_tool_is_fetched_as_it_is(url: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/") + "/a.bin", b"a")
    assert contents(storage.fetch(url, tmp_path / "cache")) == {"a.bin": b"a"}


def test_cut_off_push_is_noticed(folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = storage._put

    def stop_before_state(files: object, local: Path, remote: str) -> None:
        if local.name == "data.pt":
            raise KeyboardInterrupt
        put(files, local, remote)

    monkeypatch.setattr(storage, "_put", stop_before_state)
    with pytest.raises(KeyboardInterrupt):
        storage.push(folder, url)
    with pytest.raises(UserError, match=r"not whole.*1 of 2 files, state/data.pt first"):
        storage.fetch(url, tmp_path / "cache")


def test_cut_off_fetch_leaves_nothing(folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.push(folder, url)
    memory = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patched:
        patched.setattr(memory, "get_file", lambda *_: (_ for _ in ()).throw(ConnectionResetError("reset by peer")))
        with pytest.raises(UserError, match="reset by peer"):
            storage.fetch(url, tmp_path / "cache")
    assert not contents(tmp_path / "cache")
    assert contents(storage.fetch(url, tmp_path / "cache")) == contents(folder)


def test_nothing_there(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory://.*: nothing there"):
        storage.fetch(url, tmp_path / "cache")


def test_nothing_to_push(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder to upload"):
        storage.push(tmp_path / "missing", url)


def test_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"wrinklefree\[cloud\]") as caught:
        storage.fetch("gs://bucket/run")
    assert "\n" not in str(caught.value)


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="use gs://, s3:// or a local path"):
        storage.fetch("ftpx://bucket/run")
