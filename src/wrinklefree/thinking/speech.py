"""A frozen language model that answers after soft tokens between its tags, where it would have written a thought.

    prompt  <think>  s_1 ... s_k  </think>  answer

The prompt is run once. The thinker thinks about its last hidden states, and the answer continues from its keys and
values. So an answer costs the prompt, the thinking, k + 1 positions in one pass, and its own tokens.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.data.problems import same_answer
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking import tags
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.reading import read_logits


class Prefix(NamedTuple):
    """Prompts that were run, padded on the left: last hidden states [B, L, D], mask [B, L], keys and values."""

    states: Tensor
    mask: Tensor
    cache: Cache


class Speaker:
    """A language model that reads prompts and answers after soft tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError if the model has no tags, or if its logits are not simply the head's product."""
        self.model, self.tokenizer = model, tokenizer
        self.tags, self.decoder = tags.find_tags(tokenizer), BodyAndHead(model)
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
        """Thoughts about the prompts [B, S, D'], and the mask [B, S] of those that were made: `LatentThinker.think`."""
        return thinker.think(thinker.whiten(thinker.compressor.compress(prefix.states)), prefix.mask)

    @torch.no_grad()
    def answer(
        self,
        prefix: Prefix,
        soft_tokens: Tensor,
        soft_mask: Tensor,
        max_new_tokens: int,
        *,
        copies: int = 1,
        temperature: float = 0.0,
        closed: bool = True,
    ) -> list[list[int]]:
        """The ids that the model says after each prompt and its soft tokens, with the end-of-sequence token.

        `soft_tokens` [B, M, D] are there if `soft_mask` [B, M] is True; `</think>` follows them. Without `closed` it
        does not, and the model goes on thinking in words. Each prompt is answered `copies` times in a row. Temperature
        0 takes the likeliest token. The prefix can be used again.
        """
        if closed:
            close = torch.full((len(soft_tokens), 1), self.tags.close, device=soft_tokens.device)
            soft_tokens = torch.cat([soft_tokens, self.embed(close).to(soft_tokens.dtype)], dim=1)
            soft_mask = F.pad(soft_mask, (0, 1), value=True)
        mask = torch.cat([prefix.mask, soft_mask], dim=1)
        cache = twin(prefix.cache)
        if soft_tokens.shape[1]:
            logits = self._forward(cache, mask, inputs_embeds=soft_tokens, number=soft_tokens.shape[1])
        else:
            logits = read_logits(self.decoder, prefix.states[:, -1])
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
        return read_logits(self.decoder, out.last_hidden_state[:, -1])

    def states(self, prompts: Sequence[Tensor], thoughts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
        """The states [N, D] that predict the N tokens of all given answers, differentiable in the thoughts.

        Each sample has the ids [L] of its prompt, the embeddings [M, D] of its thought, written or soft, and the ids
        [A] of its answer; `</think>` follows the thought.
        """
        close = torch.tensor([self.tags.close], device=self.model.device)
        rows = [
            torch.cat([self.embed(prompt), thought, self.embed(torch.cat([close, answer]))])
            for prompt, thought, answer in zip(prompts, thoughts, answers, strict=True)
        ]
        embedded = pad_sequence(rows, batch_first=True)  # on the right: no position sees it
        hidden = self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        parts = []
        for i, (prompt, thought, answer) in enumerate(zip(prompts, thoughts, answers, strict=True)):
            first = len(prompt) + len(thought)
            parts.append(hidden[i, first : first + len(answer)])
        return torch.cat(parts)

    def is_right(self, said: Sequence[int], gold: Sequence[int]) -> bool:
        """Whether the ids of an answer state what the ids of the right one do."""
        texts = (str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in (said, gold))
        return same_answer(*texts)


def _choose(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)


def twin(cache: Cache) -> Cache:
    """A second cache with the same keys and values. Growing makes new tensors, so the first one is not changed."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
