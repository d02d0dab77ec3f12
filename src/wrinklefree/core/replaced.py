"""Keeps what `--force` replaces in `.replaced/`, until the first output of the new run is written.

set_aside(folder, old)     at the start
let_go(folder)             after the first output
put_back(folder, new)      if there was no output; after a kill, at the next start
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

NAME = ".replaced"


def set_aside(folder: Path, old: Iterable[Path]) -> None:
    """Move the files and folders `old`, which lie in `folder`, out of the way."""
    move(old, folder / NAME)


def let_go(folder: Path) -> None:
    """Remove what was set aside, if anything was."""
    shutil.rmtree(folder / NAME, ignore_errors=True)


def put_back(folder: Path, new: Iterable[Path]) -> bool:
    """Put back what was set aside, and remove `new`. Returns whether there was anything to put back."""
    aside = folder / NAME
    if not aside.is_dir():
        return False
    for path in new:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in aside.iterdir():
        path.rename(folder / path.name)
    aside.rmdir()
    return True


def move(paths: Iterable[Path], folder: Path) -> Path:
    """Make `folder` and move files and folders into it. Returns it."""
    folder.mkdir(parents=True)
    for path in paths:
        path.rename(folder / path.name)
    return folder
