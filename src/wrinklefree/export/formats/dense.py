"""`--format dense`: a plain Hugging Face model for any tool, with the quantized weights written out.

Weights are exactly the trained ones, because they are stored in fp32. Activations are no longer rounded to int8: a
plain folder has no setting for that. Norms inside layers have no place either, so models with them are refused.
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
USE = """\
A plain model in fp32, for any tool that reads such folders. Its file is as large as that of the
unquantized model in fp32.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""

KL_WEIGHTS = 1e-6  # nats allowed: the computation is the same
KL_ACTIVATIONS = 0.05  # nats allowed if activations are no longer rounded


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
) -> list[list[str]]:
    """Write the folder, read it back and compare. Returns rows of a table.

    Raises UserError if a layer has a norm inside, CertificateError if the folder is not the trained model.
    """
    refuse_norms(model, "dense")
    dense_model(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    back: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).to(model.device)
    agreement = compare(model, back, batches)
    judge(agreement, KL_ACTIVATIONS if rounds_inputs(model) else KL_WEIGHTS, "--format dense")
    return agreement.rows()
