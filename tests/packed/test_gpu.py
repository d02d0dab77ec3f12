"""Products on a GPU: the programs against the decoded weight, on a GPU or, without one, in Triton's interpreter."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

from tiny import shipped_methods
from torch import nn

from wrinklefree.core.codes import pack
from wrinklefree.core.forms import Complex, Table
from wrinklefree.core.method import QuantMethod
from wrinklefree.methods.fairy2 import Dequantize
from wrinklefree.methods.fairy2.decode import to_real
from wrinklefree.packed.layer import PackedLinear, by_decoded_weight
from wrinklefree.packed.pack import pack_layer
from wrinklefree.packed.products import triton
from wrinklefree.packed.products.choose import on_gpu
from wrinklefree.packed.products.coded import FEW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def with_few_ranks(method: QuantMethod) -> QuantMethod:
    """As many as by default take the compiler's time."""
    ranks = [f.name for f in dataclasses.fields(method) if f.name.endswith("rank")]
    return dataclasses.replace(method, **dict.fromkeys(ranks, 4))


METHODS = [with_few_ranks(method) for method in shipped_methods()]


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "k", "rows", "groups"), [(1, 3, 1, 1), (37, 70, 37, 1), (5, 64, 5, 2), (18, 520, 1, 8)])
def test_a_table_is_the_decoded_weight(bits: int, n: int, k: int, rows: int, groups: int) -> None:
    torch.manual_seed(bits * n)
    index = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    table, scales, x = torch.randn(2**bits), torch.rand(rows, groups) + 0.1, torch.randn(3, k)
    weight = (table[index.long()].unflatten(1, (groups, -1)) * scales.unsqueeze(-1)).flatten(1)
    packed, *others = (t.to(DEVICE) for t in (pack(index, bits), table, scales, x))
    found = triton.table_product(packed, bits, *others)
    assert_near(found, x.double() @ weight.double().T)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize(("n", "m", "rows", "groups"), [(1, 1, 1, 1), (7, 10, 1, 1), (19, 64, 19, 2), (17, 300, 17, 1)])
def test_fairy_is_the_decoded_weight(stages: int, n: int, m: int, rows: int, groups: int) -> None:
    torch.manual_seed(stages * n)
    index = torch.randint(0, 4, (2, stages, n, m), dtype=torch.uint8)
    scales, x = torch.rand(2, stages, 2, rows, groups) + 0.1, torch.randn(2, 2 * m)
    weight = to_real(Dequantize.apply(index, scales))
    found = triton.complex_product(*(t.to(DEVICE) for t in (pack(index, 2), scales, x)))
    assert_near(found, x.double() @ weight.double().T)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_packed_layer_multiplies_few_tokens_by_its_codes_and_many_by_its_weight(method: QuantMethod) -> None:
    """And keeps no decoded weight, not of a method whose codes no program knows either, where that can be compiled."""
    torch.manual_seed(0)
    layer = pack_layer(PackedLinear, method, method.layer(nn.Linear(96, 40), method).encode(), torch.randn(40))
    layer(torch.randn(2, 96))  # by the kernels of the CPU, where there are any; then it moves, and has to begin anew
    layer.to(DEVICE)
    layer.product = on_gpu(layer)
    for shape in ((1, 1, 96), (FEW, 96), (3, FEW, 96)):
        x = torch.randn(shape, device=DEVICE)
        expected = nn.functional.linear(layer.inputs(x), method.layer.decode(layer.codes()), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.bias = None
    assert layer(torch.randn(1, 96, device=DEVICE, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (layer.dense is None) == (layer.product is not by_decoded_weight)  # kept only if nothing else multiplies
    form = method.layer.form(layer.codes())
    known = isinstance(form, Complex) or (isinstance(form, Table) and form.rank == 1)
    assert isinstance(layer.product, triton.TritonProduct) == known
