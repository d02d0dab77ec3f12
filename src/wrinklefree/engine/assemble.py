"""Build the native decoder's model from a source of weights that have transformers' names."""

from typing import Any

import torch
from torch import Tensor, nn

from wrinklefree.core.errors import UserError
from wrinklefree.core.forms import Complex, Integers, rounded
from wrinklefree.engine import family
from wrinklefree.engine.binding import Floats, Layer, Linear, Mode, Model
from wrinklefree.engine.source import Source
from wrinklefree.families.architectures import ATTENTION, MLP, SUB_NORMS
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.products import native
from wrinklefree.packed.products.choose import method_layer

HOMES = {name.removesuffix("_proj"): f"self_attn.{name}" for name in ATTENTION}
HOMES |= {name.removesuffix("_proj"): f"mlp.{name}" for name in MLP}
BITNET_NORMS = {HOMES[name.removesuffix("_proj")]: norm for name, norm in SUB_NORMS.items()}


def assemble(source: Source, mode: Mode) -> Model:
    """Read all weights of `source` into the decoder's structures. `family.supports` must have accepted its config.

    Raises UserError if a weight is missing or has the wrong shape.
    """
    values = source.config.to_dict()
    sizes = family.sizes(values)
    frequencies, rope_scale = family.frequencies(source.config)
    embedding = source.embedding("model.embed_tokens", (sizes["vocab"], sizes["hidden"]))
    tied = values["tie_word_embeddings"]
    head = Linear(_table(embedding)) if tied else _head(source, sizes, mode)
    return Model(
        sizes=sizes,
        eps=values["rms_norm_eps"],
        frequencies=frequencies,
        rope_scale=rope_scale,
        activation=values["hidden_act"],
        embedding=head.matrix if tied or embedding is None else _table(embedding),
        norm=_floats(source.numbers("model.norm.weight", (sizes["hidden"],))),
        head=head,
        layers=[_layer(source, values, sizes, index, mode) for index in range(sizes["num_layers"])],
    )


def _table(embedding: Tensor | PackedLinear | None) -> native.Matrix:
    assert embedding is not None, "an embedding tied to a packed head is not tied in the config"
    if isinstance(embedding, PackedLinear):
        return _matrix(embedding, exact=True)
    return native.Matrix.dense(embedding, exact=not _is_bf16(embedding))


def _head(source: Source, sizes: dict[str, int], mode: Mode) -> Linear:
    return _linear("lm_head", source.linear("lm_head", (sizes["vocab"], sizes["hidden"]), bias=False), mode)


def _layer(source: Source, values: dict[str, Any], sizes: dict[str, int], index: int, mode: Mode) -> Layer:
    prefix = f"model.layers.{index}."
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    q, kv = sizes["heads"] * sizes["head_dim"], sizes["kv_heads"] * sizes["head_dim"]
    shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    linears = {}
    for name, shape in shapes.items():
        fqn = f"{prefix}{HOMES[name]}"
        layer = source.linear(fqn, shape, bias=source.has(f"{fqn}.bias"))
        linears[name] = _linear(fqn, layer, mode, _sub_norm(source, prefix, name, shape[1]), values["rms_norm_eps"])
    norms = {
        "attention_norm": _floats(source.numbers(f"{prefix}input_layernorm.weight", (hidden,))),
        "mlp_norm": _floats(source.numbers(f"{prefix}post_attention_layernorm.weight", (hidden,))),
    }
    for name in ("q_norm", "k_norm"):
        if source.has(f"{prefix}self_attn.{name}.weight"):
            norms[name] = _floats(source.numbers(f"{prefix}self_attn.{name}.weight", (sizes["head_dim"],)))
    return Layer(linears, norms, family.has_positions(values, index), family.window(values, index))


def _sub_norm(source: Source, prefix: str, name: str, width: int) -> Floats | None:
    """The gain of BitNet's norm before the layer `name`, or None if there is no such norm."""
    home = HOMES[name]
    norm = f"{prefix}{home.rpartition('.')[0]}.{BITNET_NORMS[home]}.weight" if home in BITNET_NORMS else ""
    return _floats(source.numbers(norm, (width,))) if source.has(norm) else None


def _linear(
    fqn: str, layer: nn.Linear | PackedLinear, mode: Mode, gain: Floats | None = None, eps: float = 0.0
) -> Linear:
    exact = mode == "exact"
    if not isinstance(layer, PackedLinear):
        dense = native.Matrix.dense(layer.weight, layer.bias, exact=exact or not _is_bf16(layer.weight))
        return Linear(dense, gain, eps)
    if layer.rms_norm is not None:
        assert gain is None, "one norm for the inputs of a layer"
        gain, eps = _floats(layer.rms_norm.weight), layer.rms_norm.variance_epsilon
    try:
        return Linear(_matrix(layer, exact), gain, eps, layer.method.int8_inputs, bool(layer.spec.rotated))
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        # The file has codes and scales whose shapes do not belong together. torch or the library names the mismatch.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{fqn}: its codes do not fit its method ({reason}): export it again") from error


def _matrix(layer: PackedLinear, exact: bool) -> native.Matrix:
    """The layer's weight and bias as a matrix.

    If no form fits, the weight is decoded: to fp32 if `exact`, else to int8. A form fits if it has the layer's shape,
    and, if `exact`, is not a rounded weight.
    """
    codes = layer.codes()
    form = method_layer(layer).form(codes)
    folded = isinstance(form, Integers) and codes.bits < 8
    padded = isinstance(form, Complex) and bool(codes.shape[0] % 2 or codes.shape[1] % 2)
    if form is not None and not padded and not (exact and folded):
        return native.matrix(form, layer.bias)
    weight = layer.method.decode(codes)
    return native.Matrix.dense(weight, layer.bias, exact=True) if exact else native.matrix(rounded(weight), layer.bias)


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.detach().float().contiguous().numpy()
    return values
