"""A small byte-level BPE tokenizer, trained on documents in seconds.

Any text can be encoded and decodes to exactly itself, because the base alphabet is the 256 bytes. Chats are written as
ChatML, as in Qwen:

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint

# One line that tokenizers with the same vocabulary may cut differently: case, spaces, digits, accents, emoji.
PROBE = " Wrinkle-free: 1024  tokens\n\tdéjà vu, ΑΩ — 你好 🙂 don't"

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]

# Ids 0 to 5, in this order: in front, so that they do not depend on the size of the vocabulary.
SPECIAL_TOKENS = [END_OF_TEXT, PAD, *CHAT_TOKENS]

# The sequence length that the small model is trained with.
MODEL_MAX_LENGTH = 512

# `enable_thinking=False` writes an empty thought, after which the model answers at once (Qwen3's convention).
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def train_tokenizer(documents: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. Equal documents in equal order give an equal tokenizer.

    `vocab_size` includes the special tokens and the 256 bytes. The vocabulary is smaller if the documents have too few
    repeated pairs. Raises ValueError if `vocab_size` has no room for special tokens and bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level tokenizer needs at least {smallest}")
    return PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(documents, vocab_size),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=CHAT_TOKENS,
        chat_template=CHAT_TEMPLATE,
        # True would rewrite " ." to "." in decoded text: no round trip.
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_MAX_LENGTH,
    )


def _train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return bpe


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, what: str) -> None:
    """Raise UserError, which begins with `what` and says how they differ, if `other` is another tokenizer.

    Models of one tokenizer may pad their embeddings to different sizes, so sizes say nothing.
    """
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other):
        raise UserError(f"{what} has another tokenizer than the model: {_difference(tokenizer, other)}")


def check_written_with(tokenizer: PreTrainedTokenizerBase, fingerprint: str, name: str, what: str) -> None:
    """Raise UserError, which begins with `what`, if a tokenizer with this fingerprint, of the model `name`, wrote it.

    The message says how they differ if the other tokenizer is still on this machine.
    """
    if tokenizer_fingerprint(tokenizer) == fingerprint:
        return
    other = _at_hand(name)
    known = other is not None and tokenizer_fingerprint(other) == fingerprint
    why = f": {_difference(tokenizer, other)}" if known and other is not None else ""
    raise UserError(
        f"{what}: written with the tokenizer of {name}, the model's ({tokenizer.name_or_path}) is another{why}"
    )


def _at_hand(name: str) -> PreTrainedTokenizerBase | None:
    """Load a tokenizer from a folder or the hub's cache; None if there is none."""
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    return found


def _difference(mine: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """Say in words how two tokenizers differ whose fingerprints do."""
    words, others = ({i: word for word, i in t.get_vocab().items()} for t in (mine, other))
    unlike = sorted(i for i in words.keys() | others.keys() if words.get(i) != others.get(i))
    if unlike:
        here, there = (repr(found[unlike[0]]) if unlike[0] in found else "no word" for found in (words, others))
        return f"id {unlike[0]} is {there}, the model's is {here}; {len(unlike)} ids differ"
    if mine.eos_token_id != other.eos_token_id:
        return f"it ends a sequence with {other.eos_token!r}, the model's with {mine.eos_token!r}"
    return f"it has the same words, but cuts the line {PROBE!r} into other ones"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a fingerprint of the vocabulary, the end-of-sequence token, and the way that one line is cut."""
    probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, probe])
