"""The stream of a KD cache has exact positions, and each sequence once an epoch in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kd_caches import LENGTH, take
from tiny import tokenizer

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache import read
from wrinklefree.data.kd_cache.manifest import Manifest
from wrinklefree.data.kd_cache.read import KDCache, KDStream
from wrinklefree.data.kd_cache.write import append, finish
from wrinklefree.data.open import training_stream


def stream(folder: Path, **values: int) -> KDStream:
    return KDStream(KDCache(folder / "cache"), **({"batch_size": 3, "seed": 1} | values))


@pytest.mark.parametrize("before", [0, 1, 13, 14, 30])  # 40 sequences: the 14th batch goes on in the second epoch
def test_a_position_is_exact(folder: Path, before: int) -> None:
    whole, other = stream(folder), stream(folder)
    expected = take(whole, before + 4)[before:]
    first = stream(folder)
    take(first, before)
    other.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(take(other, 4), expected, strict=True))


def test_an_epoch_has_every_sequence_once_in_an_order_of_its_own(folder: Path) -> None:
    batches = stream(folder, batch_size=8)
    epochs = [torch.cat(take(batches, 5)) for _ in range(2)]
    everything = KDCache(folder / "cache").batch("train", range(40))["input_ids"]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(everything.tolist())


def test_processes_share_the_batches_of_one(folder: Path) -> None:
    whole = take(stream(folder, batch_size=4), 5)
    halves = [take(stream(folder, batch_size=2, rank=rank, world_size=2), 5) for rank in range(2)]
    assert torch.equal(torch.cat(whole), torch.cat([row for pair in zip(*halves, strict=True) for row in pair]))


def test_a_position_of_another_cache_or_of_text_is_refused(folder: Path) -> None:
    other = KDStream(KDCache(folder / "full"), batch_size=3, seed=1)
    text = training_stream(
        DataConfig(source="local", path=str(folder / "text")), tokenizer(), batch_size=2, length=LENGTH, seed=1
    )
    for position in (other.state_dict(), stream(folder, seed=2).state_dict(), text.state_dict()):
        with pytest.raises(UserError, match="resume with the same data and seed"):
            stream(folder).load_state_dict(position)


def test_few_shards_are_mapped_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = KDCache(folder / "cache").batch("train", range(40))["input_ids"]
    monkeypatch.setattr(read, "OPEN_SHARDS", 2)
    cache = KDCache(folder / "cache")
    for row in (0, 39, 20, 1, 17, 38):
        assert torch.equal(cache.batch("train", [row])["input_ids"][0], expected[row])
        assert len(cache._open) <= 2


def test_reading_takes_the_memory_of_a_batch(tmp_path: Path) -> None:
    """170 MB on disk, in a process of its own: what it holds beside mapped files grows by a fraction of that."""
    values = dict.fromkeys(("teacher", "teacher_fingerprint", "tokenizer", "tokenizer_fingerprint", "precision"), "x")
    sizes = {"vocab_size": 50_000, "length": 128, "topk": 128, "negatives": 0, "shard_size": 512, "seed": 0}
    counts = {"num_train": 2048, "num_heldout": 512}
    manifest = Manifest(**values, **sizes, **counts, data={}, data_fingerprint="x", tail="exact")
    (tmp_path / "cache").mkdir()
    shard = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in manifest.shapes(512).items()}
    shard["learned"].fill_(1)  # a cache without labels is refused
    manifest = append(tmp_path / "cache", manifest, {"heldout": shard}, None)
    for _ in range(4):
        manifest = append(tmp_path / "cache", manifest, {"train": shard}, None)
    finish(tmp_path / "cache", manifest)
    program = (
        "import sys; from pathlib import Path\n"
        "from wrinklefree.data.kd_cache.read import KDCache, KDStream\n"
        "def held(): return next(int(s.split()[1]) for s in open('/proc/self/status') if s.startswith('RssAnon'))\n"
        "stream = KDStream(KDCache(Path(sys.argv[1])), batch_size=8, seed=0); next(stream); before = held()\n"
        "for _ in range(256): next(stream)\n"
        "print(held() - before)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc to tell mapped from held memory")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "cache")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20_000  # kB
