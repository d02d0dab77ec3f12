"""What a batch is trained for: attention relations, hidden states, and how the terms come together."""

import logging
import math

import pytest
import torch
from tiny import ids, llama, qwen
from torch import Tensor

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import AttentionConfig, DistillationConfig, HiddenConfig
from wrinklefree.core.errors import UserError
from wrinklefree.objectives.base import Shares
from wrinklefree.objectives.kinds.language_modelling import Objective as LanguageModelling
from wrinklefree.objectives.losses import attention_relation, hidden_alignment, same_document, token_losses
from wrinklefree.objectives.terms import hidden_share, layer_weights

pytestmark = pytest.mark.numeric

POSITIONS = torch.tensor([[*range(10), *range(6), 0, 0]])  # two documents and two tokens of padding


def batch(length: int = 18) -> dict[str, Tensor]:
    tokens = ids(1, length)
    return {"input_ids": tokens, "labels": tokens.masked_fill(POSITIONS == 0, -100), "position_ids": POSITIONS}


def relations(x: Tensor, heads: int, temperature: float) -> list[Tensor]:
    """Algorithm 1 of arXiv 2510.13998, one head at a time: row-wise distributions over the tokens."""
    width = x.shape[-1] // heads
    parts = [x[:, h * width : (h + 1) * width] for h in range(heads)]
    unit = [part / part.norm(dim=-1, keepdim=True) for part in parts]
    return [(u @ u.T / temperature).softmax(-1) for u in unit]


def plain_relation_loss(student: Tensor, teacher: Tensor, heads: int, temperature: float) -> Tensor:
    pairs = zip(relations(teacher, heads, temperature), relations(student, heads, temperature), strict=True)
    return torch.stack([(p * (p / q).log()).sum(-1).mean() for p, q in pairs]).mean()


@pytest.mark.parametrize(("heads", "temperature"), [(1, 1.0), (4, 1.0), (8, 0.3)])
def test_relations_are_those_of_a_plain_reimplementation(heads: int, temperature: float) -> None:
    student, teacher = torch.randn(1, 10, 32), torch.randn(1, 10, 64)  # widths of their own
    mask = same_document(torch.arange(10)[None])
    ours = attention_relation(student, teacher, mask, heads, temperature)
    torch.testing.assert_close(ours, plain_relation_loss(student[0], teacher[0], heads, temperature))


def test_relations_stay_inside_documents_and_leave_padding_out() -> None:
    student, teacher = torch.randn(1, 18, 32), torch.randn(1, 18, 32)
    ours = attention_relation(student, teacher, same_document(POSITIONS), 4, 1.0)
    first = plain_relation_loss(student[0, :10], teacher[0, :10], 4, 1.0)
    second = plain_relation_loss(student[0, 10:16], teacher[0, 10:16], 4, 1.0)
    torch.testing.assert_close(ours, (10 * first + 6 * second) / 16)


def test_relations_of_padding_alone_are_zero() -> None:
    x = torch.randn(1, 4, 8, requires_grad=True)
    loss = attention_relation(x, torch.randn(1, 4, 8), same_document(torch.zeros(1, 4)), 2, 1.0)
    loss.backward()
    assert loss == 0
    assert x.grad.isfinite().all()


def test_hidden_distance_does_not_shrink_with_the_width() -> None:
    kept = torch.ones(1, 200, dtype=torch.bool)
    for width in (64, 1024):
        distance = hidden_alignment(torch.randn(1, 200, width), torch.randn(1, 200, width), kept)
        assert distance == pytest.approx(2, abs=0.05)  # unrelated vectors
    x = torch.randn(1, 200, 16)
    assert hidden_alignment(x, 3 * x, kept) == pytest.approx(0, abs=1e-5)


def test_tau_squared_is_a_factor_of_the_kl_alone() -> None:
    states, head, targets = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)
    teacher = torch.randn(6, 8), head
    settings = {"teacher": teacher, "ce_weight": 0.5, "kl_weight": 2.0, "temperature": 3.0}
    plain = token_losses(states, head, targets, **settings, tau_squared=False)
    squared = token_losses(states, head, targets, **settings)
    p, q = (torch.log_softmax(x @ head.T / 3, -1) for x in (teacher[0], states))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(plain.loss, 0.5 * plain.ce + 2 * kl)
    torch.testing.assert_close(squared.loss, 0.5 * plain.ce + 2 * 9 * kl)


def test_kd_does_not_depend_on_padding_or_length() -> None:
    """The same document alone, and with padding behind it: the same loss."""
    student, teacher = llama(), llama(intermediate_size=160)
    config = DistillationConfig(
        name="classification", weight=10.0, temperature=5.0, attention=AttentionConfig(weight=1e3)
    )
    objective = LanguageModelling(student, config, teacher)
    padded = {name: tensor[:, :16] for name, tensor in batch().items()}
    losses = [next(objective(given))[0] for given in (batch(), padded)]
    torch.testing.assert_close(losses[0], losses[1])


def test_the_whole_loss_is_the_sum_of_its_terms() -> None:
    student, teacher = llama(), llama(intermediate_size=160)
    config = DistillationConfig(
        name="classification",
        weight=10.0,
        temperature=5.0,
        tau_squared=False,
        attention=AttentionConfig(weight=100.0, layer=0, split_heads=4),
    )
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        for projection in ("q_proj", "k_proj", "v_proj"):
            module = model.model.layers[0].self_attn.get_submodule(projection)
            module.register_forward_hook(lambda m, i, o, name=name: seen[name].append(o.detach()))
    objective = LanguageModelling(student, config, teacher)
    for outputs in seen.values():
        outputs.clear()
    terms, metrics = next(objective(batch()))
    loss = sum(terms.values())
    mask = same_document(POSITIONS)
    pairs = zip(seen["student"], seen["teacher"], strict=True)
    relation = torch.stack([attention_relation(s, t, mask, 4, 1.0) for s, t in pairs]).sum()
    torch.testing.assert_close(metrics["attention"], relation)
    torch.testing.assert_close(loss, metrics["ce"] + 10 * metrics["kl"] + 100 * relation)
    loss.backward()
    assert student.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("tau_squared", [True, False])
def test_the_shares_of_the_loss_add_up_to_it(tau_squared: bool) -> None:
    config = DistillationConfig(name="logits", weight=3.0, ce_weight=0.5, temperature=5.0, tau_squared=tau_squared)
    objective = LanguageModelling(llama(), config, llama(intermediate_size=160))
    added: list[dict[str, Tensor]] = []
    objective.shares.add = added.append  # type: ignore[method-assign]
    loss, _ = next(objective(batch()))
    torch.testing.assert_close(sum(added[0].values()), loss.detach())


def test_models_of_other_depth_width_and_heads_can_teach() -> None:
    student = llama(num_key_value_heads=2)
    teacher = llama(hidden_size=128, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)
    config = DistillationConfig(name="classification", attention=AttentionConfig(weight=1.0, layer=0))
    objective = LanguageModelling(student, config, teacher)
    assert objective.attention is not None
    assert (
        objective.attention.teacher.modules[0] is teacher.model.layers[1].self_attn.q_proj
    )  # half way, as in the student
    assert next(objective(batch()))[0]["attention"].isfinite()


def test_hidden_states_take_their_share() -> None:
    student, teacher = llama(), llama(intermediate_size=160)
    hidden = HiddenConfig(enabled=True, schedule="linear", initial_weight=0.8, final_weight=0.2)
    objective = LanguageModelling(
        student, DistillationConfig(name="layerwise", weight=0.5, ce_weight=0.5, hidden=hidden), teacher
    )
    objective.on_step(5, 10)
    terms, metrics = next(objective(batch()))
    rest = 0.5 * metrics["ce"] + 0.5 * metrics["kl"]
    torch.testing.assert_close(sum(terms.values()), 0.5 * (2 - 2 * metrics["cosine"]) + 0.5 * rest)


def test_a_copy_is_perfectly_aligned() -> None:
    config = DistillationConfig(name="layerwise", weight=1.0, ce_weight=0.0, hidden=HiddenConfig(enabled=True))
    terms, metrics = next(LanguageModelling(llama(), config, llama())(batch()))
    assert sum(terms.values()).item() == pytest.approx(0, abs=1e-5)
    assert metrics["cosine"].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("uniform", [1 / 3] * 3),
        ("progressive", [1 / 6, 2 / 6, 3 / 6]),
        ("exponential", [1 / 7, 2 / 7, 4 / 7]),
        ([0.0, 1.0, 3.0], [0, 0.25, 0.75]),
    ],
)
def test_layer_weights(given: str | list[float], expected: list[float]) -> None:
    assert layer_weights(given, 3) == pytest.approx(expected)


def test_layer_weights_of_another_length_are_refused() -> None:
    with pytest.raises(UserError, match="needs 3 numbers"):
        layer_weights([1.0, 1.0], 3)


def test_the_hidden_share_follows_its_schedule() -> None:
    cosine = HiddenConfig(initial_weight=0.6, final_weight=0.2, warmup_steps=2)
    assert [hidden_share(cosine, step, 12) for step in (0, 1, 2, 7, 12)] == pytest.approx([0.6, 0.6, 0.6, 0.4, 0.2])
    assert hidden_share(HiddenConfig(schedule="constant"), 7, 9) == 0.5


REFUSED = {
    "a layer that is not there": (AttentionConfig(weight=1.0, layer=2), llama, "layer=2: the model has 2 layers"),
    "heads that do not split": (AttentionConfig(weight=1.0, split_heads=7), llama, "split_heads=7: does not divide"),
    "no teacher": (AttentionConfig(weight=1.0), lambda: None, "needs a teacher"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(case: str) -> None:
    attention, teacher, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        LanguageModelling(llama(), DistillationConfig(name="classification", attention=attention), teacher())


def test_hidden_states_need_equal_shapes() -> None:
    config = DistillationConfig(name="layerwise", hidden=HiddenConfig(enabled=True))
    with pytest.raises(UserError, match="the teacher has 1 layers of 64, the model 2 of 64"):
        LanguageModelling(llama(), config, qwen())


def test_a_term_that_is_next_to_nothing_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    shares = Shares()
    with caplog.at_level(logging.WARNING, "wrinklefree"):
        for _ in range(50):
            shares.add({"ce": torch.tensor(1.0), "attention": torch.tensor(1e-6)})
    assert [record.getMessage() for record in caplog.records] == [
        "the attention term is 0.0001 % of the loss: raise its weight under distillation, or leave it out"
    ]


def test_the_presets_are_the_papers_coefficients() -> None:
    for name, kd, relation in (("classification", 10.0, 1e5), ("summarization", 1.0, 1e3)):
        d = load_config(["model=smollm2_135m", "training=fairy2_w2", f"distillation={name}"]).distillation
        assert (d.ce_weight, d.weight, d.temperature, d.tau_squared) == (1.0, kd, 5.0, False)
        assert d.attention.weight == relation


def test_relations_have_the_size_that_the_papers_coefficient_expects() -> None:
    """Unrelated projections give about 1e-2, nearly equal ones 1e-4: 1e5 times that is of the size of a loss."""
    x = torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(0))
    mask = same_document(torch.arange(64).expand(4, -1))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    near, far = (attention_relation(x + a * noise, x, mask, 8, 1.0).item() for a in (0.1, 10.0))
    assert 1e-5 < near < 1e-3 < far < 1e-1
    assert not math.isclose(near, far)
