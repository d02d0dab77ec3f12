"""A KD cache holds what the teacher says of the sequences that training would see, in the bytes that were predicted."""

import json
from pathlib import Path

import pytest
import torch
from kd_caches import LENGTH, SIZES, make
from tiny import VOCAB, llama, tokenizer
from torch import Tensor

from wrinklefree.commands import cache as command
from wrinklefree.config.schema import DataConfig, DistillationConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.manifest import HEADER_BYTES, read_manifest
from wrinklefree.data.kd_cache.read import KDCache
from wrinklefree.data.open import heldout_batches, training_stream
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.objectives.kinds.cached_kd import Objective as CachedKD
from wrinklefree.objectives.kinds.language_modelling import Objective as LanguageModelling
from wrinklefree.objectives.losses import NEVER
from wrinklefree.runs import setup


def teacher_logits(batch: dict[str, Tensor]) -> Tensor:
    """[B, L-1, V], computed anew."""
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        return llama()(**inputs, use_cache=False).logits[:, :-1].float()


@pytest.mark.numeric
def test_a_cache_holds_what_the_teacher_says_of_each_next_token(folder: Path) -> None:
    cache = KDCache(folder / "cache")
    batch = cache.batch("train", range(5))
    logits = teacher_logits(batch)
    values, ids = logits.topk(8)
    assert torch.equal(batch["kd_ids"], ids)
    torch.testing.assert_close(batch["kd_logits"], values, atol=1e-3, rtol=1e-3)  # fp16
    torch.testing.assert_close(batch["kd_rest"], logits.scatter(-1, ids, NEVER).logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert batch["kd_rest"].dtype == torch.float32


@pytest.mark.numeric
def test_the_teacher_computes_in_the_precision_of_the_manifest(folder: Path, tmp_path: Path) -> None:
    assert read_manifest(folder / "cache").precision == "float32"
    assert make(folder, tmp_path / "cache", "training.precision=bf16").precision == "bfloat16"
    exact, rounded = (
        KDCache(path).batch("train", range(5))["kd_rest"] for path in (folder / "cache", tmp_path / "cache")
    )
    assert 1e-5 < (exact - rounded).abs().max() < 0.1


def test_sequences_are_those_of_training_and_of_the_held_out_text(folder: Path) -> None:
    config = DataConfig(source="local", path=str(folder / "text"))
    stream = training_stream(config, tokenizer(), batch_size=40, length=LENGTH, seed=42)
    held = heldout_batches(config, tokenizer(), batch_size=6, length=LENGTH, max_tokens=6 * LENGTH)[0]
    cache = KDCache(folder / "cache")
    for name, expected in next(stream).items():
        assert torch.equal(cache.batch("train", range(40))[name], expected)
    for name, expected in held.items():
        assert torch.equal(next(cache.heldout(6, 10**6))[name], expected)


@pytest.mark.numeric
def test_random_words_are_distinct_and_spread_and_marked_where_they_hit(folder: Path) -> None:
    batch = KDCache(folder / "random").batch("train", range(40))
    logits = teacher_logits(batch)
    topk, chosen = batch["kd_ids"][..., :8], batch["kd_ids"][..., 8:]
    hit = (chosen.unsqueeze(-1) == topk.unsqueeze(-2)).any(-1)
    assert (chosen.diff(dim=-1) > 0).all()
    assert ((batch["kd_logits"][..., 8:] == NEVER) == hit).all()
    assert hit.any()
    torch.testing.assert_close(batch["kd_logits"][..., 8:][~hit], logits.gather(-1, chosen)[~hit], atol=1e-3, rtol=1e-3)
    assert len(chosen.unique()) == VOCAB
    assert not torch.equal(chosen[:16], chosen[16:32])  # drawn anew for each shard
    others = logits.scatter(-1, batch["kd_ids"], NEVER).logsumexp(-1)
    torch.testing.assert_close(batch["kd_rest"], others, atol=1e-5, rtol=1e-5)


@pytest.mark.numeric
def test_a_cache_of_the_whole_vocabulary_trains_as_the_teacher_does(folder: Path) -> None:
    batch = next(KDCache(folder / "full").heldout(4, 64))
    student, config = llama(intermediate_size=128), DistillationConfig(name="logits", weight=1.0, ce_weight=0.5)
    cached, _ = next(CachedKD(student, config)(batch))
    online, _ = next(LanguageModelling(student, config, llama())(batch))
    torch.testing.assert_close(cached, online, atol=2e-3, rtol=2e-3)


@pytest.mark.numeric
def test_each_position_is_compared_with_its_own_answer(folder: Path) -> None:
    """One by one, with sequences that end early: no label, no share in the loss. Tails unlike one another."""
    batch = KDCache(folder / "random").batch("train", range(4))
    batch["kd_rest"] += torch.randn(4, LENGTH - 1, generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((16, 9, 12, 3)):
        batch["labels"][row, end:] = -100
    student = llama(intermediate_size=128)
    config = DistillationConfig(name="logits", weight=1.0, hard_full=0.5, temperature=2.0)
    found = CachedKD(student, config).compare(batch)
    with torch.no_grad():
        mine = student(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1]
    kept = batch["labels"][:, 1:] != -100
    kl, full = [], []
    for row, place in kept.nonzero().tolist():
        seen = batch["kd_logits"][row, place] > NEVER
        ids = batch["kd_ids"][row, place][seen].unsqueeze(0)
        tail = batch["kd_rest"][row, place].unsqueeze(0)
        p = (torch.cat([batch["kd_logits"][row, place][seen], tail]) / 2).softmax(-1)
        q = mine[row, place].double().softmax(-1)[ids[0]]
        q = torch.cat([q, 1 - q.sum(0, keepdim=True)]).sqrt()
        kl.append(4 * (p * (p / (q / q.sum())).log()).sum())
        if not kept[row, place + 1 :].any():
            full.append(-mine[row, place].log_softmax(-1)[ids[0, 0]])
    assert len(full) == 4
    torch.testing.assert_close(found.kl, torch.stack(kl).mean().float())
    torch.testing.assert_close(found.hard_full, 0.5 * torch.stack(full).mean())


def test_the_size_is_predicted_to_the_byte_but_for_headers(folder: Path) -> None:
    for name in ("cache", "random"):
        cache = KDCache(folder / name)
        m, files = cache.manifest, list((folder / name).glob("*.safetensors"))
        i, k, r = 2, m.topk, m.negatives
        assert m.sequence_bytes == (i + 2) * LENGTH + (LENGTH - 1) * ((i + 2) * (k + r) + 4)
        headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
        assert sum(file.stat().st_size for file in files) - headers == 46 * m.sequence_bytes
        assert headers <= len(files) * HEADER_BYTES


def test_prompts_are_masked_where_asked(folder: Path, tmp_path: Path) -> None:
    """A task's answers alone are labels, and padding is none."""
    lines = [json.dumps({"sentence": f"w{i} w{i + 1}", "label": i % 2}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    given = ["data=downstream", "task=sst2", f"data.path={tmp_path / 'rows.jsonl'}", "training.precision=fp32"]
    config = command.settings(str(folder / "toy"), 24, given)
    command.write(config, tmp_path / "cache", False, **(SIZES | {"num_train": 10, "num_heldout": 1}))
    batch = KDCache(tmp_path / "cache").batch("train", range(10))
    stream = training_stream(config.data, tokenizer(), batch_size=10, length=24, seed=42)
    assert torch.equal(batch["labels"], next(stream)["labels"])
    assert 0 < (batch["labels"] != -100).sum() < batch["labels"].numel() / 2


def test_a_student_of_another_tokenizer_is_refused(folder: Path) -> None:
    said = r"written with the tokenizer of .*toy, the model's .* is another: id 0 is 'w0'"
    with pytest.raises(UserError, match=said) as error:
        setup.open_cache(str(folder / "cache"), train_tokenizer(["some text"], 300))
    assert "\n" not in str(error.value)
