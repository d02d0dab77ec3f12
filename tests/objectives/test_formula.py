"""Heads that are more than a product: the loss is that of the model's own logits, and so are its gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import family
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core.errors import UserError
from wrinklefree.objectives.language_model import BodyAndHead, SplitModel, vocabulary_losses

CE = DistillationConfig(name="none")
RWKV = {"attention_hidden_size": 64, "context_length": 64}

# What the head has beyond a product, by family and settings.
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "a bias": ("phi", {}),
    "a scale": ("granite", {"logits_scaling": 8.0}),
    "a factor": ("cohere", {"logit_scale": 0.0625}),
    "a cap": ("gemma2", {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 30.0}),
    "a bias and another name": ("biogpt", {}),
    "another name": ("rwkv", RWKV),
    "layers before it": ("bert", {"is_decoder": True}),
}


def model_with(head: str) -> PreTrainedModel:
    """A tiny model, whose logits are as large as those of real ones, and whose biases are not zero."""
    name, values = HEADS[head]
    model = family(name, **values)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(300)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.arange(5, 29).view(2, 12)
    return {"input_ids": ids, "labels": ids}


def own_loss(model: PreTrainedModel) -> Tensor:
    logits = model(input_ids=batch()["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch()["input_ids"][:, 1:].flatten())


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_that_of_the_models_own_logits(head: str) -> None:
    model = model_with(head)
    expected = own_loss(model)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = vocabulary_losses(SplitModel(model), None, batch(), CE).loss
    found.backward()
    torch.testing.assert_close(found, expected)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()) + 1e-7)


@pytest.mark.parametrize("head", ["a bias", "a cap"])
def test_a_teacher_keeps_what_its_head_has(head: str) -> None:
    model = model_with(head)
    both = DistillationConfig(name="logits", weight=1.0)
    found = vocabulary_losses(SplitModel(model), SplitModel(model), batch(), both)
    assert found.kl.abs() < 1e-6
    torch.testing.assert_close(found.ce, own_loss(model))


@pytest.mark.parametrize("name", ["llama", "gemma", "olmo2"])
def test_a_plain_head_stays_a_product(name: str) -> None:
    """It is cheaper, and thinkers need its weight."""
    values = {"head_dim": 16, "num_key_value_heads": 2} if name == "gemma" else {}
    assert BodyAndHead(family(name, **values)).product is not None


def test_thinkers_refuse_a_head_that_is_more() -> None:
    with pytest.raises(UserError, match="PhiForCausalLM: its logits are more than a product"):
        BodyAndHead(model_with("a bias"))
