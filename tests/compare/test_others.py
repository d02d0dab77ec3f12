"""References by the tools of others: what they make is near the weights, and they are named if they are missing."""

import importlib.util
from functools import partial

import pytest
import torch
from tiny import VOCAB, llama, tokenizer

from wrinklefree.compare import references
from wrinklefree.compare.others import Asked, Maker, with_llama_cpp, with_torchao
from wrinklefree.core import products
from wrinklefree.core.errors import UserError

torch.set_num_threads(1)


def asked() -> Asked:
    model = llama()
    rows = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    return Asked(model, products.open_products(model, references.EXCLUDED), tokenizer(), lambda: rows)


def check(make: Maker, bits: float, most: float) -> None:
    given = asked()
    made = dict(make(given))
    assert made.keys() == given.layers.keys()
    for name, rounded in made.items():
        weight = given.layers[name].weight
        assert 0 < (rounded.weight - weight).norm() / weight.norm() < most, name
        assert rounded.bits == pytest.approx(bits * weight.numel(), rel=0.2)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.15)])
def test_torchao_rounds_to_integers(bits: int, most: float) -> None:
    pytest.importorskip("torchao")
    check(partial(with_torchao.integers, bits), bits + 0.3, most)


@pytest.mark.llamacpp
def test_llama_cpp_gives_back_each_layer_in_our_order() -> None:
    pytest.importorskip("llama_cpp", reason="make test-gguf builds it")
    check(partial(with_llama_cpp.kind, "Q4_0"), 4.5, 0.15)


def test_a_tool_that_is_not_installed_is_left_out_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert references.installed() == ["int8", "int4", "rtn_2bit", "hqq_2bit"]
    references.check(["int8"])
    with pytest.raises(UserError, match=r"--references llama_q2_k: needs the package llama-cpp"):
        references.check(["llama_q2_k"])
