"""Tokenizers of SentencePiece's kind in GGUF files: Llama 2, TinyLlama, Mistral. llama.cpp calls them `llama`.

Text has `▁` for spaces, mostly one in front. Neighbours are joined as long as both together are a token, the token
with the highest score first. What is no token becomes bytes, `<0x00>` to `<0xFF>`.

tokenizer.json has merges in place of scores, and joins no other pairs. Both cut every text alike if, for each token,
the last two parts that the merges make of it are a merge, whose place is then its score: no other pair of parts ever
covers this token. For parts that cover exactly a token's text have come from merges within it, in the order in which
they come if it stands alone, and of those states just one has two parts. A token that stays in three parts is never
made.

A tokenizer that has no token for each byte has one for all that it does not know. llama.cpp stops the program there.

llama.cpp has a kind with merges and `▁`, too (`gemma4`). It is not written: it puts no space in front of a text, and it
cuts at line breaks, which a tokenizer with merges learnt on whole texts does not.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, BYTE = 1, 2, 6  # llama.cpp's types of tokens
LONGEST = 256  # characters of a token that is made of others: longer ones would take minutes to cut

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, _REPLACE]}
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
# (normalizer, pre_tokenizer) -> whether a space is put in front; see also `lacks_space`.
SPACES: list[tuple[Any, Any, bool]] = [
    (_PREPEND, None, True),
    (_REPLACE, None, False),
    (None, _METASPACE | {"prepend_scheme": "always"}, True),
    (None, _METASPACE | {"prepend_scheme": "first"}, True),
    (None, _METASPACE | {"prepend_scheme": "never"}, False),
]

Merge = tuple[str, str]


def has_pieces(parts: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    return bool(parts["model"].get("byte_fallback")) and "ByteLevel" not in json.dumps(parts["pre_tokenizer"])


def fault(parts: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first part of a tokenizer.json that llama.cpp would do otherwise, and what it is; None if there is none."""
    model = parts["model"]
    if model.get("dropout") or model.get("ignore_merges") or model.get("end_of_word_suffix"):
        return "model", "it drops or ignores merges, or marks the ends of words"
    if space_in_front(parts) is None:
        shown = {name: parts[name] for name in ("normalizer", "pre_tokenizer")}
        return "normalizer", json.dumps(shown, ensure_ascii=False)
    places = places_of(model)
    for token in sorted(_ordinary(parts)):
        if len(token) > LONGEST:
            return "model.vocab", f"a token of {len(token):,} characters"
        pair = last_pair(token, places)
        if pair is not None and pair not in places:
            return "model.merges", f"{pair[0]!r} and {pair[1]!r} are not joined; llama.cpp joins all that make a token"
    return None


def lacks_bytes(parts: Mapping[str, Any]) -> bool:
    """Whether there are characters that have no token, so that llama.cpp stops at them."""
    return not set(BYTES) <= parts["model"]["vocab"].keys()


def unknown_in(parts: Mapping[str, Any], text: str) -> bool:
    """Whether `text` has a character that llama.cpp stops at: only with pieces, for bytes of others are tokens."""
    if not (has_pieces(parts) and lacks_bytes(parts)):
        return False
    return not set(text.replace(" ", SPACE)) <= parts["model"]["vocab"].keys()


def space_in_front(parts: Mapping[str, Any]) -> bool | None:
    """Whether a space is put in front of a text; None if spaces are dealt with in a way that is not known here."""
    stated = (parts["normalizer"], parts["pre_tokenizer"])
    return next((front for *known, front in SPACES if tuple(known) == stated), None)


def lacks_space(parts: Mapping[str, Any], text: str) -> bool:
    """Whether a tokenizer puts no space in front of `text`, or of a part of it, where llama.cpp does.

    Metaspace takes a space that is there already, and with `first` it puts none behind special tokens. No file can say
    that.
    """
    steps = parts["pre_tokenizer"] or {}
    if steps.get("prepend_scheme", "never") == "never":
        return False
    added = [entry for entry in parts["added_tokens"] if entry["content"] in text]
    if steps["prepend_scheme"] == "first":
        return text.startswith(" ") or bool(added)
    return text.startswith(" ") or any(f"{entry['content']} " in text for entry in added if not entry["rstrip"])


def scores_of(parts: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """The score of each token: the higher, the earlier it is made. The lowest is for those that are never made."""
    places, ordinary = places_of(parts["model"]), _ordinary(parts)
    pairs = [last_pair(token, places) if token in ordinary else None for token in tokens]
    return [-float(len(places) if pair is None else places[pair]) for pair in pairs]


def last_pair(token: str, places: Mapping[Merge, int]) -> Merge | None:
    """The last two parts that merges make of a token's characters. None if more are left, or if it is one character."""
    parts = list(token)
    while len(parts) > 2:
        found = [(places[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in places]
        if not found:
            return None
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def kinds_of(parts: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> list[int]:
    """llama.cpp's types of the tokens, with those for bytes and for what is unknown."""
    own = dict.fromkeys(BYTES, BYTE) | {parts["model"].get("unk_token"): UNKNOWN}
    return [own.get(token, kind) for token, kind in zip(tokens, kinds, strict=True)]


def places_of(model: Mapping[str, Any]) -> dict[Merge, int]:
    """The place of each merge of a tokenizer.json, in either of its two ways to write them."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return {(left, right): place for place, (left, right) in enumerate(pairs)}


def joins(ordinary: set[str], scores: Mapping[str, float]) -> list[Merge]:
    """All ways to make one of the tokens of two others, the highest score first."""
    found = [
        (token[:i], token[i:])
        for token in ordinary
        if len(token) <= LONGEST
        for i in range(1, len(token))
        if token[:i] in ordinary and token[i:] in ordinary
    ]
    return sorted(found, key=lambda pair: (-scores[pair[0] + pair[1]], pair))


def _ordinary(parts: Mapping[str, Any]) -> set[str]:
    """Tokens that are made of text: neither added, nor for bytes."""
    added = {entry["content"] for entry in parts["added_tokens"]}
    return parts["model"]["vocab"].keys() - added - set(BYTES)


def rebuilt(tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float], in_front: bool) -> Tokenizer:
    """The tokenizer that llama.cpp makes of a file's lists, without its added tokens."""
    ordinary = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    merges = joins(ordinary, dict(zip(tokens, scores, strict=True)))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if in_front else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if in_front else [])])
    return inner
