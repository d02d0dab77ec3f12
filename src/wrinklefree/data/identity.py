"""Tells whether a saved position belongs to this data, by the content of files and the settings that make text of them.

A checkpoint keeps this identity, and a resume compares it. Paths are not part of it, but names of files in a folder
are, because they give the order. Version 0.1 kept the spelling of the path instead; its positions are compared by that.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.data.chat import short

log = logging.getLogger("wrinklefree")

Identity = dict[str, Any]

# A file of up to 1 MB is hashed whole. Of a larger one, blocks from its head to its tail are.
BLOCK, BLOCKS = 1 << 16, 16

# Other values of these name the same rows in the same order, so that a position keeps its place.
SAME_ROWS = {
    *("seed", "shuffle_buffer", "tokenizer", "data.text_column", "data.format", "data.mask_prompt"),
    *("data.heldout_path", "data.heldout_split"),
}


def files_identity(path: str, files: Sequence[Path]) -> dict[str, str]:
    """Return {name: size and fingerprint} of the files of `path`, in their order."""
    root = Path(path).expanduser()
    names = [file.name if file == root else file.relative_to(root).as_posix() for file in files]
    return {name: file_identity(file) for name, file in zip(names, files, strict=True)}


def folder_identity(folder: Path) -> dict[str, str]:
    """Return {name: size and fingerprint} of all files of a folder, but hidden ones."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = files_identity(str(folder), files)
    return {name: value for name, value in found.items() if not f"/{name}".count("/.")}


def file_identity(path: Path) -> str:
    """Return a file's size and fingerprint. Raises UserError if it cannot be read."""
    try:
        about = path.stat()
        return f"{about.st_size} bytes, {_hashed(path, about.st_size, about.st_mtime_ns)}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=1 << 16)
def _hashed(path: Path, size: int, changed: int) -> str:
    """Hash a file. `changed`, its modification time, makes the cache miss after an edit."""
    digest = blake2b(digest_size=8)
    last = max(0, size - BLOCK)
    starts = range(0, size, BLOCK) if size <= BLOCK * BLOCKS else [last * i // (BLOCKS - 1) for i in range(BLOCKS)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return what differs, as {setting: (saved, now)}, for messages."""
    keys = [*now, *(key for key in saved if key not in now)]
    return {key: _told(saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)}


def _told(old: Any, new: Any) -> tuple[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return _files_difference(old, new)
    told = [f"{len(value)} files" if isinstance(value, dict) else short(value) for value in (old, new)]
    return told[0], told[1]


def _files_difference(old: dict[str, str], new: dict[str, str]) -> tuple[str, str]:
    """Return what the first difference between two lists of files is."""
    gone = [name for name in old if name not in new]
    added = [name for name in new if name not in old]
    if gone or added:
        return _one_file(gone, old, added), _one_file(added, new, gone)
    name = next((name for name in old if old[name] != new[name]), None)
    if name is None:
        return "files in another order", "these"
    return f"{name} ({old[name]})", f"{name} ({new[name]})"


def _one_file(names: list[str], files: dict[str, str], others: list[str]) -> str:
    return f"{names[0]} ({files[names[0]]})" if names else f"no {others[0]}"


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], allow: bool) -> set[str]:
    """Return the settings that differ, which is none unless `allow`.

    Raises UserError, naming each setting with both values, if a setting differs; with `allow` this is a warning.
    """
    changed = differences(saved, now)
    if not changed:
        return set()
    told = "; ".join(f"saved with {key}={old}, this run has {new}" for key, (old, new) in changed.items())
    if not allow:
        raise UserError(
            f"the data position was {told}: resume with the same data and seed, allow the change with "
            f"data.allow_changes=true, or start anew from the checkpoint's weights"
        )
    log.warning("data.allow_changes=true: the data position was %s", told)
    return set(changed)


def keeps_place(changed: set[str], saved: Mapping[str, Any], now: Mapping[str, Any], file: int | None) -> bool:
    """Whether a saved place in the rows is one of this run's rows, although these settings changed.

    In files it is if the names up to the current one, number `file`, are the same.
    """
    changed = changed - SAME_ROWS
    if changed != {"data.path"} or file is None:
        return not changed
    old, new = saved.get("data.path"), now.get("data.path")
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return False
    return list(old)[: file + 1] == list(new)[: file + 1]
