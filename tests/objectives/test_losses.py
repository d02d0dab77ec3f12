"""Losses in chunks of tokens: the plain loss and its gradients, without ever holding all logits."""

import pytest
import torch
import torch.nn.functional as F
from tiny import llama, tokenizer
from torch import Tensor

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.data.packing import encode, make_batch, pack
from wrinklefree.objectives import losses
from wrinklefree.objectives.language_model import BodyAndHead, vocabulary_losses
from wrinklefree.objectives.losses import shifted, token_losses

pytestmark = pytest.mark.numeric

N, D, V = 37, 8, 50  # N is no multiple of any chunk below

WEIGHTS = {
    "ce": {"ce_weight": 1.0, "kl_weight": 0.0},
    "kl": {"ce_weight": 0.0, "kl_weight": 1.0},
    "both": {"ce_weight": 0.3, "kl_weight": 0.7},
    "temperature": {"ce_weight": 0.3, "kl_weight": 0.7, "temperature": 2.5},
}


def operands() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    states, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return states, head, torch.randint(0, V, (N,)), (torch.randn(N, D + 3), torch.randn(V, D + 3))


def plain(
    states: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher: tuple[Tensor, Tensor],
    ce_weight: float,
    kl_weight: float,
    temperature: float = 1.0,
) -> Tensor:
    """The formulas of the module, at once."""
    z, y = states @ head.T, teacher[0] @ teacher[1].T
    ce = -F.log_softmax(z, -1)[torch.arange(len(targets)), targets].mean()
    p = F.softmax(y / temperature, -1)
    difference = F.log_softmax(y / temperature, -1) - F.log_softmax(z / temperature, -1)
    return ce_weight * ce + kl_weight * temperature**2 * (p * difference).sum(-1).mean()


@pytest.mark.parametrize(("chunk", "cached"), [(1, 1), (5, 2 * V), (36, 7 * V), (1024, 1), (1024, 2**22)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_gradients_are_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, chunk: int, cached: int, weights: str
) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    monkeypatch.setattr(losses, "CACHED", cached)
    states, head, targets, teacher = operands()
    expected = plain(states, head, targets, teacher, **WEIGHTS[weights])
    expected_grads = torch.autograd.grad(expected, (states, head))
    found = token_losses(states, head, targets, teacher=teacher, **WEIGHTS[weights]).loss
    (found * 3).backward()  # a factor from outside, as accumulation has
    assert torch.allclose(found, expected, rtol=1e-5)
    for leaf, gradient in zip((states, head), expected_grads, strict=True):
        assert torch.allclose(leaf.grad, 3 * gradient, rtol=1e-4, atol=1e-6)


def test_the_parts_are_reported_whatever_their_weights() -> None:
    states, head, targets, teacher = operands()
    found = token_losses(states, head, targets, teacher=teacher, ce_weight=0.0, kl_weight=0.5)
    ce = plain(states, head, targets, teacher, 1.0, 0.0)
    kl = plain(states, head, targets, teacher, 0.0, 1.0)
    assert torch.allclose(found.ce, ce)
    assert torch.allclose(found.kl, kl)
    agree = (states @ head.T).argmax(-1) == (teacher[0] @ teacher[1].T).argmax(-1)
    assert found.same_top1.item() == pytest.approx(agree.float().mean().item())
    assert not found.ce.requires_grad


def test_without_a_teacher_it_is_cross_entropy() -> None:
    states, head, targets, _ = operands()
    found = token_losses(states, head, targets)
    assert torch.allclose(found.loss, F.cross_entropy(states @ head.T, targets))
    assert found.kl == 0


def test_bf16_states_give_nearly_the_same() -> None:
    states, head, targets, teacher = operands()
    exact = token_losses(states, head, targets, teacher=teacher, **WEIGHTS["both"]).loss
    gradient = torch.autograd.grad(exact, head)[0]
    low = states.detach().bfloat16().requires_grad_()
    halves = tuple(t.bfloat16() for t in teacher)
    found = token_losses(low, head, targets, teacher=halves, **WEIGHTS["both"]).loss
    (found_gradient,) = torch.autograd.grad(found, head)
    assert found.dtype == found_gradient.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=0.02)
    assert (found_gradient - gradient).norm() < 0.03 * gradient.norm()


def test_all_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that an operation returns while loss and gradients are worked out has at most CHUNK x V entries."""
    monkeypatch.setattr(losses, "CHUNK", 4)
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    largest[0] = max(largest[0], tensor.numel())
            return result

    states, head, targets, teacher = operands()
    with Watch():
        token_losses(states, head, targets, teacher=teacher, **WEIGHTS["both"]).loss.backward()
    assert largest[0] == max(V * D, V * (D + 3), N * D, 4 * V)
    assert largest[0] < N * V / 3


def test_no_gradient_is_worked_out_without_autograd() -> None:
    states, head, targets, teacher = operands()
    with torch.no_grad():
        assert not token_losses(states, head, targets, teacher=teacher).loss.requires_grad


def test_a_frozen_head_gets_no_gradient_and_the_states_the_same() -> None:
    states, head, targets, teacher = operands()
    token_losses(states, head, targets, teacher=teacher).loss.backward()
    expected, states.grad, head.grad = states.grad, None, None
    token_losses(states, head.requires_grad_(False), targets, teacher=teacher).loss.backward()
    assert head.grad is None
    assert torch.equal(states.grad, expected)


def batch(mask: bool = True) -> dict[str, Tensor]:
    """Three documents in two blocks of 12."""
    texts = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10 w11", "w12 w13 w14 w15 w16 w17 w18 w19 w20"]
    return make_batch(pack(encode(tokenizer(), texts), 11, pad=95), mask)


CE = DistillationConfig(name="none")
KL = DistillationConfig(name="logits", weight=1.0, ce_weight=0.0)


def test_kl_to_itself_is_zero() -> None:
    model = BodyAndHead(llama())
    found = vocabulary_losses(model, model, batch(), KL)
    assert found.kl.abs() < 1e-7
    assert found.same_top1 == 1


def test_compare_is_the_models_own_loss() -> None:
    model = llama()
    expected = model(**batch(), use_cache=False).loss
    assert torch.allclose(vocabulary_losses(BodyAndHead(model), None, batch(), CE).loss, expected, rtol=1e-5)


def test_unlabelled_tokens_do_not_count() -> None:
    model, data = BodyAndHead(llama()), batch()
    expected = vocabulary_losses(model, None, data, CE).ce
    more = {name: torch.cat([tensor, tensor.flip(0)]) for name, tensor in data.items()}
    more["labels"][len(data["labels"]) :] = -100
    assert torch.allclose(vocabulary_losses(model, None, more, CE).ce, expected)


def test_shifted_pairs_each_state_with_the_next_label() -> None:
    hidden = torch.arange(8.0).reshape(1, 8, 1)
    labels = torch.tensor([[0, 10, -100, 30, 40, -100, -100, 70]])
    states, targets = shifted(hidden, labels)
    assert states.flatten().tolist() == [0, 2, 3, 6]
    assert targets.tolist() == [10, 30, 40, 70]


def test_documents_of_a_block_do_not_see_each_other() -> None:
    """Changing the first document leaves the states and losses of the others as they were, unless the mask is off."""
    model = BodyAndHead(llama())
    for mask in (True, False):
        data = batch(mask)
        changed = {name: tensor.clone() for name, tensor in data.items()}
        changed["input_ids"][0, 2] = 90
        before, after = model.states(data)[0], model.states(changed)[0]
        others = (data["labels"][0] == -100).nonzero()[1].item()  # the second document's first token
        assert not torch.allclose(before[2:others], after[2:others])
        assert torch.equal(before[others:], after[others:]) == mask


def test_nothing_is_predicted_across_a_border() -> None:
    data = batch()
    starts = [token in (1, 7, 12) for token in data["input_ids"].flatten().tolist()]
    assert [label == -100 for label in data["labels"].flatten().tolist()] == starts
    assert sum(starts) == 3


@pytest.mark.parametrize(("rows", "words", "common"), [(V + 9, 45, 45), (V - 6, 40, 40), (V + 9, None, V)])
def test_heads_of_two_paddings_are_compared_over_the_words_of_the_tokenizer(
    rows: int, words: int | None, common: int
) -> None:
    states, head, targets, (other, wide) = operands()
    targets = targets.clamp(max=39)
    padded = torch.cat([wide, 3 * torch.randn(9, D + 3)])[:rows]
    found = token_losses(
        states, head, targets, teacher=(other, padded), ce_weight=0.5, kl_weight=2.0, temperature=2.5, words=words
    )
    found.loss.backward()
    mine = [states.grad, head.grad]
    states.grad = head.grad = None
    z, y = states @ head.T, other @ padded.T
    p, q = ((x[:, :common] / 2.5).log_softmax(-1) for x in (y, z))
    kl = 2.5**2 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(found.loss, 0.5 * F.cross_entropy(z, targets) + 2 * kl)
    (0.5 * F.cross_entropy(z, targets) + 2 * kl).backward()
    torch.testing.assert_close(mine, [states.grad, head.grad])
