"""`--format dense`: a plain Hugging Face model with the quantized weights written out, for any tool.

The weights are what was trained, in fp32 so that they are so exactly; activations are no longer quantized, which such a
folder cannot say. Norms that stand inside of layers have no place in a plain model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.method import rounds_inputs
from wrinklefree.export.proof.agreement import compare, judge
from wrinklefree.export.views.dense import dense_model, refuse_norms

NEXT = "wf eval {target}"

KL_WEIGHTS, KL_ACTIVATIONS = 1e-6, 0.05  # nats: the same computation; without the trained rounding of activations


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
) -> list[list[str]]:
    """Write the folder, read it back and compare. Raises UserError for a model that no plain class can hold."""
    refuse_norms(model, "dense")
    dense_model(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    back: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device)
    agreement = compare(model, back, batches)
    judge(agreement, KL_ACTIVATIONS if rounds_inputs(model) else KL_WEIGHTS, "--format dense")
    return agreement.rows()
