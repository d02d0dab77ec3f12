"""What models keep of the tokens that they have read: answers are those of a model that keeps nothing."""

import pytest
import torch

from benchmarks.families.small import small_model
from wrinklefree.engine.sampling import Sampling
from wrinklefree.serve.fallback import TransformersEngine
from wrinklefree.serve.past import find_way

WAYS = {"llama": "pieces", "opt": "pieces", "mamba": "tokens", "mamba2": "tokens", "recurrent_gemma": "anew"}


@pytest.mark.parametrize("family", WAYS)
def test_answers_do_not_depend_on_what_a_model_keeps(family: str) -> None:
    model = small_model(family)
    engine = TransformersEngine(model, 64, 2)
    prompts = [[3, 9, 4, 17, 5, 6, 33, 8], [40, 41, 42]]
    slots = [engine.open(prompt, Sampling(temperature=0, max_new_tokens=6)) for prompt in prompts]
    answers: dict[int, list[int]] = {slot: [] for slot in slots}
    while any(engine.finished(slot) is None for slot in slots):
        for slot, token in engine.step().items():
            answers[slot].append(token)
    for slot, prompt in zip(slots, prompts, strict=True):
        assert answers[slot] == greedy(model, prompt, 6)


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", WAYS)
def test_how_a_model_reads_is_found_by_trying(family: str) -> None:
    with torch.inference_mode():
        assert find_way(small_model(family)) == WAYS[family]


def test_a_model_that_forgets_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, past_key_values=None, **more: forward(ids, **more))
    with torch.inference_mode():
        assert find_way(model) == "anew"
