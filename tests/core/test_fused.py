"""The native loops of training: they choose the codes of torch, decode them alike, and add up the same gradients."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wrinklefree.core import fused, library
from wrinklefree.core.codes import Codes
from wrinklefree.core.inputs import int8_per_token
from wrinklefree.core.method import QuantLinear, QuantMethod, find
from wrinklefree.methods.anemll import Config as Anemll
from wrinklefree.methods.fairy2 import Config as Fairy2

pytestmark = pytest.mark.skipif(library.available() is not None, reason=str(library.available()))

FAIRY = [
    {"num_stages": stages, "scale_granularity": granularity, "group_size": 12}
    for stages in (1, 2, 3, 4)
    for granularity in ("rank1", "tensor", "row", "group")
]
LUT = [{"bits": bits, "rank": 3, "init": "svd"} for bits in (2, 3, 4)]
METHODS = [("fairy2", s) for s in FAIRY] + [("anemll", s) for s in LUT]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layer(name: str, settings: dict, shape: tuple[int, int] = (70, 72)) -> QuantLinear:
    torch.manual_seed(0)
    method: QuantMethod = find(name)(**settings)
    made = method.layer(nn.Linear(shape[1], shape[0], bias=False), method)
    with torch.no_grad():  # as after some training: the scales are no longer the best for the weight
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() / 3)
    return made


def results(made: QuantLinear) -> tuple[Codes, Tensor, dict[str, Tensor]]:
    """Codes, quantized weight and all gradients."""
    made.zero_grad()
    value = made.quantized_weight()
    (value * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return made.encode(), value.detach(), {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "settings"), METHODS)
@pytest.mark.parametrize("shape", [(70, 72), (64, 48)])
def test_native_loops_do_what_torch_does(
    name: str, settings: dict, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(name, settings, shape)
    codes, value, grads = results(made)
    monkeypatch.setattr(fused, "serves", lambda tensor: False)
    expected, weight, gradients = results(made)
    assert torch.equal(codes.index, expected.index)
    assert torch.equal(value, weight)
    assert grads.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert torch.allclose(grads[key], gradient, rtol=1e-4, atol=1e-5), key


def test_odd_widths_are_padded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer("fairy2", {}, (9, 21))
    codes, value, grads = results(made)
    monkeypatch.setattr(fused, "serves", lambda tensor: False)
    expected, weight, gradients = results(made)
    assert torch.equal(codes.index, expected.index)
    assert torch.equal(value, weight)
    assert all(torch.allclose(grads[key], g, rtol=1e-4, atol=1e-5) for key, g in gradients.items())


@pytest.mark.parametrize(("name", "settings"), [METHODS[4], METHODS[7], METHODS[-1]])
def test_any_number_of_threads_gives_the_same_bits(name: str, settings: dict) -> None:
    made = layer(name, settings, (576, 192))
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(results(made))
    (codes, value, grads), *others = runs
    for other, again, gradients in others:
        assert torch.equal(other.index, codes.index)
        assert torch.equal(again, value)
        assert all(torch.equal(gradients[key], gradient) for key, gradient in grads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_int8_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 40, 83) * torch.logspace(-9, 9, 40).unsqueeze(1)).to(dtype)
    x[0, 1] = 0
    x[0, 2, 5], x[0, 3, 5] = torch.inf, torch.nan
    found, expected = fused.rounded(x), int8_per_token(x)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert found.isnan().any(-1).sum() == 2
    assert torch.equal(found.signbit()[0, 4:], expected.signbit()[0, 4:])


def test_rounding_hands_the_gradient_on() -> None:
    x = torch.randn(4, 10, requires_grad=True)
    upstream = torch.randn(4, 10)
    fused.rounded(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_a_layer_that_trains_its_bias_alone_has_no_gradient_of_its_weight() -> None:
    made = find("fairy2")().layer(nn.Linear(8, 8), find("fairy2")())
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name == "bias")
    F.linear(torch.randn(2, 8), made.effective_weight(torch.float32), made.bias).sum().backward()
    assert made.bias.grad is not None
    assert made.weight.grad is None


@pytest.mark.parametrize(
    ("scales", "factors"),
    [
        ((2, 1, 2, 1, 1), None),  # of fewer stages
        ((1, 2, 2, 1, 1), None),
        ((2, 2, 1, 1, 1), None),
        ((2, 2, 2, 3, 1), None),
        ((2, 2, 2, 1, 3), None),
        ((2, 2, 2, 1, 1), (1, 4)),
        ((2, 2, 2, 1, 1), (4, 1)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_complex_scales_of_other_shapes_are_refused(
    scales: tuple[int, ...], factors: tuple[int, int] | None, device: str
) -> None:
    tensors = {"scales": torch.ones(scales, device=device)}
    if factors is not None:
        tensors |= {n: torch.ones(k, device=device) for n, k in zip(("rows", "columns"), factors, strict=True)}
    index = torch.zeros(2, 2, 4, 4, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="are not those of codes"):
        Fairy2().decode(Codes(index, 2, tensors, (8, 8)))


@pytest.mark.parametrize(("a", "b"), [((1, 2), (2, 6)), ((4, 2), (2, 1))])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factors_of_other_shapes_are_refused(a: tuple[int, int], b: tuple[int, int], device: str) -> None:
    tensors = {name: torch.ones(shape, device=device) for name, shape in (("lut", (4,)), ("a", a), ("b", b))}
    index = torch.zeros(4, 6, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="factors"):
        Anemll().decode(Codes(index, 2, tensors, (4, 6)))


def test_the_library_refuses_what_does_not_belong_together() -> None:
    scales = fused.ComplexScales(torch.ones(2, 5, 2, 1, 1), None, None)
    with pytest.raises(ValueError, match="stages: must be 1 to 4"):
        fused.complex_codes(torch.ones(4, 4), scales)
    with pytest.raises(ValueError, match="size: must be 4, 8 or 16"):
        fused.table_codes(torch.ones(2, 2), torch.ones(2, 2), torch.ones(5))
