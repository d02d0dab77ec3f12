"""Losses over the vocabulary, between attention relations, and between hidden states.

Student logits z, teacher logits y, labels t and temperature T, over the N tokens that have a label:
    CE = -1/N sum log softmax(z)[t]            KL = T^2/N sum_v softmax(y/T) (log softmax(y/T) - log softmax(z/T))
BitDistill leaves out the T^2 (`tau_squared=False`).

Cached KD knows the teacher's logits y_c for some words C only, its support. All other words share one bucket with the
logit log sum_{v not in C} exp(y_v), and so do the student's. The KL is over these |C| + 1 buckets; if C is the whole
vocabulary, it is the full KL. If the teacher's last bucket is unknown, the support alone is compared, as upstream does.
Two hard terms are cross entropies with the teacher's likeliest word:
    hard_top1    over the support, at every position
    hard_full    over the vocabulary, at the last position of each sequence

Attention relations (arXiv 2510.13998, Algorithm 1): split Q, K or V into h relation heads and scale each vector a_i to
length 1. Then R_ij = softmax_j(a_i . a_j / t) over the tokens j in the same document, and the loss is
KL(R teacher || R student), a mean over tokens and heads. R is [L, L], so widths and head counts may differ.

Hidden states: 2 - 2 cos(s, t).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.batch import IGNORE

CHUNK = 1024  # tokens whose logits exist at a time; at 150k words that is 0.3 GB in bf16

# Logits that a CPU works on at a time, in fp32: its cache holds them and what is made of them. At 49k words a loss with
# a teacher takes half of the time that it takes for a whole chunk (LOG.md).
CACHED = 3 * 2**20

NEVER = -1e4  # the logit of an impossible word, at any temperature. Finite, because 0 x -inf is not 0

# From logits, their rows, and the teacher's logits if it has any: the sum of the losses, and sums of any named metrics.
ChunkLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class Head(Protocol):
    """What turns last hidden states into logits."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What the logits depend on; those that are trained get gradients."""
        ...

    def __len__(self) -> int: ...  # words

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """The parameters as one batch uses them, for states in `dtype`."""
        ...

    def logits(self, states: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The logits [N, V] of states [N, D]."""
        ...


class Product:
    """A head that is one product with a weight [V, D]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def parameters(self) -> Sequence[Tensor]:
        return (self.weight,)

    def __len__(self) -> int:
        return len(self.weight)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        # Cast once for all chunks. As a leaf, so that its gradient is summed in fp32 and not in `dtype`.
        return [self.weight.detach().to(dtype).requires_grad_()]

    def logits(self, states: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        return F.linear(states, leaves[0])


def as_head(head: Head | Tensor) -> Head:
    """A head; a tensor is the weight [V, D] of a product."""
    return Product(head) if isinstance(head, Tensor) else head


@dataclass(frozen=True)
class TokenLosses:
    """Means over the labelled tokens. Only `loss` has a gradient."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    same_top1: Tensor  # share of tokens where student and teacher agree on the likeliest word


def shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair each state with the next token's label: [B, L, D], [B, L] -> [N, D], [N]. Labels of -100 are dropped."""
    targets = labels[:, 1:].flatten()
    states = hidden[:, :-1].flatten(0, 1)
    kept = targets != IGNORE
    return states[kept], targets[kept]


def token_losses(
    states: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    *,
    teacher: tuple[Tensor, Head | Tensor] | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    tau_squared: bool = True,
    words: int | None = None,
) -> TokenLosses:
    """Return `ce_weight` CE + `kl_weight` KL for states [N, D], a head to V words and targets [N].

    `teacher` is the teacher's (states [N, D'], head to V' words); if it is None, there is no KL. If V and V' differ,
    one tokenizer was padded to two sizes: the KL is over its `words`, by default over the words that both have. If N is
    0, all is 0.
    """
    head, common = as_head(head), None
    if teacher is not None:
        teacher = teacher[0], as_head(teacher[1])
        if len(head) != len(teacher[1]):
            common = min(len(head), len(teacher[1]), len(head) if words is None else words)

    def chunk_loss(logits: Tensor, part: slice, other: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        q = F.log_softmax(logits, dim=-1)
        ce = F.nll_loss(q, targets[part], reduction="sum")
        if other is None:
            zero = ce.new_zeros(())
            return ce_weight * ce, {"ce": ce, "kl": zero, "same_top1": zero}
        other = other[:, :common]
        if common is not None or temperature != 1:
            q = F.log_softmax(logits[:, :common] / temperature, dim=-1)
        p = F.log_softmax(other / temperature, dim=-1)
        kl = F.kl_div(q, p, log_target=True, reduction="sum") * (temperature**2 if tau_squared else 1)
        loss = kl_weight * kl
        if ce_weight:  # at weight 0 it would still cost a backward pass
            loss = loss + ce_weight * ce
        agree = (logits[:, :common].argmax(-1) == other.argmax(-1)).sum()
        return loss, {"ce": ce, "kl": kl, "same_top1": agree.to(ce.dtype)}

    loss, metrics = head_loss(states, head, chunk_loss, teacher)
    return TokenLosses(loss, **metrics)


def kl_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum KL(softmax(teacher/T) || softmax(logits/T)) over the rows of two [N, V]."""
    p = F.log_softmax(teacher / temperature, dim=-1)
    q = F.log_softmax(logits / temperature, dim=-1)
    return F.kl_div(q, p, log_target=True, reduction="sum")


@dataclass(frozen=True)
class CachedTeacher:
    """What a cache knows about the teacher at N positions: S words of support, the likeliest first."""

    ids: Tensor  # int64 [N, S]; distinct, except for words whose logit is NEVER
    logits: Tensor  # fp32 [N, S]
    rest: Tensor | None  # fp32 [N], log-sum-exp of all other words' logits; None if unknown
    last: Tensor  # bool [N], True at the last position of each sequence


def within(ids: Tensor, logits: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """Make words of a support [N, S] beyond the student's `words` impossible: they are padding of the teacher's head.

    Their ids become that of the likeliest word, which is in the support already.
    """
    outside = ids >= words
    likeliest = ids[:, :1].clamp(max=words - 1)
    return torch.where(outside, likeliest, ids), logits.masked_fill(outside, NEVER)


@dataclass(frozen=True)
class CachedLosses:
    """Means over N tokens, but `hard_full` is one over sequences. `loss` and `hard_full` have a gradient.

    `loss` is the weighted sum of cross entropy, KL and `hard_top1`. The hard terms are weighted, too.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    hard_top1: Tensor
    hard_full: Tensor | None  # None at weight 0

    def terms(self) -> dict[str, Tensor]:
        """Return the terms that add up to the whole loss."""
        return {"loss": self.loss} | ({} if self.hard_full is None else {"hard_full": self.hard_full})


def cached_losses(
    states: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    teacher: CachedTeacher,
    *,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    tau_squared: bool = True,
    hard_top1: float = 0.0,
    hard_full: float = 0.0,
) -> CachedLosses:
    """Compare states [N, D] under a head to V words with labels [N] and a cached teacher."""

    def chunk_loss(logits: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        known = teacher.logits[part]
        own = Support.apply(logits, teacher.ids[part])  # [n, S + 1]
        own = own.masked_fill(F.pad(known <= NEVER, (0, 1)), NEVER)
        normalizer = own.logsumexp(-1)
        other = known if teacher.rest is None else torch.cat([known, teacher.rest[part, None]], dim=-1)
        kl = kl_divergence(own[:, : other.shape[-1]], other, temperature) * (temperature**2 if tau_squared else 1)
        ce = (normalizer - logits.gather(-1, targets[part, None]).squeeze(-1)).sum()
        top1 = hard_top1 * (own[:, :-1].logsumexp(-1) - own[:, 0]).sum()
        loss = kl_weight * kl + top1
        if ce_weight:  # at weight 0 it would still cost a backward pass
            loss = loss + ce_weight * ce
        return loss, {"ce": ce, "kl": kl, "hard_top1": top1}

    loss, metrics = head_loss(states, head, chunk_loss)
    full = None
    if hard_full:
        likeliest = teacher.ids[teacher.last, 0]
        full = token_losses(states[teacher.last], head, likeliest, ce_weight=hard_full).loss
    return CachedLosses(loss, **metrics, hard_full=full)


def same_document(positions: Tensor) -> Tensor:
    """Return which tokens share a document, bool [B, L, L], from positions [B, L] that restart at each document."""
    document = (positions == 0).cumsum(-1)
    return document.unsqueeze(-1) == document.unsqueeze(-2)


def related(positions: Tensor) -> Tensor:
    """Mark the tokens that are not alone in their document, bool [B, L], as `same_document` tells documents apart.

    Padding is alone: each token of it is a document of its own.
    """
    starts = positions == 0
    begins = starts.clone()
    begins[:, :1] = True
    ends = F.pad(starts[:, 1:], (0, 1), value=True)
    return ~(begins & ends)


def attention_relation(student: Tensor, teacher: Tensor, mask: Tensor, split_heads: int, temperature: float) -> Tensor:
    """Return KL(R teacher || R student) for one of Q, K, V [B, L, width], under `mask`, bool [B, L, L].

    The two widths may differ. A token alone in its document, such as padding, has no relations and does not count.
    """
    p = _log_relations(teacher, mask, split_heads, temperature)
    q = _log_relations(student, mask, split_heads, temperature)
    divergence = (p.exp() * (p - q)).sum(-1)  # [B, h, L]; finite: masked entries are a large negative number, not -inf
    kept = (mask.sum(-1) > 1).unsqueeze(1)
    return (divergence * kept).sum() / (kept.sum() * split_heads).clamp_min(1)


def _log_relations(x: Tensor, mask: Tensor, split_heads: int, temperature: float) -> Tensor:
    """Log softmax of the cosines between the vectors in each relation head: fp32 [B, h, L, L]."""
    heads = F.normalize(x.float().unflatten(-1, (split_heads, -1)).transpose(1, 2), dim=-1)
    cosines = heads @ heads.transpose(-1, -2) / temperature
    return F.log_softmax(cosines.masked_fill(~mask.unsqueeze(1), -1e4), dim=-1)


def hidden_alignment(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Mean of 2 - 2 cos between states [B, L, D], over the tokens that `kept` (bool [B, L]) marks."""
    # This is |s/|s| - t/|t||^2, summed over the width: a mean over the width would shrink as models get wider.
    cosine = F.cosine_similarity(student[kept].float(), teacher[kept].float(), dim=-1)
    return (2 - 2 * cosine).sum() / kept.sum().clamp_min(1)


class Support(torch.autograd.Function):
    """The logits [n, V] at `ids` [n, S], followed by the log-sum-exp of all others: [n, S + 1]."""

    # The backward pass is written by hand: with autograd's own functions the whole loss takes a third longer (140
    # against 107 ms on one core, for 4,080 tokens over 4,096 words).

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        others = logits.scatter(-1, ids, NEVER)
        largest = others.amax(-1, keepdim=True)
        weights = others.sub_(largest).exp_()  # 0 at `ids`
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights, total, ids)
        return torch.cat([logits.gather(-1, ids), largest + total.log()], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weights, total, ids = ctx.saved_tensors
        return (weights * (grad[:, -1:] / total)).scatter_add_(-1, ids, grad[:, :-1]), None


def head_loss(
    states: Tensor, head: Head | Tensor, chunk_loss: ChunkLoss, teacher: tuple[Tensor, Head | Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply a loss to the logits of states [N, D], in chunks of rows. Returns means of the loss and its metrics.

    The logits for 2,048 tokens over 150,000 words take 1.2 GB in fp32, and a plain loss holds several copies. Here they
    exist for one chunk at a time, in the states' own dtype, and in fp32 for as many rows as a CPU's cache holds.
    Metrics are detached.
    """
    sums: dict[str, Tensor] = {}
    head = as_head(head)
    other = None if teacher is None else _frozen(teacher[0], as_head(teacher[1]))
    total = HeadLoss.apply(states, head, chunk_loss, other, torch.is_grad_enabled(), sums, *head.parameters)
    count = max(1, len(states))
    return total / count, {name: value / count for name, value in sums.items()}


def _frozen(states: Tensor, head: Head) -> Callable[[slice], Tensor]:
    """The teacher's logits of some rows."""
    leaves = head.leaves(states.dtype)

    @torch.no_grad()
    def logits(rows: slice) -> Tensor:
        return head.logits(states[rows], leaves)

    return logits


def slices(total: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover `total`. There is always one, since an empty one still names metrics."""
    return [slice(start, min(start + size, total)) for start in range(0, max(1, total), size)]


class HeadLoss(torch.autograd.Function):
    """Sum of `chunk_loss(logits, rows, the teacher's logits)` over chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Head,
        chunk_loss: ChunkLoss,
        teacher: Callable[[slice], Tensor] | None,
        trains: bool,
        sums: dict[str, Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        """Add each chunk's metrics to `sums`, and return the sum of the losses."""
        total = states.new_zeros((), dtype=torch.float32)
        # Gradients are computed here, chunk by chunk: in backward() the logits are gone.
        grad_states = torch.empty_like(states) if trains else None
        leaves = head.leaves(states.dtype)
        # A frozen parameter needs no gradient, which for a whole head is a third of the products here.
        wanted = [trains and needed for needed in ctx.needs_input_grad[6:]]
        grads = [
            torch.zeros_like(p, dtype=torch.float32) if w else None for p, w in zip(parameters, wanted, strict=True)
        ]
        together = CHUNK if states.device.type != "cpu" else max(1, CACHED // len(head))
        for chunk in slices(len(states), CHUNK):
            with torch.set_grad_enabled(trains):
                rows = states[chunk].detach().requires_grad_(trains)
                logits = head.logits(rows, leaves)
            other = None if teacher is None else teacher(chunk)
            towards = torch.empty_like(logits) if trains else None
            for some in slices(len(logits), together):
                part = slice(chunk.start + some.start, chunk.start + some.stop)
                with torch.set_grad_enabled(trains):
                    own = logits.detach()[some].float().requires_grad_(trains)
                    theirs = () if other is None else (other[some].float(),)
                    loss, metrics = chunk_loss(own, part, *theirs)
                total = total + loss.detach()
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0) + value.detach()
                if towards is not None:
                    towards[some] = torch.autograd.grad(loss, own)[0]
            if grad_states is not None:
                trained = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
                ways = torch.autograd.grad(logits, [rows, *trained], towards, materialize_grads=True)
                grad_states[chunk], *found = ways
                for grad, value in zip([g for g in grads if g is not None], found, strict=True):
                    grad += value
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.save_for_backward(grad_states, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, *grads = ctx.saved_tensors
        scaled = grad_states * grad_total.to(grad_states.dtype)
        towards_head = [
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return scaled, None, None, None, None, None, *towards_head
