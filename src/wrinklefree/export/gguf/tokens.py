"""Writes a byte-level BPE tokenizer into a GGUF file, and reads it back from there.

llama.cpp knows ways of cutting text before BPE by name. A tokenizer is written if each of its parts is one that such a
name stands for, compared by value. Any other part is refused.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.export.proof.certify import CertificateError

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(digits: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": SPLIT % digits}, "behavior": "Isolated", "invert": False}


# llama.cpp's name -> the steps that it stands for, without `trim_offsets`, which changes no id.
CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_bytes(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(True)],
    "qwen2": [_split(""), _bytes(False)],
    "llama-bpe": [_split("{1,3}"), _bytes(False)],
}
WHOLE_WORDS = ("llama-bpe",)  # here llama.cpp takes a piece that is a token as it is, without merges
COMPOSED = ("qwen2",)  # llama.cpp's own converter drops the NFC of these, so their files always go without

# Parts of tokenizer.json's model, and the values that llama.cpp computes with.
MODEL: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
}
STRIPPING = ("single_word", "lstrip", "rstrip")

PROBES = (
    "def f(x):\n\treturn x + 1\n",
    "Hello, World! don't I'LL we've HE'S",
    " leading, trailing ",
    "a  b   c\t\td\n\n\ne\r\nf \n g",
    "0 12 345 6789 1234567 3.14 6.7e-8 ½ ٣٤",
    "äöü ß ñ é ç – “quoted” … € ¿",
    "日本語 中文 한국어 ไทย हिन्दी العربية עברית",
    "🙂👩‍👩‍👧 ∑∫√ \u00a0\u2003|",
    "snake_case camelCase $#@!%^&*()[]{}<>;:'\"\\/`~=+-",
    "",
)


def add(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write the tokenizer into a file. Raises UserError if a part of it changes ids, and llama.cpp does not know it."""
    import gguf

    pieces = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = cut_of(pieces)
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise UserError(f"--format gguf: the tokenizer has {max(by_id) + 1} tokens, the model {vocab_size} embeddings")
    kinds = [gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED for i in range(vocab_size)]
    for entry in pieces["added_tokens"]:
        kinds[entry["id"]] = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(kinds)
    merges = pieces["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    before, after = _around(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether BOS and EOS stand around every text. Raises UserError if other tokens do."""
    bare, ids = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    place = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
    before, after = ids[:place], ids[place + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise _refused("post_processor", f"puts {tokenizer.convert_ids_to_tokens(before + after)} around texts")
    return bool(before), bool(after)


def cut_of(pieces: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way text is cut before BPE.

    Raises UserError for the first part of the tokenizer that llama.cpp does not know.
    """
    model, steps = pieces["model"], pieces["pre_tokenizer"] or {}
    for name, allowed in MODEL.items():
        if model.get(name, allowed[0]) not in allowed:
            raise _refused(f"model.{name}", model[name])
    # Without an unknown token both drop a byte that has no token, and with all bytes none is needed.
    if model.get("unk_token") is not None and set(ByteLevel.alphabet()) - model["vocab"].keys():
        raise _refused("model.unk_token", model["unk_token"])
    found = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps.get("pretokenizers", [steps])]
    cut = next((name for name, known in CUTS.items() if known == found), None)
    if cut is None:
        raise _refused("pre_tokenizer", json.dumps(found, ensure_ascii=False))
    if model.get("ignore_merges", False) != (cut in WHOLE_WORDS):
        raise _refused("model.ignore_merges", model.get("ignore_merges", False))
    if pieces["normalizer"] is not None and not (pieces["normalizer"] == {"type": "NFC"} and cut in COMPOSED):
        raise _refused("normalizer", json.dumps(pieces["normalizer"], ensure_ascii=False))
    if (pieces["decoder"] or {}).get("type") != "ByteLevel":
        raise _refused("decoder", json.dumps(pieces["decoder"], ensure_ascii=False))
    for entry in pieces["added_tokens"]:
        odd = [flag for flag in STRIPPING if entry[flag]]
        if odd:
            raise _refused(f"added token {entry['content']!r}", odd[0])
    return cut


def _refused(part: str, value: Any) -> UserError:
    return UserError(
        f"--format gguf: the tokenizer's {part} ({value}) is not written, only byte-level BPE as of GPT-2, SmolLM, "
        f"Qwen2 and Llama 3: use --format dense and llama.cpp's own converter"
    )


def read(file: Path) -> Tokenizer:
    """Rebuild the tokenizer from a file, as llama.cpp understands it, but for BOS and EOS."""
    import gguf

    reader = gguf.GGUFReader(file)

    def field(name: str) -> Any:
        return reader.get_field(f"tokenizer.ggml.{name}").contents()

    tokens, kinds, cut = field("tokens"), field("token_type"), field("pre")
    stored = reader.get_field("tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in (stored.contents() if stored else [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(BPE(vocabulary, merges, ignore_merges=cut in WHOLE_WORDS))
    steps = [step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {}) for step in CUTS[cut]]
    pieces = json.loads(inner.to_str()) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    inner = Tokenizer.from_str(json.dumps(pieces))
    for kind, special in ((gguf.TokenType.CONTROL, True), (gguf.TokenType.USER_DEFINED, False)):
        inner.add_tokens(
            [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind]
        )
    return inner


def check(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises CertificateError if the tokenizer in the file gives other ids for any of PROBES or a special token."""
    inside = read(file)
    special = [f"x{token}y {token}" for token in tokenizer.all_special_tokens]
    for text in (*PROBES, *special):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        if inside.encode(text, add_special_tokens=False).ids != expected:
            raise CertificateError(f"{file.name}: the tokenizer in it gives other ids for {text!r}")
