"""Settings that name something to read may be addresses: the copy is what the run reads."""

import uuid
from pathlib import Path

import fsspec
import pytest

from wrinklefree import cli
from wrinklefree.config.compose import load_config, read_config, saved_yaml
from wrinklefree.core.errors import UserError
from wrinklefree.runs import remote_paths
from wrinklefree.training import storage


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "config.json").write_text("{}")
    url = f"memory://a-bucket/{uuid.uuid4().hex}/stage"
    storage.push(tmp_path / "stage", url)
    return url


def paths(overrides: list[str], key: str) -> str:
    """The last value of `key`, which is the one that counts."""
    return [o.partition("=")[2] for o in overrides if o.startswith(f"{key}=")][-1]


@pytest.mark.parametrize("key", [key for key in remote_paths.READ if key not in remote_paths.LISTS])
def test_an_address_becomes_the_path_of_its_copy(url: str, key: str) -> None:
    copy = Path(paths(remote_paths.fetched([f"{key}={url}"]), key))
    assert (copy / "config.json").read_text() == "{}"


@pytest.mark.parametrize("given", ["[{url}]", "[./none,{url}]", '["{url}"]'])
def test_each_address_of_a_list_becomes_a_path(url: str, given: str) -> None:
    overrides = remote_paths.fetched(
        ["model=tiny", "training=fairy2_w2", f"training.start_from={given.format(url=url)}"]
    )
    start = load_config(overrides).training.start_from
    assert (Path(start[-1]) / "config.json").read_text() == "{}"
    assert start[:-1] == (["./none"] if "none" in given else [])


def test_what_is_no_address_stays(url: str) -> None:
    given = ["model=tiny", "data.path=builtin:corpus", "training.start_from=[w1,w2]", "distillation.teacher=org/name"]
    assert remote_paths.fetched(given) == given


def test_commands_read_a_copy_too(url: str) -> None:
    first, second = cli.here([url, "org/name"])
    assert cli.here(url) == first
    assert (Path(first) / "config.json").read_text() == "{}"
    assert cli.here("org/name") == second == "org/name"


def test_no_message_names_the_bucket_or_the_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise OSError("a-bucket: no answer from https://store.example:9000/a-bucket?list, host store.example:9000")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "find", refuse)
    with pytest.raises(UserError) as refused:
        storage.fetch(url)
    assert "a-bucket" not in str(refused.value)
    assert "example" not in str(refused.value)


def test_an_address_with_nothing_is_one_line(url: str) -> None:
    with pytest.raises(UserError, match=r"^memory://\.\.\./none: nothing there$"):
        remote_paths.fetched(["data.path=memory://a-bucket/none"])


def test_no_file_of_a_run_names_the_bucket(url: str, tmp_path: Path) -> None:
    config = load_config(["model=tiny", "training=fairy2_w2", f"training.upload_to={url}"])
    config.training.resume_from = f"latest,{url}/step_5"
    (tmp_path / "wrinklefree.yaml").write_text(saved_yaml(config))
    assert "a-bucket" not in (tmp_path / "wrinklefree.yaml").read_text()
    kept = read_config(tmp_path / "wrinklefree.yaml").training
    assert kept.upload_to == url.replace("a-bucket", "...")
    assert kept.resume_from == f"latest,{kept.upload_to}/step_5"
    assert config.training.upload_to == url
