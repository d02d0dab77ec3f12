"""The fingerprint of a model tells a trained one from the one that it was."""

import torch
from tiny import llama

from wrinklefree.core.fingerprint import model_fingerprint


def test_fingerprints_of_models_tell_a_trained_one() -> None:
    first, second = llama(), llama()
    assert model_fingerprint(first.state_dict()) == model_fingerprint(second.state_dict())
    with torch.no_grad():
        second.model.norm.weight += 1e-3
    assert model_fingerprint(first.state_dict()) != model_fingerprint(second.state_dict())
