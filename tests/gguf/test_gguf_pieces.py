"""Tokenizers of SentencePiece's kind in GGUF files: the ids of the original, of transformers' reader, and refusals."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ggufs import CHATS, FIRST, LLAMA2, METASPACE, NO_SPACE, TEXTS, as_of_phi3, learnt, parts_of, tokenizer_of
from tiny import llama
from transformers import AutoTokenizer

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import find
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.engine.sampling import Sampling
from wrinklefree.export.formats.gguf import write
from wrinklefree.generate.open import open_engine
from wrinklefree.gguf import pieces, tokens

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")


def written(parts: dict[str, Any], file: Path, name: str = "toy") -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(name)
    tokens.add(writer, tokenizer_of(parts), len(parts["model"]["vocab"]) + 5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("changed", [LLAMA2, METASPACE, FIRST, NO_SPACE])
def test_ids_are_those_of_the_original(changed: dict[str, Any], tmp_path: Path) -> None:
    parts = parts_of(**changed)
    original, inside = tokenizer_of(parts), tokens.read(written(parts, tmp_path / "model.gguf"))
    for text in (*tokens.probes(original), *TEXTS[:4], "once  upon   a time"):
        assert inside.encode(text, add_special_tokens=False).ids == original(text, add_special_tokens=False).input_ids
    for text in TEXTS[:4]:
        assert inside.decode(inside.encode(text).ids) == text


def apart(parts: dict[str, Any]) -> None:
    """The second merge that makes the same token comes last."""
    merges = parts["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    merges.append(merges.pop(next(i for i in range(1, len(made)) if made[i] == made[i - 1])))


def test_merges_that_are_fewer_than_the_ways_to_join_or_apart_give_the_same_ids(tmp_path: Path, caplog) -> None:
    """Of random texts, too: only pairs that merges lead to ever stand beside each other."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("aab ", k=200)) for _ in range(100)]
    few, moved = learnt(texts[:50]), parts_of()
    apart(moved)
    model = few["model"]
    ways = pieces.joins(model["vocab"].keys() - {"<unk>", "<s>", "</s>"}, dict.fromkeys(model["vocab"], 0.0))
    assert len(model["merges"]) < 0.5 * len(ways)
    for parts, tried in ((few, texts), (moved, TEXTS[:4])):
        original = tokenizer_of(parts)
        inside = tokens.read(written(parts, tmp_path / f"{len(tried)}.gguf"))
        for text in (*tokens.probes(original), *tried):
            own = original(text, add_special_tokens=False).input_ids
            assert inside.encode(text, add_special_tokens=False).ids == own
    assert "no token for some characters" in caplog.text
    assert pieces.unknown_in(few, "a \u00e9")
    assert not pieces.unknown_in(few, "a b")
    assert not pieces.unknown_in(moved, "\u00e9")


def test_byte_level_tokenizers_are_tried_with_all_texts() -> None:
    words = train_tokenizer(["x = 1\n" * 20], vocab_size=280)
    assert set(tokens.PROBES) <= set(tokens.probes(words))


def test_a_whole_file_is_read_by_transformers_and_by_the_native_loop(tmp_path: Path) -> None:
    original = tokenizer_of(parts_of())
    model = find("bitdistill")(name="bitdistill", norm_mode="none").prepare(llama(vocab_size=len(original)), [])
    rows = write(model, original, tmp_path, [], gguf_type="tq1_0")
    assert ["texts with the same token ids", "18 of 18"] in rows
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    engine, ours, _ = open_engine(str(tmp_path / "model.gguf"), "auto", 1)
    for text in TEXTS[:4]:
        expected = original(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == expected
        assert ours(text, add_special_tokens=False).input_ids == expected
    assert len(list(engine.generate(ours(TEXTS[0]).input_ids, Sampling(max_new_tokens=4)))) <= 4


def test_tokens_take_the_spaces_behind_them_as_those_of_phi3_do(tmp_path: Path) -> None:
    parts = as_of_phi3()
    original = tokenizer_of(parts)
    file = written(parts, tmp_path / "model.gguf", tokens.named("Llama", original))
    inside = tokens.read(file)
    for text in (*tokens.probes(original), *CHATS):
        assert inside.encode(text, add_special_tokens=False).ids == original(text, add_special_tokens=False).input_ids


def test_a_name_from_which_llama_cpp_would_take_spaces_is_another_one() -> None:
    assert tokens.named("Phi3ForCausalLM", tokenizer_of(parts_of())) == "Phi 3ForCausalLM"


def with_one_of_phi3(parts: dict[str, Any]) -> None:
    parts["added_tokens"].append(parts["added_tokens"][0] | {"content": "<|end|>", "id": 600})
    parts["added_tokens"].append(parts["added_tokens"][0] | {"content": "<|user|>", "id": 601, "rstrip": True})


def without_a_merge(parts: dict[str, Any]) -> None:
    """Two characters that are a token stay two."""
    merges = parts["model"]["merges"]
    merges.remove(next(merge for merge in merges if len("".join(merge)) == 2))


def with_a_long_token(parts: dict[str, Any]) -> None:
    parts["model"]["vocab"]["a" * 300] = len(parts["model"]["vocab"])


def words_apart(parts: dict[str, Any]) -> None:
    parts |= {"normalizer": None, "pre_tokenizer": pieces._METASPACE | {"prepend_scheme": "always", "split": True}}


@pytest.mark.parametrize("change", [without_a_merge, with_a_long_token, words_apart, with_one_of_phi3])
def test_what_llama_cpp_would_do_otherwise_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    parts = parts_of()
    change(parts)
    with pytest.raises(UserError, match=r"other tokens|is not written"):
        written(parts, tmp_path / "model.gguf")
