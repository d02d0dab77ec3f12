"""Writing a KD cache, shard by shard; an interrupted one goes on."""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside
from wrinklefree.data.kd_cache.manifest import MANIFEST, SPARE, Manifest, read_manifest, shard_name, shards_in
from wrinklefree.data.sources import Split

log = logging.getLogger("wrinklefree")


@contextmanager
def begin(folder: Path, wanted: Manifest, *, force: bool = False) -> Iterator[Manifest]:
    """Hold `folder` for writing, and give where to go on: `wanted`, or the cache of these settings that is there.

    With `force` always `wanted`, in the place of the cache that is there. Raises UserError where the folder holds
    something else, or another process writes there, or the disk is too small: then all is left as it was.
    """
    anew = force and (folder / MANIFEST).exists()
    if anew:
        check_disk(folder, wanted, sum(file.stat().st_size for file in shards_in(folder)))
    else:
        check_disk(folder, _found(folder, wanted))
    with _alone(folder):
        if anew:
            write_manifest(folder, wanted)  # first, or a kill would leave one of files that are gone
            for file in shards_in(folder):
                file.unlink()
        manifest = _found(folder, wanted)
        yield manifest if manifest.complete else write_manifest(folder, manifest)


def _found(folder: Path, wanted: Manifest) -> Manifest:
    """The cache of these settings that is in `folder`, or else `wanted`."""
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        _check_same(folder, found, wanted)
        return found
    if folder.is_dir() and any(not file.match(".*.tmp") for file in folder.iterdir()):
        raise UserError(f"{folder}: not empty, and no KD cache: choose another folder")
    return wanted


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other processes from writing a cache there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}: choose another folder") from error
    try:
        _lock(folder, handle)
        yield
    finally:
        os.close(handle)  # which unlocks, as does the end of the process


def _lock(folder: Path, handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder}: another process is writing it: wait for that one, or choose another") from error
    except OSError:
        log.info("%s: cannot be locked on this file system: let no other process write there", folder)


def _check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    mine, other = dataclasses.asdict(wanted.settings), dataclasses.asdict(found.settings)
    different = [key for key in mine if mine[key] != other[key]]
    if different:
        key = different[0]
        raise UserError(
            f"{folder}: holds a KD cache with {key}={other[key]}, not {mine[key]}: choose another folder, or --force"
        )


def check_disk(folder: Path, manifest: Manifest, freed: int = 0) -> None:
    """Say how large the cache will be. Raises UserError where the disk has no room for what is missing.

    `freed` are bytes that will be free by then. A complete cache needs none: its data may have ended early.
    """
    if manifest.complete:
        return
    whole = manifest.predicted_bytes(manifest.num_train, manifest.num_heldout)
    missing = whole - (manifest.count("train") + manifest.count("heldout")) * manifest.sequence_bytes
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free + freed
    log.info(
        "%d + %d sequences of %d tokens, top %d, %d random: %.4g MB, %.4g MB of them missing; %.4g MB free",
        *(manifest.num_train, manifest.num_heldout, manifest.length, manifest.topk, manifest.negatives),
        *(size / 1e6 for size in (whole, missing, free)),
    )
    if missing * SPARE > free:
        raise UserError(
            f"{folder}: the cache needs {missing / 1e9:.3g} GB more, the disk has {free / 1e9:.3g} GB free: "
            f"fewer sequences, a smaller --topk or --rand-neg, or another disk"
        )


def append(
    folder: Path, manifest: Manifest, new: Mapping[Split, Mapping[str, Tensor]], position: dict[str, Any] | None
) -> Manifest:
    """Write a shard of each split in `new`, then the manifest that counts them, and return that.

    All are renamed into place. A shard that no manifest counts yet is written again by whoever goes on.
    """
    shards = dict(manifest.shards)
    for split, tensors in new.items():
        _write_shard(folder / shard_name(split, len(shards[split])), manifest, tensors)
        shards[split] = [*shards[split], len(tensors["input_ids"])]
    return write_manifest(folder, dataclasses.replace(manifest, shards=shards, position=position))


def _write_shard(target: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    num = len(tensors["input_ids"])
    stored = {name: tensors[name].to(dtype).contiguous() for name, (dtype, _) in manifest.shapes(num).items()}
    _put(target, lambda aside: save_file(stored, aside, metadata={"kd_cache": manifest.key}))


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Say that all is there. Raises UserError for a cache without a sequence to train or to evaluate on."""
    if not (manifest.count("train") and manifest.count("heldout")):
        raise UserError(
            f"{folder}: {manifest.count('train')} sequences to train on, {manifest.count('heldout')} held out"
        )
    return write_manifest(folder, dataclasses.replace(manifest, complete=True, position=None))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    _put(folder / MANIFEST, lambda aside: aside.write_text(text))
    return manifest


def _put(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all. Raises UserError if that fails."""
    try:
        with file_aside(target) as aside:
            write(aside)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written ({error}): what is there is whole, go on later") from error
