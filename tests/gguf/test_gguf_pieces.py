"""Tokenizers of SentencePiece's kind in GGUF files: the ids of the original, of transformers' reader, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import llama
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import find
from wrinklefree.engine.sampling import Sampling
from wrinklefree.export.formats.gguf import write
from wrinklefree.generate.open import open_engine
from wrinklefree.gguf import pieces, tokens

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

LLAMA2 = {"normalizer": pieces._PREPEND, "pre_tokenizer": None}
METASPACE = {"normalizer": None, "pre_tokenizer": pieces._METASPACE | {"prepend_scheme": "always"}}
FIRST = {"normalizer": None, "pre_tokenizer": pieces._METASPACE | {"prepend_scheme": "first"}}
NO_SPACE = {"normalizer": pieces._REPLACE, "pre_tokenizer": None}


def parts_of(**changed: Any) -> dict[str, Any]:
    """A tokenizer.json as Llama 2 has it: 3 special tokens, 256 bytes, then pieces in the order of their scores."""
    learner = Tokenizer(BPE())
    texts = [text.replace(" ", pieces.SPACE) for text in TEXTS]
    learner.train_from_iterator(texts, BpeTrainer(vocab_size=600, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    made = ["".join(merge) for merge in learnt["merges"]]
    letters = [token for token in learnt["vocab"] if token not in set(made)]
    names = ["<unk>", "<s>", "</s>", *pieces.BYTES, *dict.fromkeys(made), *letters]
    vocab = {token: i for i, token in enumerate(names)}
    merges = pieces.joins({*made, *letters}, {token: -float(i) for token, i in vocab.items()})
    model = {"type": "BPE", "vocab": vocab, "merges": [list(merge) for merge in merges], "unk_token": "<unk>"}
    model |= {"fuse_unk": True, "byte_fallback": True, "dropout": None, "ignore_merges": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token} | special for i, token in enumerate(names[:3])]
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    whole = {"version": "1.0", "added_tokens": added, "decoder": decoder, "model": model, "post_processor": None}
    return whole | {"truncation": None, "padding": None} | LLAMA2 | changed


TEXTS = [
    "the cat sat on the mat and the dog lay in the sun",
    "a tokenizer joins neighbours as long as both together are a token",
    'once upon a time there was a little girl who had a red hat, and she liked it. "Look!" she said.',
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13; def f(x): return x + 1\n",
] * 4


def tokenizer_of(parts: dict[str, Any]) -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def written(parts: dict[str, Any], file: Path) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
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


def test_a_whole_file_is_read_by_transformers_and_by_the_native_loop(tmp_path: Path) -> None:
    original = tokenizer_of(parts_of())
    model = find("bitdistill")(name="bitdistill", norm_mode="none").prepare(llama(vocab_size=len(original)), [])
    rows = write(model, original, tmp_path, [], gguf_type="tq1_0")
    assert ["texts with the same token ids", "13 of 13"] in rows
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    engine, ours, _ = open_engine(str(tmp_path / "model.gguf"), "auto", 1)
    for text in TEXTS[:4]:
        expected = original(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == expected
        assert ours(text, add_special_tokens=False).input_ids == expected
    assert len(list(engine.generate(ours(TEXTS[0]).input_ids, Sampling(max_new_tokens=4)))) <= 4


def without_a_merge(parts: dict[str, Any]) -> None:
    parts["model"]["merges"].pop(7)


def without_a_byte(parts: dict[str, Any]) -> None:
    parts["model"]["vocab"] = {token: i for token, i in parts["model"]["vocab"].items() if token != "<0x41>"}


def apart(parts: dict[str, Any]) -> None:
    merges = parts["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    twice = next(i for i in range(len(made) - 1) if made[i] == made[i + 1])
    merges.append(merges.pop(twice))


def words_apart(parts: dict[str, Any]) -> None:
    parts |= {"normalizer": None, "pre_tokenizer": pieces._METASPACE | {"prepend_scheme": "always", "split": True}}


@pytest.mark.parametrize("change", [without_a_merge, without_a_byte, apart, words_apart])
def test_what_llama_cpp_would_do_otherwise_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    parts = parts_of()
    change(parts)
    with pytest.raises(UserError, match="is not written"):
        written(parts, tmp_path / "model.gguf")
