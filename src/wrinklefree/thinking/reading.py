"""What a language model's head reads in hidden states, true ones or others in their place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.objectives.losses import TokenLosses, token_losses


def read_logits(decoder: BodyAndHead, states: Tensor) -> Tensor:
    """The next word after states [..., D]: fp32 logits [..., V]."""
    operand, head = decoder.project(states)
    return F.linear(operand, head.to(operand.dtype)).float()


def compare_readings(decoder: BodyAndHead, states: Tensor, rebuilt: Tensor) -> TokenLosses:
    """The KL from what is read in states [N, D] to what is read in `rebuilt` [N, D], differentiable in `rebuilt`."""
    meant, head = decoder.project(states)
    said = decoder.project(rebuilt)[0]
    no_labels = torch.zeros(len(states), dtype=torch.long, device=states.device)
    return token_losses(
        said, head.to(said.dtype), no_labels, teacher=(meant, head.to(meant.dtype)), ce_weight=0.0, kl_weight=1.0
    )
