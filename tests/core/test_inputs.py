"""Inputs are rounded to eight bits with one scale a token."""

import pytest
import torch

from wrinklefree.core.inputs import int8_per_token

pytestmark = pytest.mark.numeric


def test_activations_are_int8_per_token() -> None:
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, 48).unsqueeze(1)
    quantized = int8_per_token(x)
    steps = quantized * 127 / x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.abs().max() <= 127.001
    assert ((quantized - x).abs() <= x.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
