"""The native kernels: every form against float64, the same bits for any threads, batch and instruction set."""

import copy
import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches, ids, llama, qwen, shipped_methods, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from wrinklefree.core import fused, library
from wrinklefree.core.codes import Codes
from wrinklefree.core.forms import Complex, Form, Integers, Table, low_rank
from wrinklefree.core.method import quant_layers
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.methods.bitdistill import Config as BitDistill
from wrinklefree.methods.fairy2 import Fairy2Linear
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.pack import pack_layer, packed_layers
from wrinklefree.packed.products import native
from wrinklefree.packed.products.choose import exactly, method_layer, set_exact
from wrinklefree.packed.products.native import NativeProduct, matrix

torch.set_num_threads(1)

REASON = library.available()
pytestmark = [pytest.mark.numeric, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

ISAS = ["avx512-vnni", "avx-vnni", "avx2", "neon-dotprod", "generic"]
LAYERS = 60  # random ones for each test


class Layers:
    """Random layers of every form, with the weight [n, k] in float64 that each stands for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def below(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator).to(torch.uint8)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def positive(self, *shape: int) -> Tensor:
        """Over some decades, sometimes tiny or huge throughout."""
        return self.normal(*shape).exp() * float(self.pick(1, 1, 1, 1000)) / self.pick(1, 1, 1, 1000)

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """(scales of rows, groups of columns)."""
        groups = self.pick(1, *[g for g in (2, 3, 5, 8) if columns % g == 0])
        return self.pick(1, rows), groups

    def factor(self, length: int) -> Tensor | None:
        return self.positive(length) if self.pick(0, 1) else None

    def table(self) -> tuple[Form, Tensor]:
        n, k = self.pick(1, 7, 8, 33, 130), self.pick(1, 15, 16, 64, 65, 192, 300)
        bits = self.pick(1, 2, 3, 4)
        tables = {
            "free": self.normal(2**bits),
            "even": torch.linspace(-1, 1, 2**bits).half().float(),
            "integers": torch.arange(2**bits) - 2.0 ** (bits - 1),
            "ternary": torch.tensor([-1.0, 0.0, 1.0, 0.0] * 4)[: 2**bits],
        }
        table = tables[list(tables)[self.pick(0, 1, 2, 3)]]
        index = self.below(self.pick(2**bits, 2**bits, 1), n, k)
        rows, groups = self.grid(n, k)
        rank = self.pick(1, 1, 2, 3, 5, 8)
        row, col = self.factor(n), self.factor(k)
        if rank > 1:
            row, col = self.positive(rank, n), self.positive(rank, k)
        form = Table(index, table, self.positive(rows, groups), row, col)
        scales = form.scales.double().repeat_interleave(k // groups, 1)
        return form, table.double()[index.long()] * scales

    def complex(self) -> tuple[Form, Tensor]:
        n, k, stages = self.pick(1, 4, 8, 17, 64), self.pick(1, 15, 16, 33, 96, 150), self.pick(1, 2, 3, 4)
        rows, groups = self.grid(n, k)
        shape = (2, stages, 2, rows, groups)
        on_grid = self.below(30, *shape).float() + 1
        scales = on_grid if self.pick(0, 1) else self.positive(*shape)
        index = self.below(4, 2, stages, n, k)
        weight = Fairy2Linear.decode(Codes(index, 2, {"scales": scales}, (2 * n, 2 * k))).double()
        return Complex(index, scales, self.factor(2 * n), self.factor(2 * k)), weight

    def integers(self) -> tuple[Form, Tensor]:
        n, k = self.pick(1, 8, 33, 130), self.pick(1, 16, 65, 300)
        weight = (self.below(256, n, k).int() - 128).to(torch.int8)
        return Integers(weight, self.positive(n)), weight.double()

    def any(self) -> tuple[Form, Tensor]:
        return [self.table, self.complex, self.integers][self.pick(0, 1, 2)]()

    def inputs(self, k: int, batch: int) -> Tensor:
        return self.normal(batch, k) * self.positive(batch, 1)


def cols_of(form: Form) -> Tensor:
    """[ranks, k or 1]"""
    col = None if isinstance(form, Integers) else form.col
    return torch.ones(1, 1) if col is None else col.view(-1, col.shape[-1])


def rows_of(form: Form) -> Tensor:
    """[ranks, n or 1]"""
    return torch.ones(1, 1) if form.row is None else form.row.view(-1, form.row.shape[-1])


def rounded(x: Tensor) -> Tensor:
    """int8 per token as in training, in float64."""
    scale = 127 / x.abs().amax(-1, keepdim=True)
    return (x * scale).round().double() / scale.double()


def reach(form: Form) -> Tensor:
    """The largest weight that codes could stand for, of each row or of all."""
    if isinstance(form, Table):
        return form.table.abs().max() * form.scales.abs().amax(1).double()
    if isinstance(form, Complex):
        return form.scales.abs().sum((0, 1, 2)).amax(1).expand(form.index.shape[2]).repeat(2).double()
    return torch.full((1,), 128.0).double()


def error(form: Form, weight: Tensor, x: Tensor, y: Tensor, rounding: Callable[[Tensor], Tensor]) -> float:
    """The largest difference from float64, relative to the largest weight there could be times the token's sum."""
    expected, size = torch.zeros(()), torch.full((), 1e-30)
    for row, col in zip(rows_of(form).double(), cols_of(form), strict=True):
        inputs = rounding(x * col)
        expected = expected + inputs @ weight.T * row
        size = size + inputs.abs().sum(1, keepdim=True) * reach(form) * row.abs()
    return ((y.double() - expected).abs() / size).max().item()


# What the kernels may lose beside fp32's own rounding: entries of free tables have 15 bits of the largest, uneven
# complex scales 13 bits of their sum, tables of fp16 numbers count as even.
LOSS = {"table2": 1e-4, "table4": 1e-4, "affine2": 3e-4, "complex-wide": 2e-3}


@pytest.mark.parametrize("seed", range(8))
def test_products_equal_those_in_float64(seed: int) -> None:
    made = Layers(seed)
    for _ in range(LAYERS):
        form, weight = made.any()
        layer = matrix(form)
        x = made.inputs(layer.shape[1], made.pick(1, 2, 3, 8, 13))
        (exact,) = native.matmul([layer], x, native.EXACT)
        assert error(form, weight, x, exact, lambda t: t.double()) < 1e-6, (form, layer.kernel)
        (fast,) = native.matmul([layer], x)
        # One activation on the edge between two integers may fall to either side: a step of 1/127 of the largest.
        allowed = LOSS.get(layer.kernel, 1e-6)
        wrong = error(form, weight, x, fast, rounded)
        assert wrong < allowed, (form, layer.kernel, wrong)


@pytest.mark.parametrize("mode", [native.INT8, native.EXACT])
def test_the_same_bits_for_any_threads_and_batch(mode: int) -> None:
    made, pools = Layers(9), [library.Pool(threads) for threads in (1, 2, 3)]
    pools += [] if library.torch_team() is None else [library.Pool(threads, library.torch_team()) for threads in (2, 3)]
    for _ in range(LAYERS):
        layer = matrix(made.any()[0])
        x = made.inputs(layer.shape[1], made.pick(2, 5, 9, 30))
        alone = torch.cat([native.matmul([layer], token, mode, pools[0])[0] for token in x.split(1)])
        assert all(torch.equal(native.matmul([layer], x, mode, pool)[0], alone) for pool in pools)


def test_matrices_of_one_call_do_not_disturb_each_other() -> None:
    made = Layers(10)
    x = made.inputs(64, 3)
    forms = [
        Table(made.below(3, n, 64), torch.tensor([-1.0, 0.0, 1.0, 0.0]), made.positive(1, groups), None, col)
        for n, groups, col in [(5, 1, None), (40, 4, None), (9, 1, made.positive(64)), (8, 2, None)]
    ]
    layers = [
        *map(matrix, forms),
        native.Matrix.dense(made.normal(6, 64)),
        matrix(Integers(made.below(9, 3, 64), torch.ones(3))),
    ]
    together = native.matmul(layers, x)
    assert all(torch.equal(y, native.matmul([layer], x)[0]) for layer, y in zip(layers, together, strict=True))


def _product(layer: native.Matrix, x: Tensor, queue: Any) -> None:
    torch.set_num_threads(2)  # a child of a fork has one
    queue.put(native.matmul([layer], x)[0].numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_multiplies_though_the_threads_of_its_parent_are_gone() -> None:
    made = Layers(12)
    layer = matrix(Table(made.below(3, 1024, 64), torch.tensor([-1.0, 0.0, 1.0, 0.0]), made.positive(1, 1)))
    x = made.inputs(64, 3)
    (expected,) = native.matmul([layer], x, threads=library.Pool(2, library.torch_team()))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_product, args=(layer, x, queue))
    child.start()
    try:
        assert torch.equal(torch.from_numpy(queue.get(timeout=60)), expected)
    finally:
        child.kill()
        child.join()


@pytest.fixture
def anew() -> Iterator[Callable[[], None]]:
    """What forgets the library, so that the next use loads it again."""

    def forget() -> None:
        for cached in (library.load, library.available, library._pool_of):
            cached.cache_clear()

    yield forget
    forget()


def training_loops() -> Iterator[Tensor]:
    """Results of every loop in `native/train.h`, for widths that are no multiple of a vector."""
    torch.manual_seed(0)
    weight, grad, table = torch.randn(44, 54), torch.randn(44, 54), torch.tensor([-1.0, -0.3, 0.3, 1.0])
    for stages, rows, groups in ((1, 1, 1), (2, 22, 3), (4, 1, 1)):
        shapes = [(2, stages, 2, rows, groups), (22,), (27,)]
        made = [torch.rand(shape).add(0.1).requires_grad_() for shape in shapes]
        scales = fused.ComplexScales(*made)
        index = fused.complex_codes(weight, scales)
        value = fused.complex_weight(index, scales)
        yield from (index, value.detach(), *torch.autograd.grad(value, made, grad))
    scale = torch.randn(44, 54)
    index = fused.table_codes(weight, scale, table)
    yield from (index, fused.table_weight(index, scale, table), *fused.table_gradients(grad, weight, scale, table))
    yield fused.rounded(weight)
    yield fused.rounded(weight.bfloat16()).float()


def test_the_same_bits_on_every_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: Callable[[], None]
) -> None:
    """In copies of the library: each of them chooses once, when it is loaded."""
    usual, built, there = library.isa(), library.path(), {}
    for isa in ISAS:
        (tmp_path / isa).mkdir()
        monkeypatch.setattr(library, "FOLDER", Path(shutil.copy(built, tmp_path / isa)).parent)
        monkeypatch.setenv("WF_ISA", isa)
        anew()
        reason = library.available()
        if reason is not None:
            assert "not on this machine; it has" in reason
            continue
        assert library.isa() == isa
        made, digest = Layers(11), hashlib.sha256()
        for _ in range(40):
            layer = matrix(made.any()[0])
            x = made.inputs(layer.shape[1], made.pick(1, 2, 7, 9))
            for mode in (native.INT8, native.EXACT):
                digest.update(native.matmul([layer], x, mode)[0].numpy().tobytes())
        for result in training_loops():
            digest.update(result.numpy().tobytes())
        there[isa] = digest.hexdigest()
    assert there.keys() >= {"generic", usual}
    assert len(set(there.values())) == 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_long_rows_of_the_largest_codes_and_inputs_do_not_overflow(sign: float) -> None:
    """Kernels add up in bytes and int16 for as long as these can hold the sums."""
    k, n = 2 * 1129, 2 * 17
    x = torch.full((1, k), sign)
    ternary = Table(torch.full((n, k), 2, dtype=torch.uint8), torch.tensor([-1.0, 0.0, 1.0, 0.0]), torch.ones(1, 1))
    forms: list[Form] = [ternary]
    for code in range(4):
        for stages in (1, 2):
            index = torch.full((2, stages, n // 2, k // 2), code, dtype=torch.uint8)
            forms.append(Complex(index, torch.full((2, stages, 2, 1, 1), 3.0)))
    for form in forms:
        layer = matrix(form)
        weight = torch.stack([layer.row(i) for i in range(n)])
        torch.testing.assert_close(native.matmul([layer], x, native.INT8)[0], x @ weight.T, rtol=1e-5, atol=1e-3)


def test_rows_of_the_weight_are_read_back() -> None:
    made = Layers(12)
    for _ in range(LAYERS):
        form, weight = made.any()
        layer, n = matrix(form), made.pick(0, len(weight) - 1)
        rows = rows_of(form).double().expand(-1, len(weight))
        factors = (rows[:, n : n + 1] * cols_of(form).double()).sum(0)
        torch.testing.assert_close(layer.row(n).double(), weight[n] * factors, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(("even", "most"), [(True, 8), (False, 4)])
@pytest.mark.parametrize("rank", [1, 2, 4, 5, 8, 9])
def test_few_ranks_of_scales_stay_factors_and_many_become_bytes(rank: int, even: bool, most: int) -> None:
    made = Layers(20 + rank)
    n, k = 128, 192
    table = torch.linspace(-1, 1, 4).half().float() if even else made.normal(4)
    index = made.below(4, n, k)
    a, b = made.normal(n, rank).abs(), made.normal(rank, k).abs()
    form = low_rank(index, table, a, b)
    assert isinstance(form, Integers) == (rank > most)
    layer, x = matrix(form), made.inputs(k, 3)
    weight = table[index.long()] * (a @ b)
    found = native.matmul([layer], x)[0]
    assert (found - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()
    assert layer.nbytes < 1.1 * n * k * (1 if rank > most else 0.25) + 4 * rank * (n + k) + 4096


def test_dense_layers_are_bf16_or_exact() -> None:
    made = Layers(13)
    weight, bias, x = made.normal(37, 91), made.normal(37), made.inputs(91, 3)
    for exact, entries in ((True, weight), (False, weight.bfloat16().float())):
        layer = native.Matrix.dense(weight, bias, exact)
        expected = x.double() @ entries.double().T + bias
        torch.testing.assert_close(native.matmul([layer], x)[0].double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(layer.row(5), entries[5])


def test_activations_without_a_number_give_none_and_zeros_give_the_bias() -> None:
    made = Layers(14)
    layer = native.Matrix.table(
        made.below(3, 20, 64), torch.tensor([-1.0, 0, 1, 0]), torch.ones(1, 1), bias=torch.ones(20)
    )
    x = torch.zeros(4, 64)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = native.matmul([layer], x)[0]
    assert y[1:3].isnan().all()
    assert (y[[0, 3]] == 1).all()


def test_mistakes_are_named() -> None:
    codes, table, scales = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4), torch.ones(1, 1)
    cases = [
        (lambda: native.Matrix.table(codes + 4, table, scales), "codes: an entry is too large"),
        (lambda: native.Matrix.table(codes, table, torch.ones(1, 3)), "num_groups: must divide"),
        (lambda: native.Matrix.table(codes, table, torch.ones(3, 1)), "num_rows: must be 1"),
        (lambda: native.Matrix.table(codes, table[:3], scales), "not a power of 2"),
        (lambda: native.Matrix.table(codes, table, scales * torch.nan), "scales: not finite"),
        (lambda: native.Matrix.table(codes, table, scales, row=torch.ones(3)), "row: "),
        (lambda: native.Matrix.table(codes[:0], table, scales), "n: must be 1 to"),
        (
            lambda: native.Matrix.table(codes, table, scales, row=torch.ones(9, 4), col=torch.ones(9, 8)),
            "rank: must be",
        ),
        (lambda: native.Matrix.table(codes, table, scales, col=torch.ones(2, 8)), "row, col: must be given"),
        (lambda: native.Matrix.dense(torch.ones(1, 2**17)), "k: must be 1 to 65536"),
        (lambda: native.Matrix.dense(torch.ones(2, 2)).row(2), "row: not of this matrix"),
        (lambda: library.Pool(0), "threads: must be 1"),
    ]
    for make, text in cases:
        with pytest.raises(ValueError, match=text):
            make()
    layer = native.Matrix.table(codes, table, scales)
    for width in (7, 9):
        with pytest.raises(ValueError, match="does not fit"):
            native.matmul([layer], torch.ones(1, width))
    assert native.matmul([layer], torch.ones(0, 3, 8))[0].shape == (0, 3, 4)


# ---- In the model


@pytest.fixture(scope="module", params=[m.name for m in shipped_methods()])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = next(m for m in shipped_methods() if m.name == request.param)
    path = tmp_path_factory.mktemp(request.param) / "packed"
    export_packed(method.prepare(qwen()), tokenizer(), method, path, card="", force=False, batches=batches())
    return path


def read(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def kernels_in(model: PreTrainedModel) -> set[str]:
    products = (layer.product for layer in packed_layers(model).values())
    return {product.matrix.kernel for product in products if isinstance(product, NativeProduct)}


def have_a_form(model: PreTrainedModel) -> bool:
    """Whether kernels know the codes: a form is optional, and a method without one is served by its decoded weight."""
    (known,) = {method_layer(layer).form(layer.codes()) is not None for layer in packed_layers(model).values()}
    return known


@torch.no_grad()
def test_kernels_serve_every_method_with_a_form_and_stay_near_the_exact_model(folder: Path) -> None:
    packed = read(folder, dtype=torch.float32)
    fast, known = packed(ids()).logits, have_a_form(packed)
    assert all(isinstance(layer.product, NativeProduct) == known for layer in packed_layers(packed).values())
    assert all((layer.dense is None) == known for layer in packed_layers(packed).values())
    with exactly(packed):
        exact = packed(ids()).logits
    off = (fast - exact).norm() / exact.norm()
    assert 0 < off < (0.02 if known else 1e-5)  # without kernels, fused norms still sum in another order
    assert torch.equal(packed(ids()).logits, fast)


@torch.no_grad()
def test_int8_trained_layers_agree_with_the_trained_model_to_fp32_rounding() -> None:
    trained = BitDistill(name="bitdistill", norm_mode="none").prepare(llama())
    for layer in quant_layers(trained).values():
        packed = pack_layer(PackedLinear, layer.config, layer.encode(), layer.bias)
        x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-6)
        assert isinstance(packed.product, NativeProduct)


def test_generate_with_prompts_of_different_lengths(folder: Path) -> None:
    packed = read(folder, dtype=torch.float32)  # in bf16 the likeliest two tokens are often equally likely
    prompt = ids(2, 6)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    both = packed.generate(prompt, attention_mask=mask, **options)
    assert both.shape == (2, 11)
    assert torch.equal(packed.generate(prompt[:1], **options), both[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_in_half_precision_out(folder: Path, dtype: torch.dtype) -> None:
    packed = read(folder)
    layer = next(iter(packed_layers(packed).values()))
    if not have_a_form(packed):
        layer.bias = None  # torch's own product takes none of another dtype
    x = torch.ones(2, layer.in_features)
    assert layer(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(layer(x.to(dtype)).float(), layer(x), rtol=0.02, atol=0.02)


def test_gradients_and_copies_and_new_codes(folder: Path) -> None:
    packed = read(folder, dtype=torch.float32)
    layer = next(iter(packed_layers(packed).values()))
    x = torch.randn(2, layer.in_features)
    with torch.no_grad():
        y = layer(x)
        twin = copy.deepcopy(layer)
        assert twin.product is None
        assert torch.equal(twin(x), y)
        assert twin.product is not layer.product or not have_a_form(packed)
        layer.load_state_dict(layer.state_dict())
        assert layer.product is None
        assert torch.equal(layer(x), y)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_a_compiled_layer_gives_the_same(folder: Path) -> None:
    layer = next(iter(packed_layers(read(folder, dtype=torch.float32)).values()))
    x = torch.randn(2, layer.in_features)
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


@torch.no_grad()
def test_exactness_is_a_switch(folder: Path) -> None:
    packed = read(folder, dtype=torch.float32)
    set_exact(packed)
    packed(ids())
    assert kernels_in(packed) == set()
    set_exact(packed, False)
    packed(ids())
    assert (len(kernels_in(packed)) >= 1) == have_a_form(packed)


def test_without_a_library_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    reason = library.available.__wrapped__
    library.load.cache_clear()
    try:
        assert "not built" in str(reason())
        (tmp_path / library.path().name).write_bytes(b"not a library")
        assert reason() is not None
    finally:
        library.load.cache_clear()
