"""`--format bitnet`: a checkpoint that transformers itself reads as BitNet, with four weights per byte.

transformers has two linear classes with opposite conventions. This format writes `bitlinear`.

| class | `weight_scale` | in memory |
|---|---|---|
| `bitlinear` | divides: it holds 1 / scale | packed |
| `autobitlinear` | multiplies | unpacked at load |
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.export.proof.agreement import Agreement, compare, judge
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.dense import unquantized_state
from wrinklefree.export.views.ternary import Ternary, one_scale, ternary_layers
from wrinklefree.families.bitnet import quantization_config

NEXT = "AutoModelForCausalLM.from_pretrained('{target}')"
USE = """\
transformers reads it by itself, as BitNet, and keeps the weights packed in memory.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

transformers compiles parts of BitNet. If that stops because the machine has no C++ compiler, call
`torch.compiler.set_stance("force_eager")` first.
"""

KL = 1e-3  # nats allowed: int8 rounding may go the other way at single tokens


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
) -> list[list[str]]:
    """Write the folder, read it back with transformers and compare. Returns rows of a table.

    Raises UserError if BitNet cannot hold the model, CertificateError if the folder is not the trained model.
    """
    layers = ternary_layers(model, "bitnet")
    eps = _check(model, layers)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # others find the class by it
    config.quantization_config = quantization_config(model, "bitlinear", "offline", eps is not None, eps or 1e-6)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save(model, layers, folder)
    with torch.compiler.set_stance("force_eager"):  # transformers compiles BitNet's functions, but needs a compiler
        return _read_back(model, layers, folder, batches).rows()


def _check(model: PreTrainedModel, layers: dict[str, Ternary]) -> float | None:
    """Return the epsilon of the norms inside layers, or None if there are none.

    Raises UserError if only some layers have a norm, if one has several scales or a number of rows that is no multiple
    of 4, or if the model was trained without int8 activations.
    """
    quantized = quant_layers(model)
    eps = {None if layer.rms_norm is None else layer.rms_norm.variance_epsilon for layer in quantized.values()}
    if len(eps) > 1:
        raise UserError(
            "--format bitnet: some layers have a norm inside and some do not (SubLN outside the Llama family), but "
            "BitNet has it in all layers or in none: train with method.norm_mode=per_linear, or use --format hf"
        )
    for fqn, layer in layers.items():
        one_scale(fqn, layer, "bitnet")
        if len(layer.codes) % 4:
            raise UserError(f"--format bitnet: {fqn} has {len(layer.codes)} rows, no multiple of 4: use --format hf")
    if not all(layer.config.int8_inputs for layer in quantized.values()):
        raise UserError(
            "--format bitnet: this model was trained without int8 activations, and BitNet always rounds them: "
            "train with method.activation_bits=8, or use --format dense"
        )
    return eps.pop()


def _save(model: PreTrainedModel, layers: dict[str, Ternary], folder: Path) -> None:
    from safetensors.torch import save_file

    state = unquantized_state(model, layers)
    for fqn, layer in layers.items():
        state[f"{fqn}.weight"] = pack(layer.codes)
        state[f"{fqn}.weight_scale"] = 1 / one_scale(fqn, layer, "bitnet").reshape(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def pack(codes: Tensor) -> Tensor:
    """Pack codes int8 [out, in] in {-1, 0, 1} into uint8 [out / 4, in]."""
    # With R = out / 4, byte row r holds the rows r, r + R, r + 2R and r + 3R of codes + 1, the first in the low bits.
    quarters = (codes + 1).to(torch.uint8).chunk(4)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack(packed: Tensor) -> Tensor:
    """Unpack uint8 [out / 4, in] into codes int8 [out, in] in {-1, 0, 1}."""
    return torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)]).to(torch.int8) - 1


def _read_back(
    model: PreTrainedModel, layers: dict[str, Ternary], folder: Path, batches: Iterable[Mapping[str, Tensor]]
) -> Agreement:
    back, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    odd = sorted(info["missing_keys"] | info["unexpected_keys"])
    if odd:
        raise CertificateError(f"{odd[0]}: transformers has no place for it, or misses it ({len(odd)} such tensors)")
    for fqn, layer in layers.items():
        if not torch.equal(unpack(back.get_submodule(fqn).weight.cpu()), layer.codes.cpu()):
            raise CertificateError(f"{fqn}: codes differ after reading back")
    agreement = compare(model, back.to(model.device), batches)
    judge(agreement, KL, "--format bitnet")
    return agreement
