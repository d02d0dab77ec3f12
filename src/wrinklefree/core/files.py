"""Writes files and folders so that a crash never leaves half of one, and reads those of others with limits.

Writing: write aside, flush, then rename. Reading: names stay inside their folder, JSON has a largest size and depth.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError

from wrinklefree.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)

LARGEST_JSON = 1 << 28  # bytes; the largest tokenizer.json in use has 35 MB

DEEPEST_JSON = 64  # nested lists and objects; a config has about 6


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` to write into, and rename it to `path` when the block ends.

    If the block raises, the folder is removed. An existing `path` is replaced only after the new folder is complete.
    Raises UserError if the disk is full.
    """
    aside = aside_of(path)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with full_disk_said(path):
            aside.mkdir(parents=True)
            yield aside
            _flush(aside)
            _replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file to, and rename it to `path` when the block ends.

    If the block raises, the file is removed and `path` stays as it was. Raises UserError if the disk is full.
    """
    aside = aside_of(path)
    try:
        with full_disk_said(path):
            yield aside
            _flush_file(aside)
            rename(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, whole or not at all. Raises UserError if the disk is full."""
    with file_aside(path) as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def rename(aside: Path, path: Path) -> None:
    """Rename the file `aside` to `path`. A reader sees the old file or the new one, never half of one."""
    aside.replace(path)


@contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """Turn "disk full" errors of the block into a UserError that names `path`. Other errors pass through."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _disk_full(error):
            raise
        raise UserError(f"disk full while writing {path}: free some space; earlier files are unharmed") from error


def free_bytes(path: Path) -> int:
    """Return how much is free on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (path, *path.resolve().parents) if place.exists())).free


def inner_path(folder: Path, name: Any, where: str = "") -> Path:
    """Return `folder / name` for a name that a file or a store gave.

    `where` says in the message who gave it. By default this is `folder`.
    Raises UserError if the name is not text, or if it leads out of the folder on any operating system.
    """
    if not isinstance(name, str) or not _stays_inside(name):
        raise UserError(f"{where or folder}: the name {str(name)[:200]!r} leads out of the folder: not read or written")
    return folder / name


def _stays_inside(name: str) -> bool:
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    outside = windows.drive or windows.root or posix.root or ".." in windows.parts  # Windows splits at both slashes
    return bool(posix.parts) and not outside and name.isprintable() and "\\" not in name


def read_json(file: Path, largest: int = LARGEST_JSON) -> Any:
    """Read a JSON file. Raises UserError if it is missing, not JSON, too large or nested too deeply."""
    try:
        size = file.stat().st_size
        if size > largest:
            raise UserError(f"{file}: {size:,} bytes, more than the {largest:,} that such a file may have")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    return parse_json(data, str(file))


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON. `where` names its file in messages. Raises UserError if it is not JSON or nested too deeply."""
    try:
        values = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{where}: not readable JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested more than {DEEPEST_JSON} deep") from error
    _check_depth(values, where)
    return values


def _check_depth(values: Any, where: str) -> None:
    level = [values]
    for _ in range(DEEPEST_JSON):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise UserError(f"{where}: nested more than {DEEPEST_JSON} deep")


def _inside(value: Any) -> list[Any]:
    """The lists and objects directly in `value`."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in parts if isinstance(part, (dict, list))]


def aside_of(path: Path) -> Path:
    """The temporary path beside `path`: `.NAME.tmp`."""
    return path.with_name(f".{path.name}.tmp")


def _disk_full(error: BaseException) -> bool:
    """Whether the disk was full or the user's quota used up."""
    if isinstance(error, OSError):
        return error.errno in FULL
    if isinstance(error.__context__, OSError):  # torch.save raises an error of its own on top
        return _disk_full(error.__context__)
    return any(f"(os error {code})" in str(error) for code in FULL)  # safetensors passes only the text on


def _flush(folder: Path) -> None:
    """Flush every file of a folder to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            _flush_file(file)


def _flush_file(file: Path) -> None:
    """Flush a file to the disk. Without it, a crash may keep the rename but lose the content."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _replace(aside: Path, path: Path) -> None:
    if not path.exists():
        aside.rename(path)
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    aside.rename(path)
    shutil.rmtree(old)
