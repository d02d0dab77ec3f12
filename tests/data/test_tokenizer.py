"""The fingerprint of a tokenizer tells how it cuts and ends text, not its words alone."""

import re
from pathlib import Path

import pytest
from tiny import VOCAB, tokenizer, tokenizer_of
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wrinklefree.core.errors import UserError
from wrinklefree.data.tokenizer import check_same_tokenizer, check_written_with, tokenizer_fingerprint


def test_tokenizers_of_one_vocabulary_that_end_or_cut_otherwise_differ() -> None:
    other = tokenizer()
    other.eos_token = "w1"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer())
    other = tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(",")
    assert other.get_vocab() == tokenizer().get_vocab()
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer())


WORDS = {f"w{i}": i for i in range(VOCAB - 2)} | {"<unk>": VOCAB - 2, "<eos>": VOCAB - 1}


def ends_otherwise() -> PreTrainedTokenizerFast:
    other = tokenizer()
    other.eos_token = "w1"
    return other


def cuts_otherwise() -> PreTrainedTokenizerFast:
    other = tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(",")
    return other


DIFFERENT = {
    "permuted": (tokenizer_of(WORDS | {"w3": 5, "w5": 3}), "id 3 is 'w5', the model's is 'w3'; 2 ids differ"),
    "longer": (tokenizer_of(WORDS | {"more": VOCAB}), "id 96 is 'more', the model's is no word; 1 ids differ"),
    "ends": (ends_otherwise(), "it ends a sequence with 'w1', the model's with '<eos>'"),
    "cuts": (cuts_otherwise(), "it has the same words, but cuts the line"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_refused_names_what_differs(name: str, tmp_path: Path) -> None:
    """For a model whose tokenizer is loaded, and for a file with the fingerprint of one that is still on the disk."""
    other, reason = DIFFERENT[name]
    with pytest.raises(UserError, match=re.escape(f"teacher=x has another tokenizer than the model: {reason}")):
        check_same_tokenizer(tokenizer(), other, "teacher=x")
    other.save_pretrained(tmp_path)
    written = tokenizer_fingerprint(other)
    with pytest.raises(UserError, match=re.escape(f"cache: written with the tokenizer of {tmp_path}")) as refused:
        check_written_with(tokenizer(), written, str(tmp_path), "cache")
    assert reason in str(refused.value)
    with pytest.raises(UserError, match=r"written with the tokenizer of /gone, the model's .* is another$"):
        check_written_with(tokenizer(), written, "/gone", "cache")


def test_the_same_tokenizer_is_accepted(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    check_same_tokenizer(tokenizer(), again, "x")
    check_written_with(tokenizer(), tokenizer_fingerprint(again), "x", "x")
