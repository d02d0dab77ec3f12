"""A KD cache is whole or not at all: kills, full disks and damage leave no half of one that would be read."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from kd_caches import LENGTH, KilledError, contents, dies_at, make
from safetensors.torch import load_file, save_file
from tiny import tokenizer

from wrinklefree.commands import cache
from wrinklefree.config.schema import DataConfig
from wrinklefree.core import files, replaced
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.manifest import MANIFEST, read_manifest
from wrinklefree.data.kd_cache.read import KDCache
from wrinklefree.data.kd_cache.write import begin
from wrinklefree.data.open import training_stream


@pytest.mark.parametrize(
    "died", [("append", 0), ("append", 1), ("append", 3), ("write_manifest", 1), ("write_manifest", 2), ("rename", 5)]
)
def test_a_cache_that_was_interrupted_gets_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: tuple[str, int]
) -> None:
    """Killed between shards, after a shard but before the manifest that counts it, and before a rename."""
    with monkeypatch.context() as patch:
        dies_at(patch, *died)
        with pytest.raises(KilledError):
            make(folder, tmp_path / "cache", negatives=20)
    with pytest.raises(UserError, match="not finished"):
        KDCache(tmp_path / "cache")
    make(folder, tmp_path / "cache", negatives=20)
    assert contents(tmp_path / "cache") == contents(folder / "random")


def test_data_that_ends_gives_each_sequence_once(folder: Path, tmp_path: Path) -> None:
    manifest = make(folder, tmp_path / "cache", num_train=10_000, shard_size=32)
    found = KDCache(tmp_path / "cache").batch("train", range(manifest.count("train")))
    config = DataConfig(source="local", path=str(folder / "text"))
    stream = training_stream(config, tokenizer(), batch_size=1, length=LENGTH, seed=42)
    expected = []
    while not stream.state_dict()["epoch"]:
        expected.append(next(stream)["input_ids"])
    assert torch.equal(found["input_ids"], torch.cat(expected[:-1]))
    assert contents(tmp_path / "cache") == contents(_again(folder, tmp_path / "cache"))


def _again(folder: Path, out: Path) -> Path:
    """A finished cache is left as it is."""
    make(folder, out, num_train=10_000, shard_size=32)
    return out


def test_another_cache_is_not_overwritten_without_force(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "cache", num_train=4)
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="a KD cache with topk=8, not 4"):
        make(folder, tmp_path / "cache", num_train=4, topk=4)
    assert make(folder, tmp_path / "cache", num_train=4, topk=4, force=True).topk == 4
    assert (tmp_path / "cache" / "notes.txt").exists()
    with pytest.raises(UserError, match="not empty, and no KD cache"):
        make(folder, folder / "text", force=True)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs .* GB more, the disk has 1e-06 GB free"):
        make(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_force_keeps_the_old_cache_until_a_new_shard_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, tmp_path / "cache", num_train=8)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(cache, "Teacher", lambda *args: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            make(folder, tmp_path / "cache", num_train=4, force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    (tmp_path / "cache" / ".replaced").mkdir()  # as a kill before the first shard leaves it
    for name in before:
        (tmp_path / "cache" / name).rename(tmp_path / "cache" / ".replaced" / name)
    make(folder, tmp_path / "cache", num_train=8)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    replaced.set_aside(tmp_path / "cache", [tmp_path / "cache" / name for name in before])
    assert make(folder, tmp_path / "cache", num_train=4, force=True).count("train") == 4


def test_force_on_a_disk_that_is_too_small_leaves_the_old_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the old one takes counts as free."""
    shutil.copytree(folder / "cache", tmp_path / "cache")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB more"):
        make(folder, tmp_path / "cache", num_train=80, force=True)
    assert contents(tmp_path / "cache") == contents(folder / "cache")
    (tmp_path / "cache" / ".train-00007.safetensors.tmp").touch()  # of a process that was killed
    assert make(folder, tmp_path / "cache", num_train=20, force=True).count("train") == 20
    assert {path.name for path in (tmp_path / "cache").iterdir()} < contents(folder / "cache").keys()


def test_a_complete_cache_of_data_that_ended_early_needs_no_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, tmp_path / "cache", num_train=10_000)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert make(folder, tmp_path / "cache", num_train=10_000).complete


@pytest.mark.parametrize("name", ["manifest.json", "train-00001.safetensors"])
def test_a_disk_that_fills_up_is_said_and_the_cache_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(aside: Path, target: Path) -> None:
        if target.name == name:
            raise OSError(28, "No space left on device")
        aside.replace(target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", full)
        with pytest.raises(UserError, match=f"disk full while writing .*{name}"):
            make(folder, tmp_path / "cache")
    make(folder, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(folder / "cache")


def test_where_no_folder_can_be_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UserError, match=f"{out}: .*: choose another folder"):
            make(folder, out)


def test_what_a_kill_left_before_the_first_manifest_is_no_obstacle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".{MANIFEST}.tmp").touch()
    assert make(folder, tmp_path / "cache").complete


def test_two_processes_do_not_write_one_cache(folder: Path, tmp_path: Path) -> None:
    wanted = read_manifest(folder / "cache").settings
    with begin(tmp_path / "cache", wanted), pytest.raises(UserError, match="another process is writing it"):
        make(folder, tmp_path / "cache")
    assert make(folder, tmp_path / "cache").complete


def cut(cache: Path) -> None:
    file = cache / "train-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def swap(cache: Path) -> None:
    shutil.copy(cache.parent / "other" / "train-00001.safetensors", cache / "train-00001.safetensors")


def reshape(cache: Path) -> None:
    file = cache / "train-00001.safetensors"
    kept = {name: tensor[:3] for name, tensor in load_file(file).items()}
    save_file(kept, file, metadata={"kd_cache": read_manifest(cache).key})


def retype(cache: Path) -> None:
    file = cache / "train-00001.safetensors"
    tensors = load_file(file)
    kept = tensors | {"topk_logits": tensors["topk_logits"].int()}
    save_file(kept, file, metadata={"kd_cache": read_manifest(cache).key})


def relabel(cache: Path, **values: object) -> None:
    file = cache / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


BROKEN = {
    "truncated": (cut, "train-00001.safetensors: truncated"),
    "missing": (lambda c: (c / "heldout-00000.safetensors").unlink(), "heldout-00000.safetensors: missing"),
    "of another cache": (swap, "train-00001.safetensors: belongs to another cache"),
    "of other shapes": (reshape, "train-00001.safetensors: holds"),
    "of other types": (retype, "train-00001.safetensors: holds"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), "no manifest.json, so no KD cache"),
    "no JSON": (lambda c: (c / MANIFEST).write_text("{"), "not readable JSON"),
    "another JSON": (lambda c: (c / MANIFEST).write_text("{}"), "not the manifest of a KD cache"),
    "other settings": (partial(relabel, topk=9), "belongs to another cache"),
    "impossible settings": (partial(relabel, topk=0), "top 0 and 0 random ones of 96 words"),
    "no split": (partial(relabel, shards={"train": [16, 16, 8]}), "not the manifest of a KD cache .*shards"),
    "negative counts": (partial(relabel, shards={"train": [-1], "heldout": [6]}), "not the manifest of a KD cache"),
    "complete and empty": (partial(relabel, shards={"train": [], "heldout": [6]}), "complete, without a sequence"),
    "a later version": (partial(relabel, version=3), "format wrinklefree_kd_cache 3, this version reads"),
    "not finished": (partial(relabel, complete=False), "not finished: run the same `wf cache` again"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_what_is_no_whole_cache_is_refused_in_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    shutil.copytree(folder / "random", tmp_path / "other")
    act, message = BROKEN[damage]
    act(tmp_path / "cache")
    with pytest.raises(UserError, match=message) as error:
        KDCache(tmp_path / "cache")
    assert "\n" not in str(error.value)
