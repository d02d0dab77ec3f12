"""Write files and folders so that a crash never leaves half of one: write aside, flush, then rename."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from wrinklefree.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


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
