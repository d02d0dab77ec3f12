"""Storage: what is pushed comes back, versions do not mix, and half a folder is never taken for a whole one."""

import json
import sys
import types
import uuid
from pathlib import Path

import fsspec
import pytest

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import inner_path
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


OUTSIDE = ["../outside", "a/../../outside", "/outside", "a\\..\\..\\outside", "C:outside", "C:/outside", "a\nb", ""]


@pytest.mark.parametrize("name", OUTSIDE[:-1])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    name: str, folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a listing of the store, and in a manifest. Nothing is written, inside the cache or outside."""
    storage.push(folder, url)
    memory, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        listed = {f"{root}/{name}": {"type": "file", "size": 1, "name": f"{root}/{name}"}}
        patched.setattr(type(memory), "find", lambda *_, **__: listed)
        with pytest.raises(UserError, match="leads out of the folder"):
            storage.fetch(url, tmp_path / "cache")
    memory.pipe_file(f"{root}/{storage.MANIFEST}", json.dumps({name: 1}).encode())
    with pytest.raises(UserError, match="leads out of the folder") as caught:
        storage.fetch(url, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_are_checked_in_one_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leads out of the folder"):
        inner_path(tmp_path, name)
    assert inner_path(tmp_path, "a/b..c/.d") == tmp_path / "a" / "b..c" / ".d"


def test_a_changed_file_is_not_fetched(folder: Path, url: str, tmp_path: Path) -> None:
    """Of the same size: the manifest has its SHA-256."""
    storage.push(folder, url)
    fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/") + "/model.safetensors", b"WEIGHTS")
    with pytest.raises(UserError, match=r"model.safetensors is not the file that was uploaded"):
        storage.fetch(url, tmp_path / "cache")
    assert not contents(tmp_path / "cache")


def test_a_manifest_of_an_older_version_is_read(folder: Path, url: str, tmp_path: Path) -> None:
    """It has sizes alone."""
    storage.push(folder, url)
    sizes = {name: len(data) for name, data in contents(folder).items()}
    manifest = f"{url.removeprefix('memory:/')}/{storage.MANIFEST}"
    fsspec.filesystem("memory").pipe_file(manifest, json.dumps(sizes).encode())
    assert contents(storage.fetch(url, tmp_path / "cache")) == contents(folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"a": "b"}', '{"a": {"size": 1}}', "[" * 99_999])
def test_a_broken_manifest_is_one_line(text: str, folder: Path, url: str, tmp_path: Path) -> None:
    storage.push(folder, url)
    fsspec.filesystem("memory").pipe_file(f"{url.removeprefix('memory:/')}/{storage.MANIFEST}", text.encode())
    with pytest.raises(UserError, match="manifest") as caught:
        storage.fetch(url, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_folder_of_pushed_folders_is_compared_with_all_their_manifests(
    folder: Path, url: str, tmp_path: Path
) -> None:
    for name in ("step_1", "step_2"):
        storage.push(folder, f"{url}/{name}")
    memory = fsspec.filesystem("memory")
    assert contents(storage.fetch(url, tmp_path / "cache")) == {
        f"{name}/{file}": data for name in ("step_1", "step_2") for file, data in contents(folder).items()
    }
    memory.pipe_file(url.removeprefix("memory:/") + "/step_2/model.safetensors", b"WEIGHTS")
    with pytest.raises(UserError, match=r"step_2/model.safetensors is not the file that was uploaded"):
        storage.fetch(url, tmp_path / "cache")
    memory.rm_file(url.removeprefix("memory:/") + "/step_1/state/data.pt")
    with pytest.raises(UserError, match=r"not whole.*step_1/state/data.pt first"):
        storage.fetch(url, tmp_path / "cache")


def test_errors_of_drivers_that_are_no_oserror_are_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp's, which gcsfs raises once it has tried often enough."""

    class ClientError(Exception):
        pass

    def refuse(*args: object, **more: object) -> None:
        raise ClientError("server disconnected")

    monkeypatch.setitem(sys.modules, "aiohttp.client_exceptions", types.SimpleNamespace(ClientError=ClientError))  # type: ignore[arg-type]
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    with pytest.raises(UserError, match="server disconnected; is the service reachable"):
        storage.check_writable(url)
