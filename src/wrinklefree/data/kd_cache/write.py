"""Writes a KD cache, shard by shard. An interrupted cache is continued."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from wrinklefree.core import replaced
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside, free_bytes
from wrinklefree.core.lock import locked
from wrinklefree.data.identity import differences
from wrinklefree.data.kd_cache.manifest import IDENTITY, MANIFEST, SPARE, Manifest, read_manifest, shard_name, shards_in
from wrinklefree.data.sources import Split

log = logging.getLogger("wrinklefree")


@contextmanager
def begin(folder: Path, wanted: Manifest, *, force: bool = False, allow_changes: bool = False) -> Iterator[Manifest]:
    """Lock `folder` for writing, and give the manifest to continue from.

    That is the manifest in the folder if it has the settings of `wanted`, or else `wanted`. With `force` it is always
    `wanted`, and the cache in the folder is deleted once a shard of the new one is written. With `allow_changes` the
    data may have changed.
    Raises UserError, and changes nothing, if the folder holds something else, if another process writes there, or if
    the disk is too small.
    """
    anew = force and (folder / MANIFEST).exists()
    if anew:
        check_disk(folder, wanted, sum(file.stat().st_size for file in shards_in(folder)))
    else:
        check_disk(folder, _manifest_to_continue(folder, wanted, allow_changes))
    with locked(folder):
        _put_back(folder)
        anew = force and (folder / MANIFEST).exists()
        if anew:
            replaced.set_aside(folder, [folder / MANIFEST, *shards_in(folder)])
        manifest = wanted if anew else _manifest_to_continue(folder, wanted, allow_changes)
        try:
            yield manifest if manifest.complete else write_manifest(folder, manifest)
        finally:
            _put_back(folder)


def _put_back(folder: Path) -> None:
    """Put back the cache that was to be replaced, if no shard of the new one was written."""
    new = [folder / MANIFEST] if (folder / MANIFEST).exists() else []
    if replaced.settle(folder, new, saved=bool(shards_in(folder))):
        log.info("%s: the earlier cache is there again, because no shard of the new one was written", folder)


def _manifest_to_continue(folder: Path, wanted: Manifest, allow_changes: bool) -> Manifest:
    """Return the manifest in `folder`, or `wanted` if the folder is empty. Raises UserError if the settings differ."""
    if (folder / MANIFEST).exists():
        present = read_manifest(folder)
        _check_same(folder, present, wanted, allow_changes)
        return present
    if folder.is_dir() and any(not file.match(".*") for file in folder.iterdir()):
        raise UserError(f"{folder}: not empty, and no KD cache: choose another folder")
    return wanted


def _check_same(folder: Path, present: Manifest, wanted: Manifest, allow_changes: bool) -> None:
    """Raises UserError, naming the first difference, if a cache was written from another teacher or other data.

    With `allow_changes`, a difference in the data is a warning.
    """
    changed = differences(_compared(present, present), _compared(wanted, present))
    for key, (old, new) in changed.items():
        if allow_changes and key in ("data_fingerprint", *present.data.get(IDENTITY, {})):
            log.warning("data.allow_changes=true: %s holds a KD cache with %s=%s, not %s", folder, key, old, new)
        else:
            raise UserError(
                f"{folder}: holds a KD cache with {key}={old}, not {new}: choose another folder, or --force"
            )


def _compared(manifest: Manifest, present: Manifest) -> dict[str, Any]:
    """Return what has to be equal for the cache `present` to be continued.

    Names of the teacher and the tokenizer may differ if their fingerprints are equal. The data is compared by content,
    but by the settings that version 0.1 wrote if `present` is of that version.
    """
    values = dataclasses.asdict(manifest.settings)
    data = values.pop("data")
    for name in ("teacher", "tokenizer"):
        if values[f"{name}_fingerprint"]:
            del values[name]
    if IDENTITY in present.data:
        return values | data.get(IDENTITY, {})
    if "source" in present.data:  # its fingerprint of the data has the spelling of the path in it
        del values["data_fingerprint"]
    return values | {f"data.{key}": data.get(key) for key in present.data}


def check_disk(folder: Path, manifest: Manifest, freed: int = 0) -> None:
    """Log how large the cache will be. Raises UserError if the disk has no room for the part that is missing.

    `freed` are bytes that are not free yet but will be.
    """
    if manifest.complete:  # even if it has fewer sequences than asked for: its data ended early
        return
    whole = manifest.predicted_bytes(manifest.num_train, manifest.num_heldout)
    missing = whole - (manifest.count("train") + manifest.count("heldout")) * manifest.sequence_bytes
    free = free_bytes(folder) + freed
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
    """Write one shard for each split in `new`, then the manifest that counts them. Returns that manifest."""
    # The manifest comes last. A shard that it does not count yet is written again when the cache is continued.
    shards = dict(manifest.shards)
    for split, tensors in new.items():
        _write_shard(folder / shard_name(split, len(shards[split])), manifest, tensors)
        shards[split] = [*shards[split], len(tensors["input_ids"])]
    written = write_manifest(folder, dataclasses.replace(manifest, shards=shards, position=position))
    replaced.let_go(folder)
    return written


def _write_shard(target: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    num = len(tensors["input_ids"])
    stored = {name: tensors[name].to(dtype).contiguous() for name, (dtype, _) in manifest.shapes(num).items()}
    _put(target, lambda aside: save_file(stored, aside, metadata={"kd_cache": manifest.key}))


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Mark the cache as complete. Raises UserError if it has no sequence to train on, or none held out."""
    if not (manifest.count("train") and manifest.count("heldout")):
        raise UserError(
            f"{folder}: {manifest.count('train')} sequences to train on, {manifest.count('heldout')} held out: "
            f"a cache needs both"
        )
    return write_manifest(folder, dataclasses.replace(manifest, complete=True, position=None))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, whole or not at all, and return it."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    _put(folder / MANIFEST, lambda aside: aside.write_text(text))
    return manifest


def _put(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all. Raises UserError if writing fails."""
    try:
        with file_aside(target) as aside:
            write(aside)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target}: cannot be written ({error}); the cache so far is whole, and the same command continues it"
        ) from error
