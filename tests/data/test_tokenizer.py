"""The fingerprint of a tokenizer tells how it cuts and ends text, not its words alone."""

from tiny import tokenizer
from tokenizers import pre_tokenizers

from wrinklefree.data.tokenizer import tokenizer_fingerprint


def test_tokenizers_of_one_vocabulary_that_end_or_cut_otherwise_differ() -> None:
    other = tokenizer()
    other.eos_token = "w1"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer())
    other = tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(",")
    assert other.get_vocab() == tokenizer().get_vocab()
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer())
