"""What a transformers model keeps of the tokens that it has read, so that it need not read them again.

Models keep keys and values, or states of a fixed size, under names of their own. With keys and values alone, a prompt
can be read in pieces. Of the others, some forget what came before a piece, so they read it at once. Some keep nothing,
or what they keep is wrong. `find_way` finds out, with eight tokens before the first request.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from wrinklefree.families.foreign import REFUSALS

Way = Literal["pieces", "tokens", "anew"]  # in pieces; the prompt at once and then one by one; all of it for each token

NAMES = ("past_key_values", "cache_params", "state")  # of what is kept, in outputs and as an argument

PROBE = 8  # tokens
CUTS: dict[Way, tuple[int, ...]] = {"pieces": (3, 4, 1), "tokens": (6, 1, 1)}  # the lengths of what is read at once
NEAR = 0.15  # of a token's range of logits: rounding to bf16 or int8 changes up to 0.08 in SmolLM2-135M


class Past:
    """One sequence that is read from its beginning."""

    def __init__(self, model: PreTrainedModel, way: Way) -> None:
        self._model, self._way = model, way
        self._cuts = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._kept: dict[str, Any] = {}
        self.length = 0  # tokens that have been read

    def piece(self, most: int, left: int) -> int:
        """How many of the `left` tokens that follow are read at once, if `most` are wanted."""
        return min(left, most) if self._way == "pieces" else left

    def read(self, tokens: Sequence[int], size: int, all_logits: bool) -> Tensor:
        """Read the next `size` of `tokens`, which is the sequence from its beginning.

        Returns logits [1, length, vocab]: of each token that was read if `all_logits`, else of the last one at least.
        """
        start, self.length = self.length, self.length + size
        first = start if self._way != "anew" else 0
        ids = torch.tensor([tokens[first : self.length]], device=self._model.device)
        keep = {"logits_to_keep": 1} if self._cuts and not all_logits else {}
        out = self._model(ids, use_cache=self._way != "anew", **self._kept, **keep)
        if self._way != "anew":
            self._kept = {name: out[name] for name in NAMES if name in out}
        logits: Tensor = out.logits
        return logits[:, -size:]

    def in_pieces(self) -> bool:
        """Whether a prompt can be read in pieces, by what is kept of those that have been read: keys and values."""
        caches = [c.self_attention_cache if isinstance(c, EncoderDecoderCache) else c for c in self._kept.values()]
        return bool(caches) and all(
            isinstance(cache, Cache)
            and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
            for cache in caches
        )


def find_way(model: PreTrainedModel) -> Way:
    """Return the quickest way to read that gives the logits of all tokens read together."""
    vocab = int(model.config.get_text_config().vocab_size)
    tokens = [(7 * place + 3) % vocab for place in range(PROBE)]
    whole = Past(model, "anew").read(tokens, PROBE, all_logits=True)[0].float()
    for way, cuts in CUTS.items():
        past = Past(model, way)
        found = _read(past, tokens, cuts)
        if (way == "tokens" or past.in_pieces()) and _same(found, whole):
            return way
    return "anew"


def _read(past: Past, tokens: list[int], cuts: tuple[int, ...]) -> Tensor | None:
    """Logits [PROBE, vocab] of tokens that are read in pieces of these lengths. None if the model refuses it."""
    try:
        return torch.cat([past.read(tokens, size, all_logits=True)[0].float() for size in cuts])
    except REFUSALS:
        return None


def _same(found: Tensor | None, whole: Tensor) -> bool:
    if found is None or found.shape != whole.shape:
        return False
    spread = whole.amax(-1) - whole.amin(-1)
    return bool(((found - whole).abs().amax(-1) <= NEAR * spread).all())
