"""How near an exported model is to the trained one, where it cannot be the same to the bit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.export.proof import certify
from wrinklefree.export.proof.certify import CertificateError

LOGITS = 1e-5  # of the largest logit, where both work out the same products


@dataclass(frozen=True)
class Agreement:
    """Of logits over `tokens` tokens; KL(trained || exported) in nats per token."""

    tokens: int
    max_logit_difference: float  # relative to the largest logit; of the median sequence
    kl_mean: float
    same_top1: float

    def rows(self) -> list[list[str]]:
        """Lines of a table."""
        return [
            ["tokens compared", f"{self.tokens:,}"],
            ["largest difference of a logit, relative", f"{self.max_logit_difference:.1e}"],
            ["KL(trained, exported), nats", f"{self.kl_mean:.1e}"],
            ["same most likely token", f"{self.same_top1:.2%}"],
        ]


@torch.no_grad()
def compare(trained: PreTrainedModel, other: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Agreement:
    """Compare on `batches` (input_ids [B, L], perhaps position_ids), both in eval mode.

    The logit difference is that of the median sequence: rounding to int8 may go the other way at a single token, and
    all that follow it see the difference.
    """
    trained.eval()
    other.eval()
    sequences = list(certify._sequences(batches, trained.device))
    if not sequences:
        raise UserError("nothing to compare the exported model on: no text was given")
    figures = torch.cat([certify._figures(trained, other, inputs) for inputs in sequences])
    differences = torch.stack([_difference(trained, other, inputs) for inputs in sequences])
    kl, same = figures.mean(0).tolist()
    return Agreement(len(figures), differences.median().item(), kl, same)


def _difference(trained: PreTrainedModel, other: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    expected = certify._logits(trained, inputs)
    return (certify._logits(other, inputs) - expected).abs().max() / expected.abs().max()


def judge(agreement: Agreement, kl: float, what: str) -> None:
    """Raises CertificateError where the KL is above `kl` nats."""
    if not agreement.kl_mean <= kl:
        raise CertificateError(
            f"{what}: KL to the trained model is {agreement.kl_mean:.1e} nats per token (allowed {kl:g}): "
            f"this is not the trained model"
        )
