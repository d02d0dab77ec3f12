"""`--format hf`: the packed folder that transformers reads. docs/formats.md describes it.

The folder is written under a temporary name, read back, proved equal to the trained model, with the package and without
it, and only then renamed.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import written_aside
from wrinklefree.core.method import Coverage, QuantLinear, QuantMethod, coverage, keeps_effective, quant_layers
from wrinklefree.core.stack import Stack, open_stacks
from wrinklefree.export import bundle
from wrinklefree.export.proof import loader
from wrinklefree.export.proof.agreement import Agreement, compare
from wrinklefree.export.proof.certify import (
    Certificate,
    CertificateError,
    certify,
    logits_of,
    sequences_of,
    trained_layers,
)
from wrinklefree.export.rounded.head import Head, HeadBits
from wrinklefree.export.rounded.rounding import Rounding
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.pack import pack_layer, packed_layers
from wrinklefree.packed.products.choose import exactly
from wrinklefree.packed.quantizer import (
    PLAIN,
    WITH_HEAD,
    WITH_NORMS,
    WITH_ROTATION,
    WITH_STACKS,
    WrinkleFreeConfig,
    untie,
)
from wrinklefree.tracking.terminal import markdown_table, short_size

FLAG = "hf"
NEXT = "wf generate {target} --prompt {prompt}"
OPTIONS = {
    "head_bits": {
        "choices": [8, 4],
        "help": "hf: embedding and head as integers; default the run's export.head_bits, or bf16.",
    },
    "dense_dtype": {
        "choices": ["bfloat16", "float16", "float32"],
        "help": "hf: how embeddings, norms and biases are stored; default bfloat16.",
    },
}

DenseDtype = Literal["bfloat16", "float16", "float32"]

USE = """\
```bash
wf generate {name} --prompt {prompt}
wf serve {name}
```

```python
import wrinklefree  # teaches transformers the format; or leave it out and pass trust_remote_code=True
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without either, transformers does not know the format and stops with an error about the shapes of weights.
"""


@dataclass(frozen=True)
class PackedReport:
    """The sizes of a packed folder on disk, and the proof that it is the trained model."""

    num_parameters: int  # weights of the unpacked model, tied ones counted once
    num_quantized: int
    file_bytes: int  # all safetensors files, headers included
    linear_bytes: int  # codes, scales and tables of the quantized layers
    certificate: Certificate
    coverage: Coverage  # of the blocks' weights: how many are quantized
    rounding: Agreement | None  # the cost of rounding scales, embedding and head, if anything was rounded

    @property
    def bits_per_quantized_weight(self) -> float:
        """Codes, scales and tables, per quantized weight."""
        return 8 * self.linear_bytes / self.num_quantized

    @property
    def bits_per_weight(self) -> float:
        """The whole model: file size per parameter."""
        return 8 * self.file_bytes / self.num_parameters

    def rows(self) -> list[list[str]]:
        """Return the report as rows of a table, (name, value)."""
        proof, cost = self.certificate, self.rounding
        rounding = [] if cost is None else [["KL of what packing rounded, nats", f"{cost.kl_mean:.1e}"]]
        return [
            ["weights file", short_size(self.file_bytes)],
            ["quantized layers", short_size(self.linear_bytes)],
            ["bits per quantized weight", f"{self.bits_per_quantized_weight:.3f}"],
            ["of the blocks' weights, quantized", f"{self.coverage.share:.1%}"],
            ["bits per weight, whole model", f"{self.bits_per_weight:.3f}"],
            ["layers with identical codes", f"{proof.layers} of {proof.layers}"],
            ["KL(trained, packed), nats", f"{proof.kl_mean:.1e}"],
            ["same most likely token", f"{proof.same_top1:.2%}"],
            *rounding,
        ]

    def markdown(self) -> str:
        """Return the sizes as a table for the model card."""
        rows = [
            ["weights file", f"{self.file_bytes:,} bytes"],
            ["quantized layers in it", f"{self.linear_bytes:,} bytes"],
            ["bits per quantized weight, scales counted", f"{self.bits_per_quantized_weight:.4f}"],
            ["bits per weight, whole model", f"{self.bits_per_weight:.4f}"],
            ["parameters", f"{self.num_parameters:,}"],
            ["of these quantized", f"{self.num_quantized:,}"],
        ]
        return markdown_table(["size", "value"], rows)


def export_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: QuantMethod,
    out: Path,
    *,
    card: str,
    force: bool,
    batches: Iterable[Mapping[str, Tensor]],
    dense_dtype: DenseDtype = "bfloat16",
    head_bits: HeadBits | None = None,
    snap_scales: bool = True,
) -> PackedReport:
    """Write the trained `model` as a packed folder, certified on `batches` (input_ids [B, L], perhaps position_ids).

    card           the beginning of README.md; sizes and the certificate are added
    dense_dtype    of weights that are not quantized
    head_bits      of the integers for embedding and head; None stores them in `dense_dtype`
    snap_scales    move scales to the grid of the fast kernels

    Raises UserError if `out` exists and `force` is off, if the disk is full, or if the model cannot be packed;
    CertificateError if the packed model is not the trained one. After an error nothing is left.
    """
    if out.exists() and not force:
        raise UserError(f"{out}: exists already; choose another folder or give --force to replace it")
    with written_aside(out) as aside:
        return _write_proved(
            model,
            tokenizer,
            aside,
            list(batches),
            method=method,
            card=card,
            dense_dtype=dense_dtype,
            head_bits=head_bits,
            snap_scales=snap_scales,
        )


def from_run(config: Config, card: str, target: Path) -> dict[str, Any]:
    """Return the keyword arguments of `write` that come from a run; `target` is the final folder."""
    rounding = {"head_bits": config.export.head_bits, "snap_scales": config.export.snap_scales}
    return {"method": config.method, "card": card, **rounding}


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: Iterable[Mapping[str, Tensor]],
    dense_dtype: DenseDtype = "bfloat16",
    **settings: Any,
) -> list[list[str]]:
    """Write the packed folder with its card, and certify it. Returns rows of a table."""
    return _write_proved(model, tokenizer, folder, list(batches), dense_dtype=dense_dtype, **settings).rows()


def _write_proved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batches: list[Mapping[str, Tensor]],
    *,
    method: QuantMethod,
    card: str,
    dense_dtype: DenseDtype,
    head_bits: HeadBits | None,
    snap_scales: bool,
) -> PackedReport:
    _check_architecture(model)
    rounding = Rounding.of(model, head_bits, snap_scales)
    with rounding.applied(model):
        packed = pack_model(model, method, dense_dtype, rounding.head)
    _write(packed, tokenizer, [method, *([rounding.head.method] if rounding.head else [])], folder)
    back = _read_back(folder, model.device)
    if not keeps_effective(model):
        for layer in packed_layers(back).values():
            layer.register_forward_hook(_drop)
    with rounding.applied(model):
        certificate = certify(model, back, batches, getattr(torch, dense_dtype))
    with exactly(back):
        cost = compare(model, back, batches) if rounding.words else None
    _prove_loader(folder, back, batches)
    report = _report(packed, folder, certificate, coverage(model), cost)
    parts = [card, f"## Size\n\n{report.markdown()}\n"]
    parts.append(f"## Certificate\n\n{certificate.markdown()}\n")
    parts += [] if cost is None else [described(rounding.words, cost)]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
    return report


def _drop(layer: nn.Module, inputs: object, output: object) -> None:
    """A hook after which a packed layer does not keep its decoded weight."""
    assert isinstance(layer, PackedLinear)
    layer.dense = None


def described(words: list[str], cost: Agreement) -> str:
    """Return a section of the model card: what was rounded after training, and the cost of it."""
    how = (
        f"Rounded when the model was packed, not in training: {' and '.join(words)}. The certificate above is for the "
        "trained model with the same rounding; against the trained model as it was:"
    )
    return f"## Rounded when packed\n\n{how}\n\n{markdown_table(['', 'value'], cost.rows())}\n"


def _write(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, methods: list[QuantMethod], folder: Path
) -> None:
    # Under the model's own names: transformers converts those of hub files for its own classes, not for the loader's.
    packed.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    experts = any(isinstance(module, Stack) for module in packed.modules())
    bundle.write_loader(folder, methods, type(packed).__name__, experts)


def _read_back(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load the packed model as a user would, in fp32. Raises CertificateError if a tensor is missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    odd = sorted(info["missing_keys"] | info["unexpected_keys"])
    if odd:
        raise CertificateError(f"{odd[0]}: lost between writing and reading ({len(odd)} such tensors)")
    loaded: PreTrainedModel = model.to(device)
    return loaded


@torch.no_grad()
def _prove_loader(folder: Path, back: PreTrainedModel, batches: list[Mapping[str, Tensor]]) -> None:
    """Raises CertificateError if the folder's own loader, without this package, gives other logits than `back`."""
    cpu = torch.device("cpu")  # where the other process computes
    ids = next(sequences_of(batches, cpu))["input_ids"][:, : loader.TOKENS]
    with exactly(back.to(cpu)):
        loader.prove(folder, ids, logits_of(back, {"input_ids": ids}))


def _report(
    packed: PreTrainedModel, folder: Path, certificate: Certificate, covered: Coverage, cost: Agreement | None
) -> PackedReport:
    found, layers = packed_layers(packed), trained_layers(packed).values()
    num_quantized = sum(layer.out_features * layer.in_features for layer in layers)
    num_packed = sum(layer.out_features * layer.in_features for layer in found.values())
    return PackedReport(
        num_parameters=num_packed + sum(p.numel() for p in packed.parameters()),
        num_quantized=num_quantized,
        file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        linear_bytes=sum(buffer.nbytes for layer in layers for buffer in layer.buffers()),
        certificate=certificate,
        coverage=covered,
        rounding=cost,
    )


def _check_architecture(model: PreTrainedModel) -> None:
    """Raises UserError if the model's class is not part of transformers, which the folder's loader derives from."""
    name = type(model).__name__
    if not type(model).__module__.startswith("transformers.") or not hasattr(transformers, name):
        raise UserError(f"{name}: its code is not part of transformers, so a packed folder cannot refer to it")


def pack_model(
    model: PreTrainedModel, method: QuantMethod, dense_dtype: DenseDtype = "bfloat16", head: Head | None = None
) -> PreTrainedModel:
    """Return a model of the same class with packed layers, to save but not to run: some buffers stay on meta.

    Raises UserError if no layer is quantized, or if the class has no place for a weight.
    """
    dtype: torch.dtype = getattr(torch, dense_dtype)
    layers = {fqn: _pack_layer(fqn, layer, method, dtype) for fqn, layer in quant_layers(model).items()}
    if not layers:
        raise UserError(f"{type(model).__name__}: nothing in it is quantized, so there is nothing to pack")
    packed = _skeleton(model, method, layers, head)
    elsewhere = () if head is None else (*head.codes, *head.tied)
    dense = {n: t for n, t in _dense_state(model, dtype).items() if n.rpartition(".")[0] not in elsewhere}
    _, unexpected = packed.load_state_dict(dense, strict=False, assign=True)
    if unexpected:
        raise UserError(f"{unexpected[0]}: the packed format has no place for it ({len(unexpected)} such weights)")
    untie(packed, layers)
    packed.tie_weights(recompute_mapping=False)
    assert not any(tensor.is_meta for tensor in packed.state_dict().values())
    return packed


@torch.no_grad()
def _pack_layer(fqn: str, layer: QuantLinear, method: QuantMethod, dtype: torch.dtype) -> PackedLinear:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    try:
        eps = None if layer.rms_norm is None else layer.rms_norm.variance_epsilon
        config = method.config_for(fqn)
        return pack_layer(PackedLinear, config, layer.encode(), bias, eps, config.rotate_inputs is True)
    except ValueError as error:
        raise UserError(f"{fqn}.{error}") from error


def _skeleton(
    model: PreTrainedModel, method: QuantMethod, layers: Mapping[str, PackedLinear], head: Head | None
) -> PreTrainedModel:
    """Return a model that has only the packed `layers` and head as weights, and a config that says how to load it."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # `save_pretrained` leaves its name there, which Apertus cannot use
    if "lm_head" in layers or head is not None:
        config.tie_word_embeddings = False
    config.auto_map = {"AutoModelForCausalLM": f"{bundle.ENTRY}.{type(model).__name__}"}
    with torch.device("meta"):
        packed = type(model)(config)
    stacks = {fqn: len(module) for fqn, module in model.named_modules() if isinstance(module, Stack)}
    open_stacks(packed, stacks)
    for fqn, layer in layers.items():
        packed.set_submodule(fqn, layer)
    if head is not None:
        head.put_into(packed)
    specs = {fqn: _spec(layer) for fqn, layer in packed_layers(packed).items()}
    version = WITH_NORMS if any("norm_eps" in spec for spec in specs.values()) else PLAIN
    settings = WrinkleFreeConfig(_settings(method), specs, version if head is None else WITH_HEAD)
    if stacks:
        settings.stacks, settings.format = stacks, WITH_STACKS
    if method.rotate_inputs:
        settings.format = WITH_ROTATION
    if head is not None:
        settings.tied = head.tied
    packed.config.quantization_config = settings
    packed.generation_config = copy.deepcopy(model.generation_config)
    return packed


def _settings(method: QuantMethod) -> dict[str, Any]:
    """Return the method's settings, without the one that matters before a training alone."""
    return {name: value for name, value in dataclasses.asdict(method).items() if name != "allow_partial"}


def _spec(layer: PackedLinear) -> dict[str, Any]:
    """Return the layer's spec as JSON."""
    # Absent settings are left out, so that readers of version 1 can read layers without a norm.
    return {name: value for name, value in dataclasses.asdict(layer.spec).items() if value is not None}


def _dense_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all tensors outside quantized layers, and these layers' norms. Floating-point parameters get `dtype`."""
    inside = tuple(f"{fqn}." for fqn in quant_layers(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: tensor.to(dtype) if name in parameters and tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside) or name.endswith(".rms_norm.weight")
    }
