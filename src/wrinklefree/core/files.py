"""Files that are whole or not there: written aside, flushed, renamed; a full disk is said in one line."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from wrinklefree.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, to write into.

    When the block ends well, the folder is renamed to `path`. When it does not, the folder is removed. An
    existing `path` is replaced only after the new folder is whole. Raises UserError when the disk is full.
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
    """A temporary path beside `path`, to write a file to.

    When the block ends well, the file replaces `path`. When it does not, the file is removed and `path` stays as it
    was. Raises UserError when the disk is full.
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


def rename(aside: Path, path: Path) -> None:
    """Put a whole file into its place; a file that is there is replaced at once."""
    aside.replace(path)


@contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """A full disk becomes a UserError; other errors stay what they are."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _disk_full(error):
            raise
        raise UserError(f"disk full while writing {path}: free some space; what was there before is whole") from error


def aside_of(path: Path) -> Path:
    """Where `path` is written before it has its name."""
    return path.with_name(f".{path.name}.tmp")


def _disk_full(error: BaseException) -> bool:
    """safetensors hands the operating system's error on as text alone, torch.save as the context of another error."""
    if isinstance(error, OSError):
        return error.errno in FULL
    if isinstance(error.__context__, OSError):
        return _disk_full(error.__context__)
    return any(f"(os error {code})" in str(error) for code in FULL)


def _flush(folder: Path) -> None:
    """Force every file of a folder to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            _flush_file(file)


def _flush_file(file: Path) -> None:
    """Force a file to the disk: a rename must not become durable before the content."""
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
