"""Writes a tokenizer into a GGUF file, and reads it from there: byte-level BPE, or pieces as of SentencePiece.

llama.cpp knows ways of cutting text before BPE by name. A tokenizer is written if each of its parts is one that such a
name stands for, compared by value. Any other part is refused. gguf/pieces.py has the other kind.

By the name of the model llama.cpp also knows whether added tokens take the spaces behind them, as Phi-3's do. There it
takes ASCII spaces, transformers those of Unicode.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from wrinklefree.core.errors import UserError
from wrinklefree.families.foreign import refused_in_one_line
from wrinklefree.gguf import pieces
from wrinklefree.gguf.header import Header, read_header

log = logging.getLogger("wrinklefree")

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
    "dbrx": [_split("{1,3}"), _bytes(False)],
}
# Names in files of others that stand for the same (seen with llama.cpp on a vocabulary that shows each cut).
ALIASES = dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), "smollm")
ALIASES |= dict.fromkeys(("olmo", "mpt", "phi-2"), "gpt-2")
ALIASES |= {"smaug-bpe": "dbrx", "llama-v3": "llama-bpe", "stablelm2": "qwen2"}
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
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that are added to a vocabulary
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # transformers' name -> llama.cpp's

STRIPPING = ("single_word", "lstrip")
# Models with one of these in their name (in lower case) have added tokens that take the spaces behind them, but for
# some. In names of others there has to be a space.
STRIPPED_NAMES, SPACED_NAME = ("phi-3", "phi3"), "Phi 3"
NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")

PROBES = (
    "def f(x):\n\treturn x + 1\n",
    "Hello, World! don't I'LL we've HE'S",
    " leading, trailing ",
    "a  b   c\t\td\n\n\ne\r\nf \n g",
    "0 12 345 6789 1234567 3.14 6.7e-8 ½ ٣٤",
    "äöü ß ñ é ç – “quoted” … € ¿",
    "日本語 中文 한국어 ไทย हिन्दी العربية עברית",
    "🙂👩‍👩‍👧 ∑∫√ \u00a0\u2003|",
    "Once upon a time there was a little girl. She had a red hat, and she liked it.",
    "the cat sat on the mat and the dog lay in the sun",
    "snake_case camelCase $#@!%^&*()[]{}<>;:'\"\\/`~=+-",
    "",
)


def add(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write the tokenizer into a file. Raises UserError if a part of it changes ids, and llama.cpp does not know it."""
    import gguf

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise UserError(f"--format gguf: the tokenizer has {max(by_id) + 1} tokens, the model {vocab_size} embeddings")
    kinds = [gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED for i in range(vocab_size)]
    for entry in parts["added_tokens"]:
        kinds[entry["id"]] = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    (_add_pieces if pieces.has_pieces(parts) else _add_bytes)(writer, parts, tokens, kinds)
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


def _add_bytes(writer: Any, parts: dict[str, Any], tokens: list[str], kinds: list[int]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_of(parts))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = parts["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def _add_pieces(writer: Any, parts: dict[str, Any], tokens: list[str], kinds: list[int]) -> None:
    fault = pieces.fault(parts)
    if fault is not None:
        raise UserError(
            f"--format gguf: the tokenizer's {fault[0]} ({fault[1]}): with such pieces, llama.cpp would cut texts into "
            f"other tokens: use --format dense or hf"
        )
    _refuse_stripping(parts)
    if pieces.lacks_bytes(parts):
        log.warning("the tokenizer has no token for some characters: llama.cpp stops the program when it meets one")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(pieces.scores_of(parts, tokens))
    writer.add_token_types(pieces.kinds_of(parts, tokens, kinds))
    writer.add_add_space_prefix(bool(pieces.space_in_front(parts)))
    unknown = parts["model"].get("unk_token")
    if unknown in tokens:
        writer.add_unk_token_id(tokens.index(unknown))


def named(title: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A model's `title` as its name in a file, by which llama.cpp does with spaces behind added tokens as we do."""
    plain = re.sub("|".join(STRIPPED_NAMES), SPACED_NAME, title, flags=re.IGNORECASE)
    added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    return f"{plain}, tokens as of Phi-3" if any(entry["rstrip"] for entry in added) else plain


def probes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that have to have the same ids in the file: all of `PROBES`, and each special token within two texts.

    Without those that Metaspace puts no space in front of, where llama.cpp puts one, and those with characters at which
    llama.cpp stops (gguf/pieces.py).
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    special = tokenizer.all_special_tokens
    texts = [*PROBES, *(f"x{token}y {token}" for token in special), *(f"{token} x{token}\n\ty" for token in special)]
    return [text for text in texts if not (pieces.lacks_space(parts, text) or pieces.unknown_in(parts, text))]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether BOS and EOS stand around every text. Raises UserError if other tokens do."""
    bare, ids = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    place = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
    before, after = ids[:place], ids[place + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise _refused("post_processor", f"puts {tokenizer.convert_ids_to_tokens(before + after)} around texts")
    return bool(before), bool(after)


def cut_of(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way text is cut before BPE.

    Raises UserError for the first part of the tokenizer that llama.cpp does not know.
    """
    model, steps = parts["model"], parts["pre_tokenizer"] or {}
    for name, allowed in MODEL.items():
        if model.get(name, allowed[0]) not in allowed:
            raise _refused(f"model.{name}", model[name])
    # Without an unknown token both drop a byte that has no token, and with all bytes none is needed.
    if model.get("unk_token") is not None and set(ByteLevel.alphabet()) - model["vocab"].keys():
        raise _refused("model.unk_token", model["unk_token"])
    found = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps.get("pretokenizers", [steps])]
    cuts = [name for name, known in CUTS.items() if known == found]
    if not cuts:
        raise _refused("pre_tokenizer", json.dumps(found, ensure_ascii=False))
    whole = model.get("ignore_merges", False)
    cut = next((name for name in cuts if whole == (name in WHOLE_WORDS)), None)
    if cut is None:
        raise _refused("model.ignore_merges", whole)
    if parts["normalizer"] is not None and not (parts["normalizer"] == {"type": "NFC"} and cut in COMPOSED):
        raise _refused("normalizer", json.dumps(parts["normalizer"], ensure_ascii=False))
    if (parts["decoder"] or {}).get("type") != "ByteLevel":
        raise _refused("decoder", json.dumps(parts["decoder"], ensure_ascii=False))
    _refuse_stripping(parts)
    return cut


def _refuse_stripping(parts: dict[str, Any]) -> None:
    for entry in parts["added_tokens"]:
        odd = [flag for flag in STRIPPING if entry[flag]]
        if odd:
            raise _refused(f"added token {entry['content']!r}", odd[0])
    stripped = {entry["content"] for entry in parts["added_tokens"] if entry["rstrip"]}
    those = {entry["content"] for entry in parts["added_tokens"]} - set(NOT_STRIPPED)
    if stripped and stripped != those:
        entry = min(stripped ^ those)
        raise _refused(
            f"added token {entry!r}",
            f"{'takes' if entry in stripped else 'leaves'} the spaces behind it, and llama.cpp has all but "
            f"{', '.join(NOT_STRIPPED)} take them, or none",
        )


def _refused(part: str, value: Any) -> UserError:
    return UserError(
        f"--format gguf: the tokenizer's {part} ({value}) is not written, only byte-level BPE as of GPT-2, SmolLM, "
        f"Qwen2 and Llama 3, and pieces as of Llama 2: use --format dense and llama.cpp's own converter"
    )


def read(file: Path) -> Tokenizer:
    """Rebuild the tokenizer from a file, as llama.cpp understands it, but for BOS and EOS. Raises UserError."""
    return _rebuilt(read_header(file))


def has_tokenizer(header: Header) -> bool:
    """Whether a file has a tokenizer. One without runs token ids only."""
    return header.metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def tokenizer_of(header: Header) -> PreTrainedTokenizerBase:
    """Make transformers' tokenizer of the one in a file, with its special tokens and chat template.

    Raises UserError if the file has none, or one that is not written here either.
    """
    tokens: list[str] = _field(header, "tokens", list)
    named = {f"{name}_token": _token(header, key, tokens) for name, key in SPECIAL.items()}
    with refused_in_one_line(f"{header.file}: its tokenizer cannot be used"):
        inner = _rebuilt(header)
        around = _template(header, named, tokens)
        if around is not None:
            inner.post_processor = around
        template = header.metadata.get("tokenizer.chat_template")
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            chat_template=template if isinstance(template, str) else None,
            clean_up_tokenization_spaces=False,
            **{name: token for name, token in named.items() if token is not None},
        )


def stop_ids(header: Header) -> list[int]:
    """The ids after which a text ends: end of text, and end of a turn. Raises UserError for one out of range."""
    tokens = _field(header, "tokens", list)
    found = [_id(header, key, tokens) for key in ("eos", "eot")]
    return list(dict.fromkeys(i for i in found if i is not None))


def _field(header: Header, name: str, kind: type) -> Any:
    found = header.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, kind):
        raise UserError(f"{header.file}: tokenizer.ggml.{name} is missing, or no {kind.__name__}")
    return found


def _id(header: Header, key: str, tokens: list[str]) -> int | None:
    found = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if found is not None and not (type(found) is int and 0 <= found < len(tokens)):
        raise UserError(
            f"{header.file}: tokenizer.ggml.{key}_token_id={str(found)[:99]}: there are {len(tokens)} tokens"
        )
    return found


def _token(header: Header, key: str, tokens: list[str]) -> str | None:
    found = _id(header, key, tokens)
    return None if found is None else tokens[found]


def _template(header: Header, named: Mapping[str, str | None], tokens: list[str]) -> TemplateProcessing | None:
    """What stands around every text: BOS, EOS, both or nothing."""
    before, after = (
        named[f"{name}_token"] if header.metadata.get(f"tokenizer.ggml.add_{name}_token") is True else None
        for name in ("bos", "eos")
    )
    used = [token for token in (before, after) if token is not None]
    if not used:
        return None
    around = [*([before] if before else []), "$A", *([after] if after else [])]
    return TemplateProcessing(single=around, special_tokens=[(token, tokens.index(token)) for token in set(used)])


def _rebuilt(header: Header) -> Tokenizer:
    """Raises UserError for a tokenizer of a kind that is not known, or whose lists do not fit."""
    kind = header.metadata.get("tokenizer.ggml.model")
    tokens, kinds = _field(header, "tokens", list), _field(header, "token_type", list)
    different = len({token for token in tokens if isinstance(token, str)})
    if not different == len(tokens) == len(kinds):
        raise UserError(f"{header.file}: {len(tokens)} tokens, {different} of them different, {len(kinds)} types")
    with refused_in_one_line(f"{header.file}: its tokenizer cannot be used"):
        inner = _of_pieces(header, tokens, kinds) if kind == "llama" else _of_bytes(header, tokens)
        name = str(header.metadata.get("general.name")).lower()
        stripped = set(tokens) - set(NOT_STRIPPED) if any(part in name for part in STRIPPED_NAMES) else set()
        for number, special in ((CONTROL, True), (pieces.UNKNOWN, True), (USER_DEFINED, False)):
            inner.add_tokens(
                [
                    AddedToken(token, special=special, normalized=False, rstrip=token in stripped)
                    for token, found in zip(tokens, kinds, strict=True)
                    if found == number
                ]
            )
    return inner


def _of_bytes(header: Header, tokens: list[str]) -> Tokenizer:
    kind, stated = (header.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    cut = ALIASES.get(str(stated), stated)
    if kind != "gpt2" or cut not in CUTS:
        raise UserError(
            f"{header.file}: its tokenizer is {str(kind)[:99]!r}, cut as {str(stated)[:99]!r}: only pieces as of Llama "
            f"2 and byte-level BPE of {', '.join(CUTS)} are read"
        )
    merges = header.metadata.get("tokenizer.ggml.merges", [])
    pairs = [(m.partition(" ")[0], m.partition(" ")[2]) for m in merges if isinstance(m, str)]
    inner = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=cut in WHOLE_WORDS))
    steps = [step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {}) for step in CUTS[cut]]
    parts = json.loads(inner.to_str()) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    inner = Tokenizer.from_str(json.dumps(parts))
    inner.decoder = ByteLevelDecoder()
    return inner


def _of_pieces(header: Header, tokens: list[str], kinds: list[int]) -> Tokenizer:
    scores = _field(header, "scores", list)
    if len(scores) != len(tokens) or not all(isinstance(score, float) and math.isfinite(score) for score in scores):
        raise UserError(f"{header.file}: {len(tokens)} tokens, and {len(scores)} scores, not all of them numbers")
    in_front = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    return pieces.rebuilt(tokens, kinds, scores, in_front is not False)
