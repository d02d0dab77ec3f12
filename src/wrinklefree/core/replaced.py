"""Keeps what `--force` replaces in `.replaced/`, until the first output of the new run is written.

set_aside(folder, old)         at the start
let_go(folder)                 once the first output is written
settle(folder, new, saved)     at the end, and at the next start, after a kill: puts it back if nothing new was saved

Each of them may be killed midway. So files are moved one by one only in `.replacing/`, whose files are never new ones,
and removed only in `.let_go/`, which nobody puts back.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

NAME, MOVING, GONE = ".replaced", ".replacing", ".let_go"


def set_aside(folder: Path, old: Iterable[Path]) -> None:
    """Move the files and folders `old`, which lie in `folder`, out of the way."""
    move(old, folder / MOVING).rename(folder / NAME)


def let_go(folder: Path) -> None:
    """Remove what was set aside, if anything was."""
    if (folder / NAME).is_dir():
        shutil.rmtree(folder / GONE, ignore_errors=True)
        (folder / NAME).rename(folder / GONE)
    shutil.rmtree(folder / GONE, ignore_errors=True)


def settle(folder: Path, new: Iterable[Path], saved: bool) -> bool:
    """Remove what was set aside if something new was `saved`; if not, remove `new` and put it back.

    Returns whether anything was put back.
    """
    if saved:
        let_go(folder)
    aside, moving = folder / NAME, folder / MOVING
    if aside.is_dir():
        for path in new:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        aside.rename(moving)
    if not moving.is_dir():
        return False
    for path in moving.iterdir():
        path.rename(folder / path.name)
    moving.rmdir()
    return True


def move(paths: Iterable[Path], folder: Path) -> Path:
    """Make `folder` and move files and folders into it. Returns it."""
    folder.mkdir(parents=True)
    for path in paths:
        path.rename(folder / path.name)
    return folder
