"""Products that torch.compile makes of a method's `decode`: the decoded weight's, without its memory."""

import copy
import gc
import logging
import math
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import run_and_get_code

from wrinklefree.core.method import QuantMethod
from wrinklefree.methods.anemll import Config as Anemll
from wrinklefree.methods.bitdistill import Config as BitDistill
from wrinklefree.methods.fairy2 import Config as Fairy2
from wrinklefree.methods.fairy2 import Dequantize
from wrinklefree.methods.fairy2.decode import to_real
from wrinklefree.methods.fairy2.entrywise import entries
from wrinklefree.methods.uniform import Config as Uniform
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.pack import pack_layer
from wrinklefree.packed.products import compiled
from wrinklefree.packed.products.coded import FEW

torch.set_num_threads(1)


def why_not(device: str) -> str | None:
    """What is missing to compile for a device."""
    if device == "cuda":
        return None if torch.cuda.is_available() else "no GPU"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error)
    return None


def on(device: str) -> object:
    return pytest.param(device, marks=pytest.mark.skipif(why_not(device) is not None, reason=str(why_not(device))))


DEVICES = [on("cpu"), on("cuda")]
METHODS: dict[str, QuantMethod] = {
    "ternary": BitDistill(norm_mode="none"),
    "fairy2 W1": Fairy2(num_stages=1),
    "fairy2 W2": Fairy2(num_stages=2),
    "fairy2 groups": Fairy2(num_stages=2, scale_granularity="group", group_size=8),
    "four ranks": Anemll(rank=4),
    "three bits": Uniform(bits=3, granularity="group", group_size=16),
}


def packed(method: QuantMethod, out: int = 40, width: int = 64, bias: bool = True) -> PackedLinear:
    torch.manual_seed(out)
    layer = method.layer(nn.Linear(width, out, bias=bias), method)
    return pack_layer(PackedLinear, method, layer.encode(), layer.bias)


def on_gpu(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` as on a GPU that no program of ours runs on."""
    if layer.product is None:
        layer.product = compiled.product(layer, layer.method.layer, layer.codes())
    return layer(x)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_a_product_is_the_decoded_weights_and_writes_no_weight(name: str, device: str) -> None:
    """Also of widths that a method pads."""
    out, width = (41, 64) if "group" in name or name == "three bits" else (41, 77)
    layer = packed(METHODS[name], out, width).to(device)
    weight, product = layer.method.decode(layer.codes()), compiled.product(layer, layer.method.layer, layer.codes())
    for shape in ((1, width), (1, 3, width)):
        x = torch.randn(shape, device=device)
        found, sources = run_and_get_code(product.few, layer.weight, x)
        torch.testing.assert_close(found, nn.functional.linear(x, weight), rtol=1e-4, atol=1e-5)
        sizes = re.findall(r"= empty_strided_\w+\(\(([^)]*)\)", "".join(sources))
        assert sizes
        assert max(math.prod(int(n) for n in size.split(",") if n.strip()) for size in sizes) <= 4 * out


@torch.no_grad()
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("granularity", [(1, 1), (6, 1), (6, 4)])
def test_fairys_entries_are_its_weight(num_stages: int, granularity: tuple[int, int]) -> None:
    index = torch.randint(0, 4, (2, num_stages, 6, 20), dtype=torch.uint8)
    scales = torch.rand(2, num_stages, 2, *granularity)
    assert torch.equal(entries(index, scales), to_real(Dequantize.apply(index, scales)))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch.compile without the compiler: everything up to it is the same, in a fraction of the time; counts graphs."""
    real, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(len(inputs))
        return graph.forward

    def compile_with(function: object, **options: object) -> object:
        return real(function, dynamic=options["dynamic"], fullgraph=options["fullgraph"], backend=backend)

    forget(monkeypatch)
    monkeypatch.setattr(torch, "compile", compile_with)
    return graphs


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled._function.cache_clear()
    compiled._warn_once.cache_clear()
    monkeypatch.setattr(compiled, "_refused", set())


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Of what was compiled here, in a process where other tests count tensors."""
    yield
    compiled._function.cache_clear()
    torch.compiler.reset()
    for _ in range(3):  # what finalizers let go of is found by the next round
        gc.collect()


@torch.no_grad()
def test_every_shape_has_a_function_that_all_its_layers_share(interpreted: list[int]) -> None:
    """And none of them reaches the number of times that torch compiles one function."""
    shapes = [(64, 64), (16, 64), (96, 64), (64, 96), (77, 64)]
    for _ in range(2):
        for method in (METHODS["ternary"], METHODS["four ranks"]):
            for out, width in shapes:
                layer = packed(method, out, width)
                product = compiled.product(layer, layer.method.layer, layer.codes())
                for tokens in range(1, FEW + 1):
                    found = product.few(layer.weight, torch.ones(tokens, width))
                    assert found is not None
                    assert found.shape == (tokens, out)
    assert len(interpreted) == 2 * len(shapes) * 4  # 1, 2, 4 and 8 tokens


@torch.no_grad()
def test_a_layer_keeps_no_weight_in_any_mode(interpreted: list[int]) -> None:
    layer = packed(METHODS["four ranks"])
    x = torch.randn(1, 2, 64)
    expected = nn.functional.linear(x, layer.method.decode(layer.codes()), layer.bias)
    torch.testing.assert_close(on_gpu(layer, x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(on_gpu(layer, x + 0), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(on_gpu(layer, x), expected.bfloat16())
    with torch.enable_grad():
        torch.testing.assert_close(on_gpu(layer, x), expected)
    assert layer.dense is None
    assert len(interpreted) == 1


@torch.no_grad()
def test_within_a_compiled_model_and_in_copies(interpreted: list[int]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = packed(METHODS["four ranks"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return on_gpu(self.layer, x + 1) * 2

    model, x = Model(), torch.randn(1, 64)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert twin.layer.product is None
    assert torch.equal(twin(x), expected)
    assert torch.equal(torch.compile(model, dynamic=False, fullgraph=False)(x), expected)
    model.layer.load_state_dict(model.layer.state_dict() | {"a": 2 * model.layer.a})
    torch.testing.assert_close(model(x) - 2 * model.layer.bias, 2 * (expected - 2 * model.layer.bias))


@torch.no_grad()
def test_where_nothing_compiles_the_decoded_weight_multiplies_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        raise RuntimeError("no compiler here")

    real, calls = torch.compile, []
    forget(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **_: calls.append(function) or real(function, backend=fails))
    x = torch.randn(1, 64)
    with caplog.at_level(logging.WARNING, logger="wrinklefree"):
        for layer in (packed(METHODS["four ranks"]), packed(METHODS["four ranks"]), packed(METHODS["three bits"])):
            expected = nn.functional.linear(x, layer.method.decode(layer.codes()), layer.bias)
            assert torch.equal(on_gpu(layer, x), expected)
            assert layer.dense is not None
    assert len(calls) == 2  # one for each method, none for the second layer
    (record,) = caplog.records
    assert "no compiler here" in record.getMessage()
    assert "\n" not in record.getMessage()


@torch.no_grad()
def test_a_function_that_torch_has_compiled_too_often_is_given_up(interpreted: list[int]) -> None:
    layer = packed(METHODS["four ranks"])
    with torch._dynamo.config.patch(recompile_limit=1):
        assert torch.equal(on_gpu(layer, torch.zeros(1, 64))[0], layer.bias)
        assert layer.dense is None
        assert torch.equal(on_gpu(layer, torch.zeros(2, 64))[1], layer.bias)
        assert layer.dense is not None


@torch.no_grad()
def test_autocast_does_not_reach_into_decode() -> None:
    layer = packed(METHODS["four ranks"])
    exact = layer.method.decode(layer.codes())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.effective_weight(torch.float32), exact)
