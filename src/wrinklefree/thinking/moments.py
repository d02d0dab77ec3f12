"""Second moments of hidden states from one pass over text, and the best linear codes for these states.

    n, s = sum x [D], C = sum x x^T / n [D, D]      added up in fp64; the moments of several parts can be added

The tied, bias-free autoencoder x' = W^T W x, W [D', D], has its least mean squared error where the rows of W are the
first eigenvectors of C (Baldi and Hornik 1989; Kunin et al., arXiv 1901.08168): the error is then the sum of the other
eigenvalues over D. So one eigendecomposition has the best code of every D'.

Weighted by a metric M, E (x - x')^T M (x - x'), the optimum has the first eigenvectors V of M^1/2 C M^1/2, the encoder
V^T M^1/2 and the decoder M^-1/2 V. With M the mean Fisher matrix of the output head, E U^T (diag p - p p^T) U for the
head U [vocabulary, D] and its probabilities p, that is the KL of the next word to second order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

Axes = tuple[Tensor, Tensor]  # eigenvalues [D], largest first, and eigenvectors [D, D], one a row

RIDGE = 1e-3  # of the metric's mean eigenvalue: directions that the head cannot see keep a little weight


@dataclass
class Moments:
    """Count, sum [D] and sum of outer products [D, D] of vectors [D]; fp64."""

    count: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def zeros(cls, width: int) -> Self:
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in ((), (width,), (width, width))))

    def add(self, vectors: Tensor) -> None:
        """Count vectors [N, D], multiplied in fp32."""
        x = vectors.detach().float()
        self.count += len(x)
        self.total += x.double().sum(0).cpu()
        self.outer += (x.T @ x).double().cpu()

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def scaled(self, factor: float) -> "Moments":
        """The moments if every vector had been counted `factor` times."""
        return Moments(self.count * factor, self.total * factor, self.outer * factor)

    @property
    def mean(self) -> Tensor:
        """The mean of the vectors, [D]."""
        return self.total / self.count

    @property
    def second(self) -> Tensor:
        """C [D, D], not centred."""
        return self.outer / self.count


def principal_axes(matrix: Tensor) -> Axes:
    """Eigenvalues and eigenvectors of a symmetric matrix [D, D], each vector's largest entry positive."""
    values, vectors = torch.linalg.eigh(matrix.double())
    axes = vectors.flip(1).T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return values.flip(0).clamp(min=0), axes * largest.sign()


def tied_code(moments: Moments, size: int) -> Tensor:
    """W [size, D] with the least mean squared error."""
    return principal_axes(moments.second)[1][:size]


def weighted_code(moments: Moments, metric: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Encoder and decoder, each [size, D], of the least error in `metric` [D, D], to which a ridge is added."""
    values, axes = principal_axes(metric)
    values = values + RIDGE * values.mean()
    root = axes.T @ (values.sqrt()[:, None] * axes)
    inverse = axes.T @ (values.rsqrt()[:, None] * axes)
    chosen = principal_axes(root @ moments.second @ root)[1][:size]
    return chosen @ root, chosen @ inverse


class Fisher:
    """The sum of U^T (diag p - p p^T) U over states, for a head U [V, D]: how its probabilities react to the states."""

    def __init__(self, head: Tensor) -> None:
        self.head = head.detach()
        self.probabilities = torch.zeros(len(head), dtype=torch.float64)
        self.means = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64)  # the sum of (U^T p) (U^T p)^T

    def add(self, states: Tensor) -> None:
        """Count states [N, D] as the head sees them."""
        probabilities = (states @ self.head.to(states.dtype).T).float().softmax(-1)
        mean = probabilities @ self.head.float()
        self.probabilities += probabilities.double().sum(0).cpu()
        self.means += (mean.T @ mean).double().cpu()

    @property
    def total(self) -> Tensor:
        """fp64 [D, D]."""
        head = self.head.cpu().double()
        return head.T @ (self.probabilities[:, None] * head) - self.means
