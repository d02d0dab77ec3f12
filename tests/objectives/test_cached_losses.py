"""The loss on a KD cache is the KL over the cached words and one bucket of all others, with its gradient."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from wrinklefree.objectives.losses import CHUNK, NEVER, CachedTeacher, cached_losses, token_losses


def known(logits: Tensor, topk: int, tail: bool = True) -> CachedTeacher:
    values, ids = logits.topk(topk)
    rest = logits.scatter(-1, ids, NEVER).logsumexp(-1)
    return CachedTeacher(ids, values, rest if tail else None, torch.arange(len(logits)) % 5 == 4)


def case(num: int = 10, width: int = 8, vocab: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, head, labels and the teacher's logits."""
    draw = torch.Generator().manual_seed(0)
    states, head = (torch.randn(n, width, generator=draw) for n in (num, vocab))
    return states, head, torch.randint(vocab, (num,), generator=draw), 3 * torch.randn(num, vocab, generator=draw)


@pytest.mark.numeric
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("height", [0.0, 60.0])
def test_the_whole_vocabulary_gives_the_full_kl(temperature: float, height: float) -> None:
    """Also where logits are high: then fp32 would keep no more than 4e-6 of a probability of their log-sum-exp."""
    states, head, labels, other = case()
    other = other + height
    settings = {"temperature": temperature, "ce_weight": 0.3, "kl_weight": 0.7}
    student = [t.clone().requires_grad_() for t in (states, head)]
    cached = cached_losses(*student, labels, known(other, other.shape[1]), **settings)
    grads = torch.autograd.grad(cached.loss, student)
    plain = [t.clone().requires_grad_() for t in (states, head)]
    online = token_losses(*plain, labels, teacher=(other, torch.eye(other.shape[1])), **settings)
    torch.testing.assert_close((cached.loss, cached.kl, cached.ce), (online.loss, online.kl, online.ce))
    torch.testing.assert_close(grads, torch.autograd.grad(online.loss, plain))


def buckets(logits: Tensor, ids: Tensor) -> Tensor:
    """A plain reference in fp64: probabilities of some words, and what all others have."""
    p = logits.double().softmax(-1)
    chosen = p.gather(-1, ids)
    return torch.cat([chosen, p.scatter(-1, ids, 0).sum(-1, keepdim=True)], -1)


@pytest.mark.numeric
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("tau_squared", [True, False])
@pytest.mark.parametrize("sure", [1, 6])
def test_the_loss_is_kl_over_the_likeliest_words_and_one_bucket(
    temperature: float, tau_squared: bool, sure: int
) -> None:
    """Also where a sure teacher leaves the bucket 1e-5 or less: a temperature of 3 makes 2 % of that."""
    states, head, labels, other = case()
    other = sure * other
    teacher = known(other, 6)
    p, q = (buckets(x, teacher.ids) ** (1 / temperature) for x in (other, states @ head.T))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    kl = (p * (p / q).log()).sum(-1).mean() * (temperature**2 if tau_squared else 1)
    ours = cached_losses(states, head, labels, teacher, temperature=temperature, tau_squared=tau_squared)
    torch.testing.assert_close(ours.loss, kl.float())


@pytest.mark.numeric
def test_the_gradient_is_that_of_the_plain_reference() -> None:
    states, head, labels, other = case()
    teacher, student = known(other, 6), [t.clone().requires_grad_() for t in (states, head)]
    cached_losses(*student, labels, teacher).loss.backward()
    plain = [t.clone().requires_grad_() for t in (states, head)]
    p, q = buckets(other, teacher.ids), buckets(plain[0] @ plain[1].T, teacher.ids)
    (p * (p / q).log()).sum(-1).mean().backward()
    torch.testing.assert_close([t.grad for t in student], [t.grad for t in plain])


def test_random_words_refine_the_bucket_and_those_that_are_there_already_do_nothing() -> None:
    states, head, labels, other = case()
    teacher = known(other, 6)
    more = other.topk(9)
    rest = known(other, 9).rest
    finer = dataclasses.replace(teacher, ids=more.indices, logits=more.values, rest=rest)
    hits = torch.full((10, 4), NEVER)
    again = dataclasses.replace(
        teacher, ids=torch.cat([teacher.ids, teacher.ids[:, :4]], 1), logits=torch.cat([teacher.logits, hits], 1)
    )
    coarse, fine, same = (cached_losses(states, head, labels, t).kl for t in (teacher, finer, again))
    assert coarse < fine  # a partition that is finer has no smaller KL
    torch.testing.assert_close(same, coarse)


def test_without_the_tail_the_support_alone_is_compared() -> None:
    """Upstream's loss: both softmaxes over the K words, times T^2."""
    states, head, labels, other = case()
    teacher = known(other, 6, tail=False)
    p, q = (x.gather(-1, teacher.ids).div(2).log_softmax(-1) for x in (other, states @ head.T))
    ours = cached_losses(states, head, labels, teacher, temperature=2.0)
    torch.testing.assert_close(ours.loss, 4 * (p.exp() * (p - q)).sum(-1).mean())


def test_hard_terms_are_what_their_names_say() -> None:
    """`hard_top1` over the cached words everywhere, `hard_full` over the vocabulary at the last position of each."""
    states, head, labels, other = case()
    teacher, logits = known(other, 6), states @ head.T
    top1 = -logits.gather(-1, teacher.ids).log_softmax(-1)[:, 0].mean()
    full = -logits.log_softmax(-1).gather(-1, teacher.ids[:, :1])[teacher.last].mean()
    ours = cached_losses(states, head, labels, teacher, kl_weight=0.0, hard_top1=0.2, hard_full=0.05)
    torch.testing.assert_close(ours.terms(), {"loss": 0.2 * top1, "hard_full": 0.05 * full})
    torch.testing.assert_close(ours.hard_top1, ours.loss)


def test_the_loss_holds_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks change nothing, and no tensor as large as all logits is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    states, head, labels, other = case(num=64)
    teacher = known(other, 6)
    whole = cached_losses(states.requires_grad_(), head, labels, teacher).loss
    monkeypatch.setattr("wrinklefree.objectives.losses.CHUNK", 8)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        torch.testing.assert_close(cached_losses(states, head, labels, teacher).loss, whole)
    assert largest < 64 * 23
    assert CHUNK == 1024
