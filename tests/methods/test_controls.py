"""The controls: SEQ's levels and gradients, residual signs as the nearest points, scales by least squares."""

import pytest
import torch
from torch import nn

from wrinklefree.core.method import QuantLinear, find

torch.set_num_threads(1)


def made(name: str) -> QuantLinear:
    torch.manual_seed(0)
    return find(name).layer(nn.Linear(64, 16, bias=False), find(name)())


def test_seq_has_its_levels_and_the_gradients_of_lsq() -> None:
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[-9.0, -0.2, 0.7, 1.4]])
    layer = find("seq").layer(linear, find("seq")())
    layer.log_scales.data.zero_()
    assert layer.decode(layer.encode()).tolist() == [[-1.5, -0.5, 0.5, 1.5]]
    layer.quantized_weight().sum().backward()
    assert layer.weight.grad.tolist() == [[0, 1, 1, 1]]  # -9 is beyond the last level
    assert layer.log_scales.grad.item() == pytest.approx(-1.5 + (-0.5 + 0.2) + (0.5 - 0.7) + (1.5 - 1.4), rel=1e-5)


def test_residual_signs_are_the_nearest_of_four_points() -> None:
    layer = made("residual_signs")
    a, b = layer.encode().tensors["scales"].detach().unsqueeze(2).unbind(1)
    points = torch.stack([a + b, a - b, b - a, -a - b], dim=-1)
    nearest = points.sub(layer.weight.unsqueeze(-1)).abs().amin(-1)
    found = (layer.decode(layer.encode()) - layer.weight).abs()
    assert torch.allclose(found, nearest, atol=1e-6)
    first = a * layer.weight.sign()
    assert torch.equal(layer.decode(layer.encode()), first + b * (layer.weight - first).sign())


@pytest.mark.parametrize("name", ["seq", "residual_signs"])
def test_controls_train_what_they_pack(name: str) -> None:
    layer = made(name)
    weight = layer.quantized_weight()
    assert torch.equal(weight, layer.decode(layer.encode()))
    weight.square().sum().backward()
    assert layer.log_scales.grad.abs().min() > 0
    bits = layer.encode().num_bits() / layer.weight.numel()
    assert bits <= 2.5  # rows of 64; rows of 576 have 2.03 or 2.06


@pytest.mark.parametrize("name", ["seq", "residual_signs"])
def test_scales_are_least_squares_and_weighted_where_asked(name: str) -> None:
    layer = made(name)
    important = torch.ones(64)
    important[:8] = 1000.0
    before = (layer.decode(layer.encode()) - layer.weight)[:, :8].square().sum().item()
    layer.fit(important)
    after = (layer.decode(layer.encode()) - layer.weight)[:, :8].square().sum().item()
    assert after < before
