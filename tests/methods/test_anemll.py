"""ANEMLL tables: the fit falls at every step, gradients are true, views convert exactly, nothing is lost in fp16."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import batches, ids, llama
from torch import Tensor, nn

from wrinklefree.core.method import quant_layers
from wrinklefree.methods.anemll import Config, LutLinear, batched, factored, lowrank
from wrinklefree.methods.anemll.lowrank import Factors

torch.set_num_threads(1)
pytestmark = pytest.mark.numeric


def weight(out: int = 96, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator) * torch.rand(out, 1, generator=generator)


def layer(out: int = 96, width: int = 64, bias: bool = True, **settings: object) -> LutLinear:
    linear = nn.Linear(width, out, bias=bias)
    linear.weight.data.copy_(weight(out, width))
    config = Config(**{"rank": 8, **settings})
    made = LutLinear(linear, config)
    made.initialize(None)
    made.choose_trained(True)
    return made


def effective(module: LutLinear) -> Tensor:
    return module.decode(module.encode()).detach()


# --- the fit


@pytest.mark.parametrize("group_size", [8, 16, 24])
def test_the_svd_of_groups_is_that_of_the_expanded_matrix(group_size: int) -> None:
    w = weight()
    maxima = nn.functional.pad(w, (0, -64 % group_size)).unflatten(1, (-1, group_size)).abs().amax(-1)
    expanded = maxima.repeat_interleave(group_size, dim=1)
    u, s, v = torch.linalg.svd(expanded, full_matrices=False)
    ours = lowrank.group_svd(w, group_size, 5)
    known = min(5, maxima.shape[1])
    assert torch.allclose(ours[1][:known], s[:known], rtol=1e-4)
    product = (u[:, :known] * s[:known]) @ v[:known]
    assert torch.allclose((ours[0] * ours[1]) @ ours[2], product[:, :64], atol=1e-4)


@pytest.mark.parametrize("learn_table", [True, False])
def test_the_error_falls_with_every_round(learn_table: bool) -> None:
    w, importance = weight(), torch.rand(64, dtype=torch.float64) + 0.1
    factors = lowrank.start(w, 2, 6, 16)
    errors = [lowrank.error(w, factors, importance).item()]
    for _ in range(8):
        factors = lowrank.step(w, factors, importance, learn_table)
        errors.append(lowrank.error(w, factors, importance).item())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < 0.6 * errors[0]


def test_rows_are_solved_like_a_plain_least_squares_problem() -> None:
    w, q, b = weight(5, 40), torch.randn(5, 40), torch.randn(3, 40)
    importance = torch.rand(40, dtype=torch.float64) + 0.1
    ours = lowrank.solve_rows(w, q, b, importance)
    for o in range(5):
        root = importance.sqrt().float()
        expected = torch.linalg.lstsq((q[o] * b * root).T, (w[o] * root).unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(ours[o], expected, atol=1e-3)


def test_columns_are_solved_for_the_rows_and_entries_of_their_round() -> None:
    """The gradient towards B is nothing there, with the importance of each column."""
    w, importance = weight(), torch.rand(64, dtype=torch.float64) + 0.1
    before = lowrank.start(w, 2, 6, 16)
    after = lowrank.step(w, before, importance, learn_table=False)
    q = lowrank.look_up(before.table, lowrank.nearest(w / lowrank.guarded(after.a @ before.b), before.table))
    norms = []
    for b in (before.b, after.b):
        b = b.double().requires_grad_()
        ((w - q * (after.a.double() @ b)).square() * importance).sum().backward()
        norms.append(b.grad.norm())
    assert norms[1] < 1e-3 * norms[0]


def test_the_table_is_solved_like_a_plain_least_squares_problem() -> None:
    """One unknown for each entry and its mirror image; what normalizes the table goes into A."""
    w, importance = weight(), torch.rand(64, dtype=torch.float64) ** 4 + 0.01
    factors = lowrank.start(w, 3, 6, 16)
    table, a = lowrank._refit_table(w, factors, importance)
    scales, root = factors.scales().double(), importance.sqrt()
    index = lowrank.nearest(w / lowrank.guarded(factors.scales()), factors.table).int()
    signs = [(index == 4 + k).double() - (index == 3 - k).double() for k in range(4)]
    columns = torch.stack([(sign * scales * root).flatten() for sign in signs], 1)
    expected = torch.linalg.lstsq(columns, (w.double() * root).flatten().unsqueeze(1)).solution.squeeze(1)
    largest = (a / factors.a)[factors.a.abs() > 1e-3].double().mean()
    assert torch.allclose(table[4:].double() * largest, expected, rtol=2e-3)


def test_ranks_beyond_the_number_of_groups_are_used() -> None:
    few, many = (layer(rank=rank, group_size=32) for rank in (2, 16))
    assert (many.scale_A.norm(dim=0) > 0).all()
    assert (effective(many) - weight()).norm() < 0.8 * (effective(few) - weight()).norm()


def test_least_squares_are_nearer_than_the_start() -> None:
    errors = [(effective(layer(init=init)) - weight()).norm().item() for init in ("svd", "als")]
    assert errors[1] < 0.75 * errors[0]


def test_the_best_share_of_the_maxima_is_a_better_start() -> None:
    """Two bits spread to the maximum waste their outer entries: 0.72 of it is nearer."""
    begun = [layer(init="svd"), layer(init="als", als_iterations=0)]
    errors = [(effective(made) - weight()).norm().item() for made in begun]
    assert errors[1] < 0.85 * errors[0]


class Embedded(nn.Module):
    """Four words as vectors of width 4, into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.tensor([[1.0, 2.0, 0.0, 300.0], [1.0, -2.0, 0.0, 0.0], [3.0, 2.0, 0.0, 0.0]]))
        self.linear = nn.Linear(4, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(self.words[input_ids])


def test_importance_is_the_mean_square_of_each_input() -> None:
    model = Embedded()
    seen = [{"input_ids": torch.tensor([[0, 1]])}, {"input_ids": torch.tensor([[2, 2]])}]
    found = lowrank.input_squares(model, {"linear": model.linear}, seen)["linear"]
    squares = torch.tensor([20 / 4, 4.0, 0.0, 90_000 / 4])
    assert torch.allclose(found, (squares / squares.mean()).clamp(0.01, 100))
    assert found[2] == 0.01  # no channel is ignored
    model.words.data[0, 3] = 3
    found = lowrank.input_squares(model, {"linear": model.linear}, seen)["linear"]
    squares[3] = 9 / 4
    assert torch.allclose(found, (squares / squares.mean()).clamp(0.01, 100))


def test_a_model_is_fitted_by_the_inputs_that_it_sees() -> None:
    """Weighted by the squares of its inputs, the error of the layers is smaller than of a fit that knows none."""
    original = llama()
    sites = {fqn: module for fqn, module in original.named_modules() if fqn.endswith("_proj")}
    with torch.no_grad():
        for fqn, norm in original.named_modules():
            if fqn.endswith("layernorm"):
                norm.weight[::4] = 6  # loud channels
    squares = lowrank.input_squares(original, sites, batches())
    weights = {fqn: module.weight.detach().clone() for fqn, module in sites.items()}
    errors = []
    for importance in (True, False):
        model = Config(rank=4, attn_rank=4, importance=importance).prepare(copy.deepcopy(original), batches())
        found = quant_layers(model)
        errors.append(sum(((effective(found[f]) - weights[f]).square() * squares[f]).sum().item() for f in weights))
    assert errors[0] < 0.9 * errors[1]


def test_important_inputs_are_fitted_better() -> None:
    importance = torch.ones(64)
    importance[:8] = 100
    plain, weighted = layer(rank=2), layer(rank=2)
    weighted.initialize(importance)
    errors = [(effective(m) - weight())[:, :8].norm().item() for m in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_begin_symmetric_and_stay_sorted_and_in_fp16(bits: int) -> None:
    made = layer(bits=bits)
    assert torch.equal(made.lut, -made.lut.flip(0))
    with torch.no_grad():
        made.lut += 0.1 * torch.randn(made.lut.shape, generator=torch.Generator().manual_seed(0))
    table = made.encode().tensors["lut"]
    assert len(table) == 2**bits
    assert (table.diff() > 0).all()
    assert torch.equal(table, table.half().float())


# --- gradients


def objective(made: LutLinear, target: Tensor) -> Tensor:
    made.effective.clear()
    return (made.quantized_weight() * target).sum()


@pytest.mark.parametrize("view", ["v1", "v2"])
def test_gradients_of_scales_are_those_of_finite_differences(view: str) -> None:
    """Where codes stay as they are; steps are larger than the rounding of scales to fp16.

    Half along the gradient: across it alone a gradient that is half as large again would differ by less than rounding.
    """
    generator = torch.Generator().manual_seed(1)
    made = layer(view=view, train="scales", learn_table=False)
    target = torch.randn(96, 64, generator=generator)
    objective(made, target).backward()
    before = made.encode().index
    for parameter in [p for p in made.parameters() if p.grad is not None and p is not made.bias]:
        random = torch.randn(parameter.shape, generator=generator)
        direction = parameter.grad / parameter.grad.norm() + random / random.norm()
        direction = direction * parameter.detach().norm() / direction.norm()
        expected = (parameter.grad * direction).sum().item()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 0.02)
                codes = made.encode()
                moved = replace(codes, index=before)
                values.append((made.decode(moved) * target).sum().item())
                parameter.sub_(direction, alpha=sign * 0.02)
        assert (values[0] - values[1]) / 0.04 == pytest.approx(expected, rel=0.02)


def test_the_length_of_a_direction_gets_no_gradient() -> None:
    """A v2 layer normalizes them: magnitudes alone say how long they are."""
    made = layer(view="v2", train="scales", learn_table=False)
    objective(made, weight()).backward()
    for factor, along in ((made.scale_A, 0), (made.scale_B, 1)):
        lengthening = (factor.grad * factor.detach()).sum(along)
        assert lengthening.norm() < 1e-4 * factor.grad.norm()


def test_joint_gradients_are_those_of_learned_step_sizes() -> None:
    """d/dW = m and d/dS = Q - n m, with n = W / S and m = 1 inside of the table."""
    made, upstream = layer(train="both", learn_table=False), torch.randn(96, 64)
    objective(made, upstream).backward()
    codes = made.encode()
    a, b = codes.tensors["a"].detach(), codes.tensors["b"].detach()
    ratios = made.weight.detach() / (a @ b)
    inside = (ratios.abs() <= codes.tensors["lut"][-1]).float()
    assert 0 < (inside == 0).float().mean() < 0.3  # both cases of m are there
    towards_scales = upstream * (lowrank.look_up(codes.tensors["lut"], codes.index) - ratios * inside).detach()
    assert torch.allclose(made.weight.grad, upstream * inside, atol=1e-5)
    assert torch.allclose(made.scale_A.grad, towards_scales @ b.T, rtol=1e-3, atol=1e-3)
    assert torch.allclose(made.scale_B.grad, a.T @ towards_scales, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"train": "both"}, {"weight", "lut", "scale_A", "scale_B"}),
        ({"train": "weights"}, {"weight"}),
        ({"train": "scales", "learn_table": False}, {"scale_A", "scale_B"}),
        ({"view": "v2"}, {"lut", "scale_A", "scale_B", "rank_magnitude"}),
        ({"view": "v2", "g_only": True}, {"rank_magnitude"}),
    ],
)
def test_what_trains_gets_a_gradient_and_moves_the_output(settings: dict[str, object], trained: set[str]) -> None:
    made = layer(bias=False, **settings)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == trained
    x = torch.randn(5, 64)
    before = made(x)
    (before * torch.randn(5, 96)).sum().backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        if name in trained:
            assert parameter.grad.abs().sum() > 0
            with torch.no_grad():
                parameter.sub_(0.3 * parameter.grad / parameter.grad.abs().max())
    assert not torch.allclose(made(x), before)


def test_halves_of_the_model_train_alone() -> None:
    for settings, part in (({"mlp_only": True}, "mlp"), ({"attn_only": True}, "self_attn")):
        model = Config(rank=4, attn_rank=4, **settings).prepare(llama(), batches())
        model(ids()).logits.square().mean().backward()
        for fqn, found in quant_layers(model).items():
            assert (found.weight.grad is not None) == (part in fqn)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mlp_only": True, "attn_only": True},
        {"view": "v2", "train": "weights"},
        {"forward": "factored"},
        {"ste_fp16": True, "train": "weights"},
    ],
)
def test_settings_that_leave_nothing_to_train_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needs|exclude|alone"):
        Config(**wrong)


# --- three ways to compute one thing


@pytest.mark.parametrize("view", ["v1", "v2"])
def test_rank_by_rank_all_at_once_and_by_the_weight_are_the_same(view: str) -> None:
    made, x, target = layer(view=view), torch.randn(7, 64), torch.randn(7, 96)
    results, gradients = [], []
    for forward in (made, lambda z: factored(made, z), lambda z: batched(made, z)):
        made.zero_grad()
        y = forward(x)
        (y * target).sum().backward()
        results.append(y.detach())
        gradients.append(made.scale_A.grad.clone() if view == "v2" else made.lut.grad.clone())
    for y, gradient in zip(results[1:], gradients[1:], strict=True):
        assert torch.allclose(y, results[0], rtol=1e-4, atol=1e-4)
        assert (gradient - gradients[0]).norm() < 1e-3 * gradients[0].norm()


def test_training_in_fp16_steps_is_what_half_precision_computes() -> None:
    made, x = layer(view="v2"), torch.randn(7, 64)
    exact, rounded = factored(made, x), factored(made, x, fp16=True)
    codes = made.encode()
    q, a, b = (
        t.detach().half()
        for t in (lowrank.look_up(codes.tensors["lut"], codes.index), codes.tensors["a"], codes.tensors["b"])
    )
    y = torch.zeros((), dtype=torch.float16)
    for k in range(len(b)):
        u = x.half() * b[k]
        y = y + a[:, k] * nn.functional.linear(u.float(), q.float()).half()
    assert torch.equal(rounded.half(), y + made.bias.half())
    assert 0 < (rounded - exact).norm() / exact.norm() < 2e-3


def test_no_autocast_reaches_training_in_fp16_steps() -> None:
    made, x = layer(view="v2", ste_fp16=True), torch.randn(7, 64)
    plain = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), plain)


# --- conversions


def test_v1_to_v2_and_back_keeps_the_weight() -> None:
    config = Config(rank=8, attn_rank=4)
    model = config.prepare(llama(), batches())
    with torch.no_grad():
        for found in quant_layers(model).values():
            found.scale_A *= 1.01 + 0.1 * torch.rand(found.scale_A.shape)
    before = {fqn: (found.encode(), effective(found)) for fqn, found in quant_layers(model).items()}
    logits = model.eval()(ids()).logits
    frozen = replace(config, view="v2", train="scales").prepare(model)
    for fqn, found in quant_layers(frozen).items():
        assert torch.equal(found.encode().index, before[fqn][0].index)
        assert torch.allclose(effective(found), before[fqn][1], rtol=1e-3, atol=1e-6)
    assert torch.allclose(frozen.eval()(ids()).logits, logits, atol=2e-4)
    with torch.no_grad():
        for found in quant_layers(frozen).values():  # as training does: the latent weight of before is not theirs
            found.scale_A *= 0.7 + 0.6 * torch.rand(found.scale_A.shape)
    trained = {fqn: effective(found) for fqn, found in quant_layers(frozen).items()}
    again = config.prepare(frozen)
    for fqn, found in quant_layers(again).items():
        assert torch.equal(found.weight, trained[fqn])
        assert torch.equal(found.encode().index, before[fqn][0].index)
        assert torch.allclose(effective(found), trained[fqn], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("view", ["v1", "v2"])
def test_four_bits_to_two_keeps_codes_where_the_table_stays(view: str) -> None:
    four = Config(view=view, bits=4, rank=4, attn_rank=4)
    model = four.prepare(llama(), batches())
    before = {fqn: (found.encode(), effective(found)) for fqn, found in quant_layers(model).items()}
    two = replace(four, bits=2, rank=16, attn_rank=8)
    for fqn, found in quant_layers(two.prepare(model)).items():
        if two.is_attention(fqn):
            assert torch.equal(found.encode().index, before[fqn][0].index)
            assert torch.allclose(effective(found), before[fqn][1], atol=1e-6)
            assert found.scale_A.shape[1] == 8
        else:
            assert found.encode().bits == 2
            assert (effective(found) - before[fqn][1]).norm() < 0.35 * before[fqn][1].norm()


def test_the_closed_form_is_nearer_than_means_over_the_table() -> None:
    errors = {}
    for way in ("refit", "kmeans"):
        four = Config(bits=4, rank=8, attn_rank=8)
        model = four.prepare(llama(), batches())
        before = {fqn: effective(found) for fqn, found in quant_layers(model).items()}
        replace(four, bits=2, rank=16, requantize=way).prepare(model)
        found = quant_layers(model)["model.layers.0.mlp.up_proj"]
        errors[way] = (effective(found) - before["model.layers.0.mlp.up_proj"]).norm().item()
    assert errors["refit"] < 0.8 * errors["kmeans"]


def test_new_ranks_begin_at_nothing_and_can_be_trained() -> None:
    narrow = Config(rank=4, attn_rank=4)
    model = narrow.prepare(llama(), batches())
    before = model.eval()(ids()).logits
    wide = replace(narrow, rank=12, attn_rank=12, train="scales").prepare(model)
    logits = wide(ids()).logits
    assert torch.allclose(logits, before, atol=1e-5)
    logits.square().mean().backward()
    for found in quant_layers(wide).values():
        assert (found.scale_A.grad[:, 4:].abs().sum(0) > 0).all()


def test_balanced_factors_have_the_same_product() -> None:
    a, b = torch.randn(9, 3) * 100, torch.randn(3, 7) / 100
    a[:, 1] = 0
    x, y = lowrank.balanced(a, b)
    assert torch.allclose(x @ y, a @ b, rtol=1e-5)
    assert torch.allclose(x.norm(dim=0)[::2], y.norm(dim=1)[::2])


def test_factors_are_counted() -> None:
    codes = layer(rank=8, bias=False).encode()
    assert codes.num_bits() == 96 * 64 * 2 + 16 * (4 + 8 * 96 + 8 * 64)


def test_factors_name_their_shapes() -> None:
    table, a, b = Factors(*lowrank.start(weight(), 3, 5, 16))
    assert (table.shape, a.shape, b.shape) == ((8,), (96, 5), (5, 64))
