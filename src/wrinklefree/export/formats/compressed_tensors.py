"""`--format compressed-tensors`: ternary weights as 2-bit symmetric integers, which vLLM reads.

Each linear layer becomes `weight_packed` (int32, 16 codes per word), `weight_scale` and `weight_shape`. There is one
scale per row ("channel") or per group of columns. Int8 activations become dynamic rounding per token.
"""

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import rounds_inputs
from wrinklefree.export.proof.agreement import compare, judge
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.dense import refuse_norms, unquantized_state
from wrinklefree.export.views.ternary import Ternary, ternary_layers

NEEDS = "compressed_tensors"
NEXT = "vllm serve {target}"
USE = """\
transformers reads it with the package `compressed-tensors`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

It was read back in this way. It is meant for vLLM, `vllm serve {name}`, which has kernels for 2 bits on CUDA GPUs only.
No GPU has run it yet.
"""

# Nats allowed. The library scales int8 activations by max|x| / 127.5 and training by max|x| / 127: close, not equal.
KL = 0.02


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
) -> list[list[str]]:
    """Write the folder, read it back with transformers and compare. Returns rows of a table.

    Raises UserError if the format cannot hold the model, CertificateError if the folder is not the trained model.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    if isinstance(model, BitNetForCausalLM):
        raise UserError(
            "--format compressed-tensors: vLLM has no class with SubLN: train with method.norm_mode=none, or use "
            "--format bitnet or gguf"
        )
    refuse_norms(model, "compressed-tensors")
    if get_model_conversion_mapping(model, add_legacy=False):
        raise UserError(
            f"--format compressed-tensors: transformers has weights of {type(model).__name__} under other names than "
            f"vLLM reads (experts, or GPT-NeoX): use --format hf or dense"
        )
    layers = ternary_layers(model, "compressed-tensors")
    packed = {f"{fqn}.weight_packed": pack_to_int32(layer.codes, 2) for fqn, layer in layers.items()}
    _save(model, tokenizer, layers, packed, folder)
    for fqn, layer in layers.items():
        if not torch.equal(unpack_from_int32(packed[f"{fqn}.weight_packed"], 2, layer.codes.shape), layer.codes):
            raise CertificateError(f"{fqn}: codes differ after packing")
    back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).to(model.device)
    agreement = compare(model, back, batches)
    judge(agreement, KL, "--format compressed-tensors")
    return agreement.rows()


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: dict[str, Ternary],
    packed: dict[str, Tensor],
    folder: Path,
) -> None:
    from safetensors.torch import save_file

    state = unquantized_state(model, layers) | packed
    for fqn, layer in layers.items():
        state[f"{fqn}.weight_scale"] = layer.scales.expand(len(layer.codes), -1).contiguous()
        state[f"{fqn}.weight_shape"] = torch.tensor(layer.codes.shape)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # others find the class by it
    config.quantization_config = scheme(model, layers)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def scheme(model: PreTrainedModel, layers: dict[str, Ternary]) -> dict[str, Any]:
    """Return the `quantization_config`. Raises UserError if layers differ in the granularity of their scales."""
    sizes = {layer.codes.shape[1] // layer.scales.shape[1] for layer in layers.values() if layer.scales.shape[1] > 1}
    kinds = {json.dumps(_weights(layer, sizes), sort_keys=True) for layer in layers.values()}
    if len(kinds) > 1:
        raise UserError(
            "--format compressed-tensors: layers differ in the granularity of their scales: use --format hf"
        )
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": json.loads(kinds.pop()),
        "input_activations": inputs if rounds_inputs(model) else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [fqn for fqn, module in model.named_modules() if type(module) is nn.Linear],
    }


def _weights(layer: Ternary, group_sizes: set[int]) -> dict[str, Any]:
    """Return the arguments of a layer's integers. `group_sizes` are those of the layers with several groups a row."""
    # A scale for the whole tensor is repeated for each row: vLLM knows pack-quantized weights by channel or group only.
    columns, groups = layer.codes.shape[1], layer.scales.shape[1]
    kind: dict[str, Any] = {"strategy": "channel"}
    if groups > 1 or columns in group_sizes:  # a row that is one group wide
        kind = {"strategy": "group", "group_size": columns // groups}
    return {"num_bits": 2, "type": "int", "symmetric": True, "dynamic": False, **kind}
