"""Losses over the vocabulary, in chunks of tokens.

The logits of 2,048 tokens over 150,000 words take 1.2 GB in fp32, several times over in a plain loss. Here they exist
for one chunk at a time: `HeadLoss` works out a chunk's loss and its gradients towards the hidden states and the head in
one go, then forgets the logits.

With logits z of the student, y of the teacher, labels t, temperature T, over the N tokens that have a label:
    CE = -1/N sum log softmax(z)[t]            KL = T^2/N sum_v softmax(y/T) (log softmax(y/T) - log softmax(z/T))
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # tokens; at 150k words 0.6 GB of fp32 logits

ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokenLosses:
    """Means over the labelled tokens, detached but for `loss`."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    same_top1: Tensor  # share of tokens where student and teacher agree on the likeliest word


def shifted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair each state with the label of the next token: [B, L, D], [B, L] -> [N, D], [N] without labels of -100."""
    targets = labels[:, 1:].flatten()
    states = hidden[:, :-1].flatten(0, 1)
    kept = targets != -100
    return states[kept], targets[kept]


def token_losses(
    states: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
) -> TokenLosses:
    """`ce_weight` CE + `kl_weight` KL of states [N, D] under a head [V, D] and targets [N].

    `teacher` is the teacher's (states [N, D'], head [V, D']). Needs N > 0.
    """

    def chunk_loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        ce = F.cross_entropy(logits, targets[part], reduction="sum")
        if teacher is None:
            return ce_weight * ce, torch.stack([ce.detach(), ce.new_zeros(()), ce.new_zeros(())])
        with torch.no_grad():
            other = F.linear(teacher[0][part], teacher[1]).float()
        kl = kl_divergence(logits, other, temperature)
        agree = (logits.argmax(-1) == other.argmax(-1)).sum()
        return ce_weight * ce + kl_weight * kl, torch.stack([ce.detach(), kl.detach(), agree.to(ce.dtype)])

    loss, sums = HeadLoss.apply(states, head, chunk_loss, torch.is_grad_enabled())
    ce, kl, agree = sums / len(targets)
    return TokenLosses(loss / len(targets), ce, kl, agree)


def kl_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the sum over rows of KL(softmax(teacher/T) || softmax(logits/T)); [N, V] each."""
    p = F.log_softmax(teacher / temperature, dim=-1)
    q = F.log_softmax(logits / temperature, dim=-1)
    return F.kl_div(q, p, log_target=True, reduction="sum") * temperature**2


class HeadLoss(torch.autograd.Function):
    """Sum of `chunk_loss(states @ head.T, rows)` over chunks of rows, keeping one chunk of logits at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, chunk_loss: ChunkLoss, trains: bool) -> tuple[Tensor, Tensor]:
        total, sums = states.new_zeros((), dtype=torch.float32), states.new_zeros(3, dtype=torch.float32)
        grad_states = torch.empty_like(states) if trains else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if trains else None
        weight = head.detach().to(states.dtype)
        for start in range(0, len(states), CHUNK):
            part = slice(start, start + CHUNK)
            with torch.set_grad_enabled(trains):
                logits = F.linear(states[part].detach(), weight).float().requires_grad_(trains)
                loss, values = chunk_loss(logits, part)
            total, sums = total + loss.detach(), sums + values
            if grad_states is not None and grad_head is not None:
                (grad_logits,) = torch.autograd.grad(loss, logits)
                grad_logits = grad_logits.to(weight.dtype)
                grad_states[part] = grad_logits @ weight
                grad_head += grad_logits.T @ states[part]
        ctx.head_dtype = head.dtype
        ctx.save_for_backward(grad_states, grad_head)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_sums: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_states, grad_head = ctx.saved_tensors
        return grad_states * grad_total.to(grad_states.dtype), (grad_head * grad_total).to(ctx.head_dtype), None, None
