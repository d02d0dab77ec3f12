"""Codes chosen with error feedback: the same rule for every method, and never worse than the nearest codes."""

import dataclasses

import pytest
import torch
from tiny import shipped_methods
from torch import Tensor, nn

from wrinklefree.core.method import QuantLinear, QuantMethod
from wrinklefree.methods.anemll import Config as Anemll
from wrinklefree.methods.bitdistill import Config as BitDistill
from wrinklefree.methods.fairy2 import Config as Fairy2
from wrinklefree.methods.uniform import Config as Uniform
from wrinklefree.reconstruction import feedback
from wrinklefree.reconstruction.moments import Moments

pytestmark = pytest.mark.numeric

METHODS = {
    **{method.name: method for method in shipped_methods() if method.name not in ("bitdistill", "uniform")},
    "integers": Uniform(bits=3, granularity="group", group_size=16),
    "w1": Fairy2(num_stages=1),
    "groups": Fairy2(scale_granularity="group", group_size=8),
    "rows": Fairy2(scale_granularity="row"),
    "ternary groups": BitDistill(scale_mode="learned", granularity="group", group_size=16),
    "ternary": BitDistill(scale_mode="learned"),
    "frozen codes": Anemll(view="v2"),
}


def layer_of(method: QuantMethod, width: int = 48, out: int = 40) -> QuantLinear:
    torch.manual_seed(1)
    return method.layer(nn.Linear(width, out, bias=False), method)


def moments(width: int = 48) -> Tensor:
    """Second moments of inputs that have few directions, and one of them ten times as large as all others."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(256, 8, generator=generator) @ torch.randn(8, width, generator=generator)
    x = x + 0.3 * torch.randn(256, width, generator=generator)
    x[:, 3] *= 10
    return x.T @ x / len(x)


def output_error(original: Tensor, rounded: Tensor, H: Tensor) -> float:
    error = (original - rounded).double()
    return ((error @ H.double()) * error).sum().item()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> QuantMethod:
    return METHODS[request.param]


def test_methods_whose_scales_do_not_follow_the_weight_can_be_calibrated(method: QuantMethod) -> None:
    assert layer_of(method).calibrates


@pytest.mark.parametrize(
    "method", [BitDistill(), Fairy2(preset="paper"), Uniform(bits=8)], ids=["absmean", "paper", "8 bits"]
)
def test_methods_whose_scales_follow_the_weight_cannot(method: QuantMethod) -> None:
    assert not layer_of(method).calibrates


def test_the_outputs_are_nearer_than_with_the_nearest_codes(method: QuantMethod) -> None:
    layer, H = layer_of(method), moments()
    original = layer.weight.detach().clone()
    layer.fit(H.diagonal() / H.diagonal().mean())
    plain = output_error(original, layer.decode(layer.encode()).detach(), H)
    feedback.calibrate(layer, H)
    least = 1.0 if method.name == "anemll" else 0.8  # so many ranks leave little to make up for
    assert output_error(original, layer.decode(layer.encode()).detach(), H) < least * plain


def test_the_new_master_stands_for_the_codes_that_were_chosen(method: QuantMethod) -> None:
    layer = layer_of(method)
    layer.fit(torch.ones(layer.in_features))
    master, rounded = feedback.with_feedback(layer, moments())
    layer.adopt(master, rounded)
    torch.testing.assert_close(layer.decode(layer.encode()).detach(), rounded, atol=1e-6, rtol=1e-5)


def test_uncorrelated_inputs_give_the_nearest_codes(method: QuantMethod) -> None:
    layer = layer_of(method)
    nearest = layer.decode(layer.encode()).detach()
    _, rounded = feedback.with_feedback(layer, torch.eye(layer.in_features))
    torch.testing.assert_close(rounded, nearest, atol=1e-6, rtol=1e-5)


def test_scales_that_are_fitted_again_to_the_codes_bring_the_outputs_nearer() -> None:
    for method in (Fairy2(num_stages=1), Fairy2(), BitDistill(scale_mode="learned"), Anemll(rank=2)):
        layer, H = layer_of(method), moments()
        original = layer.weight.detach().clone()
        layer.fit(H.diagonal() / H.diagonal().mean())
        layer.adopt(*feedback.with_feedback(layer, H))
        before = feedback.output_error(layer, original, H)
        index = layer.encode().index
        assert feedback.refit(layer, original, H / H.diagonal().mean())
        rounded = layer.decode(dataclasses.replace(layer.encode(), index=index)).detach()
        assert output_error(original, rounded, H) < before


def test_a_method_without_trained_scales_is_not_fitted_again() -> None:
    layer = layer_of(Fairy2(scale_mode="als"))
    assert not feedback.refit(layer, layer.weight.detach().clone(), moments())


def test_tokens_in_another_order_count_alike() -> None:
    layer = layer_of(Fairy2())
    x = torch.randn(2, 6, 48)
    with Moments({"expert": layer}) as found:
        found.weigh(torch.rand(2, 6))
        layer(x.flatten(0, 1)[:7])
    some = layer.inputs(x).flatten(0, 1)[:7]
    H = found.means()["expert"]
    torch.testing.assert_close(H / H.trace(), some.T @ some / some.square().sum())


def test_layers_that_are_given_the_same_share_a_product_and_others_do_not() -> None:
    """Each has the moments that it has alone, also if its input was written to in between."""
    methods = {"q": Fairy2(), "k": Fairy2(), "int8": BitDistill(scale_mode="learned"), "later": Fairy2()}
    layers = {name: layer_of(method) for name, method in methods.items()}
    x, expected = torch.randn(2, 6, 48), {}
    with Moments(layers) as found:
        found.weigh(torch.ones(2, 6))
        for name, layer in layers.items():
            if name == "later":
                x.mul_(3)
            seen = layer.inputs(x).flatten(0, 1).double()
            expected[name] = (seen.T @ seen / 12).float()
            layer(x)
    means = found.means()
    assert torch.equal(means["q"], means["k"])
    for name, H in expected.items():
        torch.testing.assert_close(means[name], H)


@pytest.mark.parametrize("width", [1, 7, 33])
def test_odd_widths(width: int) -> None:
    layer = layer_of(Fairy2(), width, 5)
    feedback.calibrate(layer, moments(width) if width > 3 else torch.eye(width))
    assert layer.decode(layer.encode()).isfinite().all()


def test_inputs_that_are_always_zero(method: QuantMethod) -> None:
    layer = layer_of(method)
    H = moments()
    H[5] = H[:, 5] = 0
    feedback.calibrate(layer, H)
    assert layer.decode(layer.encode()).isfinite().all()
    unfitted = method.layer(nn.Linear(48, 40, bias=False), method, fits=False)
    feedback.calibrate(unfitted, torch.zeros_like(H))
    assert output_error(unfitted.weight, unfitted.decode(unfitted.encode()), torch.eye(48)) < 0.5 * (
        unfitted.weight.square().sum()
    )


def test_two_threads_choose_what_one_chooses(method: QuantMethod) -> None:
    codes = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        layer = layer_of(method, 144, 96)
        feedback.calibrate(layer, moments(144))
        codes.append(layer.encode().index)
    torch.set_num_threads(before)
    assert torch.equal(*codes)
