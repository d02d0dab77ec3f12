"""A frozen language model that answers after thoughts which were not written: soft tokens in between its tags.

    prompt  <think>  s_1 ... s_k  </think>  answer

The prompt is run once; its last hidden states are what the thinker thinks about, its keys and values are what the rest
continues from. So an answer costs the prompt, the thinking, k + 1 positions in one pass, and its own tokens.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking import tags
from wrinklefree.thinking.network import LatentThinker


class Prefix(NamedTuple):
    """Prompts that have been run: last hidden states [B, L, D], mask [B, L], padded on the left, and their cache."""

    states: Tensor
    mask: Tensor
    cache: Cache


class Speaker:
    """The language model around a thought."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError where the model has no tags, or a head that is not plain."""
        self.model, self.tokenizer = model, tokenizer
        self.tags, self.decoder = tags.find(tokenizer), BodyAndHead(model)
        self.ends = {tokenizer.eos_token_id}

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] as the model's input embeddings [..., D]."""
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """Run the prompts, which end with `<think>`."""
        ids, mask = (t.to(self.model.device) for t in tags.padded(prompts, tags.pad_id(self.tokenizer), "left"))
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model.base_model(input_ids=ids, attention_mask=mask.long(), position_ids=places, use_cache=True)
        return Prefix(out.last_hidden_state, mask, out.past_key_values)

    @torch.no_grad()
    def think(self, thinker: LatentThinker, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """The thinker's thoughts about the prompts, and which were made: `LatentThinker.think`."""
        return thinker.think(thinker.whiten(thinker.compressor.compress(prefix.states)), prefix.mask)

    @torch.no_grad()
    def answer(
        self,
        prefix: Prefix,
        middle: Tensor,
        made: Tensor,
        max_new_tokens: int,
        *,
        copies: int = 1,
        temperature: float = 0.0,
        closed: bool = True,
    ) -> list[list[int]]:
        """What the model says after each prompt, `middle` [B, M, D] where `made` [B, M], and `</think>`; with its end.

        Each sample is answered `copies` times in a row; temperature 0 takes the likeliest token. Without `closed` the
        model goes on thinking in words by itself. The prefix can be used again.
        """
        if closed:
            close = torch.full((len(middle), 1), self.tags.close, device=middle.device)
            middle = torch.cat([middle, self.embed(close).to(middle.dtype)], dim=1)
            made = F.pad(made, (0, 1), value=True)
        mask = torch.cat([prefix.mask, made], dim=1)
        cache = twin(prefix.cache)
        if middle.shape[1]:
            logits = self._forward(cache, mask, inputs_embeds=middle, number=middle.shape[1])
        else:
            logits = self._logits(prefix.states[:, -1])
        if copies > 1:
            cache.batch_repeat_interleave(copies)
            mask, logits = mask.repeat_interleave(copies, 0), logits.repeat_interleave(copies, 0)
        return self._continue(cache, mask, logits, max_new_tokens, temperature)

    def _continue(
        self, cache: Cache, mask: Tensor, logits: Tensor, max_new_tokens: int, temperature: float
    ) -> list[list[int]]:
        going = mask.new_ones(len(mask))
        columns = []
        for number in range(max_new_tokens):
            token = _choose(logits, temperature)
            columns.append(token.where(going, torch.full_like(token, -1)))
            going = going & ~torch.isin(token, torch.tensor(sorted(self.ends), device=token.device))
            if not going.any() or number == max_new_tokens - 1:
                break
            mask = F.pad(mask, (0, 1), value=True)
            logits = self._forward(cache, mask, input_ids=token[:, None], number=1)
        return [[i for i in row if i >= 0] for row in torch.stack(columns, 1).tolist()]

    def _forward(self, cache: Cache, mask: Tensor, *, number: int, **inputs: Tensor) -> Tensor:
        """Logits [B, V] of the last of `number` new positions."""
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -number:]
        out = self.model.base_model(
            attention_mask=mask.long(), position_ids=places, past_key_values=cache, use_cache=True, **inputs
        )
        return self._logits(out.last_hidden_state[:, -1])

    def _logits(self, states: Tensor) -> Tensor:
        operand, head = self.decoder.project(states)
        return F.linear(operand, head.to(operand.dtype)).float()

    def states(self, prompts: Sequence[Tensor], middles: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
        """The states [N, D] that predict the N tokens of all answers, teacher-forced; differentiable in the middles.

        Ids [L], embeddings [M, D] and ids [A] per sample; `</think>` comes after each middle.
        """
        close = torch.tensor([self.tags.close], device=self.model.device)
        rows = [
            torch.cat([self.embed(prompt), middle, self.embed(torch.cat([close, answer]))])
            for prompt, middle, answer in zip(prompts, middles, answers, strict=True)
        ]
        embedded = pad_sequence(rows, batch_first=True)  # on the right: no position sees it
        hidden = self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        parts = []
        for i, (prompt, middle, answer) in enumerate(zip(prompts, middles, answers, strict=True)):
            first = len(prompt) + len(middle)
            parts.append(hidden[i, first : first + len(answer)])
        return torch.cat(parts)


def _choose(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)


def twin(cache: Cache) -> Cache:
    """A cache of the same keys and values, which grows by itself: growing makes new tensors and leaves these alone."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def rows_of(padded: Tensor, lengths: Tensor) -> list[Tensor]:
    """Rows [length, ...] of a tensor [B, longest, ...] that is padded on the right."""
    return [row[: int(n)] for row, n in zip(padded, lengths, strict=True)]
