"""Accuracy: the likelihoods are those of one choice at a time, and the interval is Wilson's."""

from collections.abc import Callable

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.data import packing
from wrinklefree.data.sources import Example
from wrinklefree.evaluate import accuracy
from wrinklefree.evaluate.accuracy import Accuracy, choose, measure_accuracy
from wrinklefree.objectives.language_model import BodyAndHead

pytestmark = pytest.mark.numeric

WORDS = (" w1", " w2", " w3")
MIXED = (" w1", " w1 w5", " w7 w8 w9")  # of different lengths, one the beginning of another


def questions(choices: tuple[str, ...], count: int = 24) -> list[Example]:
    """Prompts of 1 to 12 words, answers in turn."""
    prompts = [" ".join(f"w{(7 * i + 3 * j) % 90}" for j in range(1 + i % 12)) for i in range(count)]
    return [Example(prompt, choices[i % len(choices)], choices) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def alone(model: PreTrainedModel, example: Example, choice: str, length: int) -> float:
    """log p(choice | prompt), by a forward pass of its own without padding; at most `length` tokens with the last."""
    tokenizer = tiny.tokenizer()
    prompt, answer = (tokenizer(text)["input_ids"] for text in (example.prompt, choice))
    prompt = prompt[max(0, len(prompt) + len(answer) + 1 - length) :]
    logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def by_hand(model: PreTrainedModel, examples: list[Example], length: int) -> int:
    """Right answers, one choice at a time."""
    likeliest = [max(e.choices, key=lambda choice: alone(model, e, choice, length)) for e in examples]
    return sum(best == e.answer for best, e in zip(likeliest, examples, strict=True))


@pytest.mark.parametrize("length", [64, 8])
@pytest.mark.parametrize("choices", [WORDS, MIXED])
@pytest.mark.parametrize("make", [tiny.llama, tiny.qwen])
def test_likelihoods_are_those_of_each_choice_alone(
    make: Callable[[], PreTrainedModel], choices: tuple[str, ...], length: int
) -> None:
    model, examples = make(), questions(choices)
    rows = [(e, choice) for e in examples for choice in e.choices]
    answered = [e._replace(answer=choice) for e, choice in rows]
    documents = [packing.shorten(d, length)[:, :-1] for d in packing.encode(tiny.tokenizer(), answered)]
    found = accuracy.log_likelihoods(BodyAndHead(model), documents, batch_size=5, device=model.device)
    expected = torch.tensor([alone(model, e, choice, length) for e, choice in rows])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("choices", [WORDS, MIXED])
def test_the_likeliest_choice_counts(choices: tuple[str, ...], batch_size: int) -> None:
    model, examples = tiny.llama(initializer_range=0.5), questions(choices)
    found = measure_accuracy(model, tiny.tokenizer(), examples, batch_size=batch_size, length=64)
    assert found == Accuracy(by_hand(model, examples, 64), len(examples))
    assert 0 < found.correct < found.total


def test_choices_of_one_word_share_the_pass_over_their_question() -> None:
    model, rows = tiny.llama(), []
    examples = questions(WORDS)
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    measure_accuracy(model, tiny.tokenizer(), examples, batch_size=8, length=64)
    hook.remove()
    assert sum(rows[-3:]) == len(examples)  # those before are the model's own check


def test_examples_without_choices_have_no_accuracy() -> None:
    for examples in ([], [Example("w1", " w2")]):
        with pytest.raises(UserError, match="fixed set of answers"):
            measure_accuracy(tiny.llama(), tiny.tokenizer(), examples, batch_size=8, length=64)


def test_fewer_examples_are_spread_over_all() -> None:
    examples = questions(WORDS, count=20)
    assert choose(examples, 5) == [examples[i] for i in (2, 6, 10, 14, 18)]
    assert choose(examples, 20) == choose(examples, None) == examples


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (500, 1000, 0.4691, 0.5309)],
)
def test_interval_is_wilsons(correct: int, total: int, low: float, high: float) -> None:
    """Against published values of the score interval at 95 %."""
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=1e-4)
    assert Accuracy(correct, total).value == correct / total
