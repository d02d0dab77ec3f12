"""Caches of other tools' `.pt` files are imported as what they are, or refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_caches import KilledError, contents, dies_at
from tiny import VOCAB, llama
from torch import Tensor
from toyrun import toy_files
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.commands import cache as command
from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.read import KDCache
from wrinklefree.objectives.kinds.cached_kd import Objective as CachedKD
from wrinklefree.objectives.losses import NEVER


def upstream(folder: Path, *, negatives: int = 0, **changes: Any) -> Path:
    """A cache of `.pt` files as upstream writes it, of the toy model, 3 files of 30, 30 and 5 sequences."""
    out = folder / f"upstream{negatives}"
    out.mkdir()
    draw = torch.Generator().manual_seed(0)
    meta = {"format": "qwen_kd_topk_cache_v1", "teacher_model": "toy", "tokenizer": str(folder / "toy")}
    meta |= {"max_length": 16, "topk": 8, "rand_neg": negatives, "num_sequences": 65, "vocab_size": VOCAB}
    (out / "meta.json").write_text(json.dumps(meta | changes))
    for number, count in enumerate((30, 30, 5)):
        ids = torch.randint(VOCAB, (count, 16), generator=draw)
        with torch.no_grad():
            logits = llama()(ids).logits[:, :-1]
        shard = {"input_ids": ids.int(), "attention_mask": torch.ones(count, 16, dtype=torch.uint8)}
        shard |= {"topk_idx": logits.topk(8).indices.int(), "topk_logits": logits.topk(8).values.half()}
        if negatives:
            chosen = torch.randint(VOCAB, (count, 15, negatives), generator=draw)
            shard |= {"rand_idx": chosen.int(), "rand_logits": logits.gather(-1, chosen).half()}
        torch.save(shard, out / f"shard_{number:05}.pt")
    return out


def all_sequences(out: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Held-out and training sequences in one, by their tokens."""
    cache = KDCache(out)
    batches = [cache.batch(split, range(cache.manifest.count(split))) for split in ("heldout", "train")]
    return batches[0]["input_ids"], {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


@pytest.mark.numeric
@pytest.mark.parametrize("negatives", [0, 400])
def test_upstreams_cache_can_be_imported(folder: Path, tmp_path: Path, negatives: int) -> None:
    shutil.copytree(folder / "toy", tmp_path / "toy")
    command.take_over(upstream(tmp_path, negatives=negatives), tmp_path / "out", None, False)
    held, found = all_sequences(tmp_path / "out")
    assert (len(held), len(found["input_ids"])) == (5, 65)
    with torch.no_grad():
        logits = llama()(found["input_ids"]).logits[:, :-1]
    assert torch.equal(found["kd_ids"][..., :8], logits.topk(8).indices)
    torch.testing.assert_close(found["kd_logits"][..., :8], logits.topk(8).values, atol=1e-3, rtol=1e-3)
    assert torch.equal(found["position_ids"], torch.arange(16).expand(65, -1))  # one document, as its teacher read it
    assert ("kd_rest" in found) == bool(negatives)
    if negatives:
        whole = torch.cat([found["kd_logits"], found["kd_rest"].unsqueeze(-1)], -1).logsumexp(-1)
        torch.testing.assert_close(whole, logits.logsumexp(-1), atol=0.2, rtol=0)  # an estimate
        used = found["kd_logits"] > NEVER
        ids = found["kd_ids"].masked_fill(~used, -1)
        assert all(len(row[row >= 0].unique()) == (row >= 0).sum() for row in ids.flatten(0, 1)[:50])
    student, config = llama(intermediate_size=128), DistillationConfig(name="logits", weight=1.0)
    loss, _ = next(CachedKD(student, config)(found))
    assert loss.isfinite()


@pytest.mark.parametrize("given", [["--topk", "8"], ["--length", "16"], ["seed=3"]])
def test_what_means_nothing_to_an_import_is_refused(tmp_path: Path, given: list[str]) -> None:
    toy_files(tmp_path)
    words = ["cache", "--import", str(upstream(tmp_path)), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, [*words, *given]).exit_code == 2
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, words).exit_code == 0


def test_an_interrupted_import_gets_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_files(tmp_path)
    source = upstream(tmp_path)
    command.take_over(source, tmp_path / "whole", None, False)
    with monkeypatch.context() as patch:
        dies_at(patch, "write_manifest", 1)
        with pytest.raises(KilledError):
            command.take_over(source, tmp_path / "out", None, False)
    command.take_over(source, tmp_path / "out", None, False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class Code:
    """A pickle that runs something."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.mark,)


NOT_TENSORS = {"a tensor": torch.zeros(3), "nothing": None, "a number": {"input_ids": 3}}


def damaged(kind: str, source: Path) -> None:
    file = source / "shard_00001.pt"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-500])
    elif kind == "pickled code":
        torch.save({"input_ids": Code(source / "ran")}, file)
    elif kind == "shapes":
        torch.save(torch.load(file) | {"topk_idx": torch.zeros(30, 15, 7, dtype=torch.int32)}, file)
    elif kind == "ids":
        torch.save(torch.load(file) | {"topk_idx": torch.full((30, 15, 8), 999, dtype=torch.int32)}, file)
    elif kind in NOT_TENSORS:
        torch.save(NOT_TENSORS[kind], file)
    elif kind == "text":
        file.write_text("hello\n")  # of which torch says KeyError: 101
    elif kind == "no rows":
        torch.save({name: tensor[:0] for name, tensor in torch.load(file).items()}, file)
    elif kind == "no dimension":
        torch.save(torch.load(file) | {"input_ids": torch.tensor(3)}, file)
    elif kind == "not a number":
        torch.save(torch.load(file) | {"topk_logits": torch.full((30, 15, 8), torch.nan)}, file)
    elif kind == "fractions":
        torch.save(torch.load(file) | {"topk_idx": torch.rand(30, 15, 8)}, file)
    elif kind == "a gap":
        file.unlink()
    elif kind == "a list":
        (source / "meta.json").write_text("[]")
    elif kind == "a word":
        meta = json.loads((source / "meta.json").read_text())
        (source / "meta.json").write_text(json.dumps(meta | {"topk": "eight"}))
    elif kind == "format":
        (source / "meta.json").write_text('{"format": "else"}')
    else:
        (source / "meta.json").unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "shard_00001.pt: truncated, or holds more than tensors"),
        ("pickled code", "shard_00001.pt: truncated, or holds more than tensors"),
        ("shapes", r"shard_00001.pt: no topk_idx of \[n, 15, 8\]"),
        ("ids", "shard_00001.pt: topk_idx has ids outside of the 96 words"),
        *((kind, "shard_00001.pt: truncated, or holds more than tensors") for kind in (*NOT_TENSORS, "text")),
        ("no rows", r"shard_00001.pt: no input_ids of \[n, 16\]"),
        ("no dimension", r"shard_00001.pt: no input_ids of \[n, 16\]"),
        ("not a number", "shard_00001.pt: topk_logits are not numbers of their kind"),
        ("fractions", "shard_00001.pt: topk_idx are not numbers of their kind"),
        ("a gap", "no shard_00001.pt"),
        ("a list", "meta.json: .*not a cache to import"),
        ("a word", "meta.json: topk: .*integer"),
        ("format", "meta.json: format: Input should be 'qwen_kd_topk_cache_v1': not a cache to import"),
        ("missing", "meta.json: missing or not JSON"),
    ],
)
def test_what_cannot_be_imported_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    toy_files(tmp_path)
    source = upstream(tmp_path)
    damaged(kind, source)
    with pytest.raises(UserError, match=message) as error:
        command.take_over(source, tmp_path / "out", None, False)
    assert "\n" not in str(error.value)
    assert not (source / "ran").exists()
