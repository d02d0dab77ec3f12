"""Measures how close an exported model is to the trained one, for formats that cannot hold it bit for bit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.export.proof.certify import CertificateError, logits_of, sequences_of, token_figures


@dataclass(frozen=True)
class Agreement:
    """How far the exported model's logits are from the trained model's, over `tokens` tokens."""

    tokens: int
    max_logit_difference: float  # relative to the largest logit; the median over sequences
    kl_mean: float  # KL(trained || exported) in nats per token
    same_top1: float  # share of tokens with the same likeliest next token

    def rows(self) -> list[list[str]]:
        """Return the figures as rows of a table, (name, value)."""
        return [
            ["tokens compared", f"{self.tokens:,}"],
            ["largest difference of a logit, relative", f"{self.max_logit_difference:.1e}"],
            ["KL(trained, exported), nats", f"{self.kl_mean:.1e}"],
            ["same most likely token", f"{self.same_top1:.2%}"],
        ]


@torch.no_grad()
def compare(trained: PreTrainedModel, other: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Agreement:
    """Compare both models on `batches` (input_ids [B, L], perhaps position_ids). Both are put into eval mode.

    Raises UserError if there is no text.
    """
    trained.eval()
    other.eval()
    figures, differences = [], []
    for inputs in sequences_of(batches, trained.device):
        expected, found = logits_of(trained, inputs), logits_of(other, inputs)
        figures.append(token_figures(expected, found))
        differences.append((found - expected).abs().max() / expected.abs().max())
    if not figures:
        raise UserError("nothing to compare the exported model on: no text was given")
    kl, same = torch.cat(figures).mean(0).tolist()
    # The median: at a single token, rounding to int8 may go the other way, and all later tokens then differ.
    return Agreement(len(torch.cat(figures)), torch.stack(differences).median().item(), kl, same)


def judge(agreement: Agreement, kl: float, what: str) -> None:
    """Raises CertificateError if the mean KL is above `kl` nats. `what` begins the message."""
    if not agreement.kl_mean <= kl:
        raise CertificateError(
            f"{what}: KL to the trained model is {agreement.kl_mean:.1e} nats per token (allowed {kl:g}): "
            f"this is not the trained model"
        )
