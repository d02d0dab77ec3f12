"""Proves that a packed model is the trained one, by two comparisons, and measures what storing it costs.

| compared | has to be |
|---|---|
| codes, scales and tables of every layer, and effective weights | equal, bit for bit |
| all other parameters | the trained ones rounded to the dtype they are stored in, bit for bit |
| logits at equal rounding: both models with the stored embeddings and norms | equal up to `LOGITS`, the order of sums |
| KL(trained || packed) per token and the likeliest token, against the trained model as it was | only reported |

The last row is about the model, not about the packing: one that is still noise moves a lot if its norms are rounded to
bf16. Above `LARGE_KL` nats, which change perplexity by a tenth of a percent, a warning says so.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from wrinklefree.core.batch import model_inputs
from wrinklefree.core.codes import Codes
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, quant_layers
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.pack import packed_layers
from wrinklefree.packed.products.choose import exactly
from wrinklefree.tracking.terminal import markdown_table

log = logging.getLogger("wrinklefree")

LOGITS = 1e-4  # relative to the largest absolute logit
LARGE_KL = 1e-3  # nats per token
CERTIFY_TOKENS = 8192  # held-out tokens that an export is compared on
CHUNK = 256  # tokens whose logits are compared at once
NO_CACHE = {"use_cache": False}
# Sequences compared at equal rounding. Few, because exchanged dense weights make layers with biases encode anew.
EXACT = 4


class CertificateError(UserError):
    """The packed model is not the trained one."""


@dataclass(frozen=True)
class Certificate:
    """The results of the comparisons, over `tokens` tokens."""

    layers: int
    tokens: int
    max_weight_difference: float
    max_logit_difference: float  # at equal rounding, relative to the largest logit
    kl_mean: float  # nats per token, against the fp32 trained model
    kl_max: float
    same_top1: float  # share of tokens

    def markdown(self) -> str:
        """Return a table for the model card."""
        rows = [
            ["layers with identical codes and scales", f"{self.layers} of {self.layers}"],
            ["largest difference of an effective weight", f"{self.max_weight_difference:g}"],
            ["largest difference of a logit at equal rounding, relative", f"{self.max_logit_difference:.1e}"],
            ["KL(trained, packed) in nats per token, mean / largest", f"{self.kl_mean:.1e} / {self.kl_max:.1e}"],
            ["same most likely token", f"{self.same_top1:.2%}"],
            ["tokens compared", f"{self.tokens:,}"],
        ]
        return markdown_table(["packed against trained", "value"], rows)


def certify(
    trained: PreTrainedModel,
    packed: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    dense_dtype: torch.dtype = torch.bfloat16,
) -> Certificate:
    """Compare the models on `batches` (input_ids [B, L], perhaps position_ids). Both compute in fp32, in eval mode.

    `dense_dtype` is that of stored weights which are not quantized.
    Raises CertificateError if a code, scale or other weight differs, or if logits at equal rounding differ by more
    than `LOGITS`. Warns if the KL to the trained model is large.
    """
    modes = trained.training, packed.training
    try:
        with exactly(packed):  # the proof is about weights, and fast kernels also round activations
            return _certify(trained.eval(), packed.eval(), batches, dense_dtype)
    finally:
        trained.train(modes[0])
        packed.train(modes[1])


@torch.no_grad()
def _certify(
    trained: PreTrainedModel,
    packed: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    dense_dtype: torch.dtype,
) -> Certificate:
    if packed.dtype != torch.float32:
        raise ValueError(f"load the packed model with dtype=torch.float32 to certify it, not {packed.dtype}")
    weight_difference = _compare_layers(quant_layers(trained), trained_layers(packed))
    _compare_others(trained, packed, dense_dtype)
    sequences = list(sequences_of(batches, trained.device))
    if not sequences:
        raise UserError("nothing to compare the packed model on: no text was given")
    logit_difference = max(_logit_difference(trained, packed, inputs) for inputs in sequences[:EXACT])
    figures = torch.cat([token_figures(logits_of(trained, x), logits_of(packed, x)) for x in sequences])
    mean, largest = figures.mean(0).tolist(), figures.amax(0).tolist()
    certificate = Certificate(
        layers=len(trained_layers(packed)),
        tokens=len(figures),
        max_weight_difference=weight_difference,
        max_logit_difference=logit_difference,
        kl_mean=mean[0],
        kl_max=largest[0],
        same_top1=mean[1],
    )
    _judge(certificate)
    return certificate


def trained_layers(packed: PreTrainedModel) -> dict[str, PackedLinear]:
    """Return the packed layers that were trained as such: all but embedding and head, which packing rounds."""
    return {fqn: layer for fqn, layer in packed_layers(packed).items() if layer.spec.method is None}


def _logit_difference(trained: PreTrainedModel, packed: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    """Return the largest difference of a logit at equal rounding, relative to the largest logit."""
    rounded = _dense_weights(packed, trained)
    expected = functional_call(trained, rounded, kwargs=inputs | NO_CACHE, tie_weights=False).logits
    difference: Tensor = (logits_of(packed, inputs) - expected).abs().max() / expected.abs().max()
    return difference.item()


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits [1, L, V]."""
    # With a cache, transformers would not use restarting position_ids to keep packed documents apart.
    logits: Tensor = model(**inputs, **NO_CACHE).logits
    return logits


def _dense_weights(packed: nn.Module, trained: nn.Module) -> dict[str, Tensor]:
    """Return the packed model's parameters, none of which is quantized, under the trained model's names."""
    names = {name for name, _ in trained.named_parameters(remove_duplicate=False)}
    return {name: p for name, p in packed.named_parameters(remove_duplicate=False) if name in names}


def token_figures(trained: Tensor, packed: Tensor) -> Tensor:
    """Return per token KL(trained || packed) in nats, and 1 if the likeliest next token is the same: fp64 [L, 2].

    Both are logits [1, L, V].
    """
    chunks = zip(torch.split(trained[0], CHUNK), torch.split(packed[0], CHUNK), strict=True)
    return torch.cat([torch.stack([_kl(p, q), (p.argmax(-1) == q.argmax(-1)).double()], -1) for p, q in chunks])


def _judge(certificate: Certificate) -> None:
    if not certificate.max_logit_difference <= LOGITS:
        raise CertificateError(
            f"packed logits differ by {certificate.max_logit_difference:.1e} of the largest at equal rounding "
            f"(allowed {LOGITS:g}): the packed model is not the trained one"
        )
    if not certificate.kl_mean <= LARGE_KL:
        log.warning(
            "storing norms, embeddings and biases in fewer bits changes this model: KL(trained, packed) is %.1e nats "
            "per token, the likeliest token is the same for %.1f %%. A model after a few steps is noise, and moves so; "
            "wf export RUN --format hf --dense-dtype float32 stores them as they are",
            certificate.kl_mean,
            100 * certificate.same_top1,
        )


def sequences_of(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield one sequence [1, L] at a time, so that the logits of a large vocabulary fit into memory."""
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            yield {name: tensor[row : row + 1].to(device) for name, tensor in model_inputs(batch).items()}


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """Return KL(reference || other) for logits [L, V]: [L] in nats. Computed in fp64, because it is tiny."""
    p, q = F.log_softmax(reference.double(), -1), F.log_softmax(other.double(), -1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).clamp_min(0)


def _compare_layers(trained: Mapping[str, QuantLinear], packed: Mapping[str, PackedLinear]) -> float:
    """Return the largest difference of an effective weight.

    Raises CertificateError if the models have different quantized layers, or layers with different codes or scales.
    """
    if trained.keys() != packed.keys():
        odd = sorted(trained.keys() ^ packed.keys())
        raise CertificateError(f"quantized in one model only: {', '.join(odd[:3])} ({len(odd)} layers in all)")
    wrong = [fqn for fqn in trained if not same_codes(trained[fqn].encode(), packed[fqn].codes())]
    if wrong:
        raise CertificateError(
            f"codes or scales differ in {', '.join(wrong[:3])} ({len(wrong)} of {len(trained)} layers)"
        )
    return max((_weight_difference(trained[fqn], packed[fqn]) for fqn in trained), default=0.0)


def _compare_others(trained: PreTrainedModel, packed: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises CertificateError if a parameter of `packed` is not the trained one, rounded to `dtype`.

    The weight of an embedding or head that packing rounds to integers has to be what `trained` computes with.
    """
    stored = dict(packed.named_parameters(remove_duplicate=False))
    own = dict(trained.named_parameters(remove_duplicate=False))
    wrong = [n for n in stored.keys() & own.keys() if not torch.equal(stored[n], own[n].to(dtype).float())]
    heads = {fqn: layer for fqn, layer in packed_layers(packed).items() if layer.spec.method is not None}
    wrong += [fqn for fqn, layer in heads.items() if not torch.equal(layer.decoded(), own[f"{fqn}.weight"].float())]
    if wrong:
        raise CertificateError(f"{sorted(wrong)[0]}: not as trained ({len(wrong)} such weights that are not quantized)")


def _weight_difference(trained: QuantLinear, packed: PackedLinear) -> float:
    exact = trained.quantized_weight() - packed.decoded()  # not kept: of all layers it would be the whole model
    return exact.abs().max().item()


def same_codes(a: Codes, b: Codes) -> bool:
    """Whether shapes, codes and scales are equal, bit for bit."""
    return (
        (a.shape, a.bits, a.tensors.keys()) == (b.shape, b.bits, b.tensors.keys())
        and torch.equal(a.index, b.index)
        and all(torch.equal(a.tensors[name].float(), b.tensors[name].float()) for name in a.tensors)
    )
