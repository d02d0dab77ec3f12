"""Hidden pairs hold the states that the model had while it thought, once each, and damage to them is one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from thinkers import TOKENIZER, TOKENS, resolved

from wrinklefree.config.thinking import PairsConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data import chains
from wrinklefree.data.problems import Problem
from wrinklefree.thinking import hidden_pairs, loading, pairs, pairs_stage, tags
from wrinklefree.thinking.hidden_pairs import HiddenPairs, Pair
from wrinklefree.thinking.network import LatentThinker, ThinkerConfig
from wrinklefree.thinking.speech import Speaker

pytestmark = pytest.mark.numeric


def test_a_model_without_the_tags_is_refused() -> None:
    from tiny import tokenizer

    with pytest.raises(UserError, match="no single tokens <think> and </think>"):
        tags.find_tags(tokenizer())


def test_the_states_are_those_that_the_model_had_while_it_thought(toy: Path, speaker: Speaker) -> None:
    """Teacher-forced states against those of generation itself: none is off by one, whatever the batch."""
    config = PairsConfig(**TOKENS, max_new_tokens=20)
    asked = [(Problem(c.question, c.answer), 0) for c in chains.chains("heldout", 6, seed=3)]
    records = pairs.Writer(speaker.model, speaker.tokenizer, config).write("heldout", asked, seed=0)
    records = [r for r in records if r["closed"] and r["thought_ids"] and r["answer_ids"]]
    assert len(records) > 2
    whole = LatentThinker(ThinkerConfig(width=64, d_compressed=64))  # nothing is lost
    reader = pairs.Reader(speaker.model, speaker.tokenizer, whole, config)
    for record, pair in zip(records, reader.read(records), strict=True):
        ids = torch.tensor([record["prompt_ids"]])
        out = speaker.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        generated = [step[-1][0, -1] for step in out.hidden_states]  # the state that each new token came from
        places = [place - len(record["prompt_ids"]) + 1 for place in reader.places(record)]
        states = whole.compressor.decompress(pair.thoughts)
        torch.testing.assert_close(states, torch.stack([generated[place] for place in places]), atol=1e-4, rtol=1e-4)
        new = out.sequences[0, ids.shape[1] :]
        assert pair.tokens.tolist() == new[places].tolist()


def test_the_last_thought_is_where_the_answer_begins(thinker: LatentThinker, speaker: Speaker) -> None:
    reader = pairs.Reader(speaker.model, speaker.tokenizer, thinker, PairsConfig(**TOKENS))
    record = {"prompt_ids": [1, 7, 14, 5, 3], "thought_ids": [14, 9, 15, 8], "answer_ids": [8, 2]}
    assert reader.places(record) == [5, 9]  # 14 leads to 9; </think> at 9 leads to the answer
    long = record | {"thought_ids": [14, 9] * 10}
    found = reader.places(long)
    assert len(found) == thinker.config.max_thoughts
    assert found[-1] == 5 + 20


def test_segments_of_lines_end_before_the_break(thinker: LatentThinker, speaker: Speaker) -> None:
    class Lines:
        eos_token_id = 2

        def decode(self, ids: list[int]) -> str:
            return {0: "\n", 1: "a", 2: "b"}[ids[0]]

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return type("Ids", (), {"input_ids": [{"<think>": 3, "</think>": 4}[text]]})

        unk_token_id = None

    reader = pairs.Reader(speaker.model, Lines(), thinker, PairsConfig())  # type: ignore[arg-type]
    record = {"prompt_ids": [1, 3], "thought_ids": [0, 1, 2, 0, 0, 1, 0, 2, 2], "answer_ids": [0, 0, 1]}
    assert reader.places(record) == [2 + 2 - 1, 2 + 5 - 1, 2 + 9 + 2]


def test_nothing_is_thought_about_twice(toy: Path, tmp_path: Path) -> None:
    """A crash in the middle of a line, then the same command: all problems once, the same pairs."""
    shutil.copytree(toy, tmp_path / "again")
    folder = tmp_path / "again" / "toy_trm_pairs"
    file = folder / "thoughts-000.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:50]) + lines[50][:30])
    (folder / "manifest.json").unlink()
    (folder / "train-00000.safetensors").unlink()
    with pytest.raises(UserError, match="no hidden pairs"):
        HiddenPairs(folder, "train")
    pairs_stage.make_pairs(resolved(tmp_path / "again", "trm_pairs", f"model.pretrained={toy / 'lm'}"), force=False)
    records = pairs.read_thoughts(folder)
    keys = [(r["split"], r["id"], r["sample"]) for r in records]
    assert len(set(keys)) == len(keys) == len(lines)
    before, after = (
        load_file(toy / "toy_trm_pairs" / "train-00000.safetensors"),
        load_file(folder / "train-00000.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in before if not before[name].is_floating_point())
    torch.testing.assert_close(before["thoughts"], after["thoughts"], atol=1e-2, rtol=1e-2)


def test_other_settings_do_not_go_on_with_these_thoughts(toy: Path) -> None:
    with pytest.raises(UserError, match="begun with another model, compressor or"):
        pairs_stage.make_pairs(resolved(toy, "trm_pairs", "thinking.pairs.temperature=0.5"), force=False)


def test_force_replaces_pairs_and_nothing_else(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "toy_trm_pairs", tmp_path / "toy_trm_pairs")
    shutil.copytree(toy / "toy_trm_compressor", tmp_path / "toy_trm_compressor")
    made, notes = tmp_path / "toy_trm_pairs", tmp_path / "toy_trm_pairs" / "notes.txt"
    notes.write_text("mine")
    config = resolved(toy, "trm_pairs", f"output_root={tmp_path}", "seed=3")
    pairs_stage.make_pairs(config, force=True)
    assert json.loads((made / "started.json").read_text()) != json.loads(
        (toy / "toy_trm_pairs" / "started.json").read_text()
    )
    assert notes.read_text() == "mine"
    for path in [*made.glob("*.json*"), *made.glob("*.safetensors")]:
        path.unlink()
    with pytest.raises(UserError, match="not empty, and not hidden pairs"):
        pairs_stage.make_pairs(config, force=True)


def test_what_is_not_kept_is_counted() -> None:
    def record(name: str, **values: Any) -> dict[str, Any]:
        whole = {"split": "train", "id": name, "sample": 0, "thought_ids": [1, 2], "answer_ids": [3]}
        return whole | {"closed": True, "correct": True} | values

    records = [
        record("good"),
        record("good", sample=1),
        record("open", closed=False),
        record("empty", thought_ids=[]),
        record("wrong", correct=False),
        record("long", thought_ids=[1] * 9),
        record("foreign"),
    ]
    order = [("train", name) for name in ("long", "wrong", "good", "open", "empty")]
    kept, dropped = pairs.select(records, PairsConfig(max_thought_tokens=8), order)
    assert [r["id"] for r in kept] == ["good"]
    assert dropped == {pairs.REPEATED: 1, pairs.UNCLOSED: 2, pairs.WRONG: 1, pairs.LONG: 1}


def test_an_empty_split_says_why(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "toy_trm_compressor", tmp_path / "short_trm_compressor")
    with pytest.raises(UserError, match=r"no thought of the train split can be kept \(\d+ no closing tag"):
        pairs_stage.make_pairs(
            resolved(
                toy, "trm_pairs", "thinking.pairs.max_new_tokens=1", "experiment=short", f"output_root={tmp_path}"
            ),
            force=False,
        )


def some_pairs(count: int = 3) -> list[Pair]:
    torch.manual_seed(0)
    return [
        Pair(
            torch.arange(n + 2),
            torch.arange(2 * n),
            torch.arange(2),
            torch.randn(n + 2, 4),
            torch.randn(n, 4),
            torch.arange(n),
        )
        for n in range(1, count + 1)
    ]


def test_a_shard_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.safetensors"
    hidden_pairs.write_shard(path, some_pairs(), "key")
    for wrote, found in zip(some_pairs(), hidden_pairs.read_shard(path, "key"), strict=True):
        assert all(torch.equal(a.half(), b.half()) for a, b in zip(wrote, found, strict=True))


def test_a_broken_or_foreign_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.safetensors"
    hidden_pairs.write_shard(path, some_pairs(), "key")
    with pytest.raises(UserError, match="other pairs than its manifest"):
        hidden_pairs.read_shard(path, "another")
    tensors = load_file(path)
    save_file({**tensors, "tokens": tensors["tokens"][1:]}, path, metadata={"key": "key"})
    with pytest.raises(UserError, match="not as long as its counts say"):
        hidden_pairs.read_shard(path, "key")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="missing or broken"):
        hidden_pairs.read_shard(path, "key")


def test_states_that_fp16_does_not_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too large for fp16"):
        hidden_pairs.write_shard(tmp_path / "x", [some_pairs()[0]._replace(thoughts=torch.full((1, 4), 1e5))], "key")


def test_pairs_of_another_compressor_are_refused(toy: Path, thinker: LatentThinker, train: HiddenPairs) -> None:
    loading.check_pairs(train.manifest, toy, thinker, TOKENIZER, "again")
    with torch.no_grad():
        thinker.compressor.weight.mul_(1.01)
    with pytest.raises(UserError, match="made with another compressor"):
        loading.check_pairs(train.manifest, toy, thinker, TOKENIZER, "again")
