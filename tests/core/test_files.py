"""A folder that is written aside appears whole or not at all."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.core import replaced
from wrinklefree.core.files import written_aside


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "best"
    for text in ("old", "new"):
        with written_aside(path) as aside:
            (aside / "file").write_text(text)
    with pytest.raises(IsADirectoryError), written_aside(path) as aside:
        aside.write_text("half")
    assert (path / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


class KilledError(BaseException):
    """What stands for a kill."""


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The renames and removals from the one with this number on do nothing but raise."""
    left = iter(range(number))

    def counted(original: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if next(left, None) is None:
                raise KilledError
            return original(*args, **more)

        return call

    for owner, names in ((Path, ("rename", "unlink", "rmdir", "mkdir")), (shutil, ("rmtree",))):
        for name in names:
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


OLD = {"a": "old", "b": "old", "c": "old"}


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def replace_files(folder: Path, saved: bool) -> None:
    """What a run with `--force` does."""
    replaced.set_aside(folder, [folder / name for name in OLD])
    (folder / "a").write_text("new")
    if saved:
        replaced.let_go(folder)
    else:
        replaced.settle(folder, [folder / "a"], saved=False)


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("saved", [False, True])
def test_what_is_replaced_is_whole_after_a_kill_at_any_moment(
    tmp_path: Path, number: int, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    with monkeypatch.context() as patch, suppress(KilledError):
        killed_at(number, patch)
        replace_files(tmp_path, saved)
    done = saved and content(tmp_path).get("a") == "new"
    replaced.settle(tmp_path, [path for path in tmp_path.iterdir() if path.is_file()], saved=done)
    assert content(tmp_path) == ({"a": "new"} if done else OLD)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
