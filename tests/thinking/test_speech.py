"""Soft tokens: a thought as embeddings is answered as if written, and the adapter begins at what states predict."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.thinking.hidden_pairs import HiddenPairs
from wrinklefree.thinking.injection import RIDGE, fit_adapter
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.speech import Speaker

pytestmark = pytest.mark.numeric


def test_a_written_thought_as_embeddings_is_the_written_thought(speaker: Speaker, train: HiddenPairs) -> None:
    """The answer after a prefix, its cache and embedded words is that of generating from the text."""
    prompts = [pair.prompt_ids.tolist() for pair in train.pairs[:5]]
    thoughts = [speaker.embed(pair.thought_ids.long()) for pair in train.pairs[:5]]
    masks = [torch.ones(len(thought), dtype=torch.bool) for thought in thoughts]
    soft_tokens, soft_mask = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (thoughts, masks))
    said = speaker.answer(speaker.prefill(prompts), soft_tokens, soft_mask, 6)
    for pair, answer in zip(train.pairs[:5], said, strict=True):
        ids = torch.cat([pair.prompt_ids, pair.thought_ids, torch.tensor([speaker.tags.close])]).long()[None]
        out = speaker.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0
        )
        assert answer == out[0, ids.shape[1] :].tolist()


def test_thinking_in_words_is_generation(speaker: Speaker, train: HiddenPairs) -> None:
    prompts = [pair.prompt_ids.tolist() for pair in train.pairs[:4]]
    prefix = speaker.prefill(prompts)
    said = speaker.answer(prefix, prefix.states[:, :0], prefix.mask[:, :0], 12, closed=False)
    for prompt, answer in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt])
        out = speaker.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert answer == out[0, ids.shape[1] :].tolist()


def test_a_prefix_serves_again_and_many_times(speaker: Speaker, train: HiddenPairs) -> None:
    prefix = speaker.prefill([pair.prompt_ids.tolist() for pair in train.pairs[:3]])
    empty = prefix.states[:, :0], prefix.mask[:, :0]
    once = speaker.answer(prefix, *empty, 5)
    copies = speaker.answer(prefix, *empty, 5, copies=3)
    assert copies == [answer for answer in once for _ in range(3)]
    torch.manual_seed(0)
    hot = speaker.answer(prefix, *empty, 5, copies=50, temperature=3.0)
    assert len({tuple(answer) for answer in hot[:50]}) > 5


def test_forced_states_are_those_of_a_plain_pass(speaker: Speaker, train: HiddenPairs) -> None:
    some = train.pairs[:4]
    prompts, answers = ([getattr(pair, name).long() for pair in some] for name in ("prompt_ids", "answer_ids"))
    thoughts = [speaker.embed(pair.thought_ids.long()) for pair in some]
    states = speaker.states(prompts, thoughts, answers)
    expected = []
    for pair in some:
        ids = torch.cat([pair.prompt_ids, pair.thought_ids, torch.tensor([speaker.tags.close]), pair.answer_ids]).long()
        hidden = speaker.decoder.states({"input_ids": ids[None]})[0]
        expected.append(hidden[-len(pair.answer_ids) - 1 : -1])
    torch.testing.assert_close(states, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_the_adapter_begins_at_the_embeddings_of_what_states_predict(
    thinker: LatentThinker, speaker: Speaker, train: HiddenPairs
) -> None:
    """The ridge regression to them, and nearer to them than any map is to the same embeddings in another order.

    Some 420 thoughts: the 33 dimensions of the states explain a tenth of an order that has nothing to do with them.
    """
    fit_adapter(thinker, speaker, train, len(train))
    batch = train.batch(range(len(train)))
    there = batch["tokens"] >= 0
    whitened = thinker.whiten(batch["thoughts"])
    spoken, wanted = thinker.speak(whitened)[there], speaker.embed(batch["tokens"][there])
    states = F.pad(thinker.states(whitened)[there].double(), (0, 1), value=1.0)
    ridge = RIDGE * states.square().sum(0).mean()

    def nearest(targets: Tensor, ridge: Tensor) -> Tensor:
        rows = torch.cat([states, ridge.sqrt() * torch.eye(states.shape[1])])
        sides = F.pad(targets.double(), (0, 0, 0, states.shape[1]))
        return states @ torch.linalg.lstsq(rows, sides, driver="gelsd").solution

    torch.testing.assert_close(spoken.double(), nearest(wanted, ridge), atol=1e-5, rtol=0)
    shuffled = wanted[torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0))]
    errors = [(x - y).square().sum() for x, y in ((spoken, wanted), (nearest(shuffled, 0 * ridge), shuffled))]
    assert errors[0] < 0.75 * errors[1]
