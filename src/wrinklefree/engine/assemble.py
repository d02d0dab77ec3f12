"""Build the native decoder's model from a source of weights that have transformers' names."""

import numpy as np
import torch
from torch import Tensor, nn

from wrinklefree.core.errors import UserError
from wrinklefree.core.forms import Complex, Integers, rounded
from wrinklefree.engine import family
from wrinklefree.engine.binding import EXPERT, Floats, Layer, Linear, Mode, Model
from wrinklefree.engine.layouts import APART, EXPERTS, ROUTER, TOGETHER
from wrinklefree.engine.source import Source
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.products import native
from wrinklefree.packed.products.choose import method_layer


def assemble(source: Source, mode: Mode) -> Model:
    """Read all weights of `source` into the decoder's structures. `family.supports` must have accepted its config.

    Raises UserError if a weight is missing or has the wrong shape.
    """
    return _Assembly(source, mode).model()


class _Assembly:
    """What all layers are read with."""

    def __init__(self, source: Source, mode: Mode) -> None:
        self.source, self.mode = source, mode
        self.layout, self.values = family.layout_of(source.config), family.settings(source.config)
        self.sizes = family.sizes(self.values, self.layout)

    def model(self) -> Model:
        """The whole model."""
        source, layout, sizes, values = self.source, self.layout, self.sizes, self.values
        embedding = source.embedding(layout.embedding, (sizes["vocab"], sizes["hidden"]))
        tied = values["tie_word_embeddings"]
        head = Linear(_table(embedding)) if tied else self._head()
        ropes = family.frequencies(source.config)
        return Model(
            sizes=sizes,
            eps=values["rms_norm_eps"],
            frequencies=[frequencies for frequencies, _ in ropes],
            rope_scales=[scale for _, scale in ropes],
            activation=values["hidden_act"],
            embedding=head.matrix if tied or embedding is None else _table(embedding),
            norm=self._gain(f"{layout.norm}.weight", sizes["hidden"]),
            shift=self._floats(f"{layout.norm}.bias", sizes["hidden"]) if layout.layer_norm else None,
            head=head,
            layers=[self._layer(index) for index in range(sizes["num_layers"])],
            layer_norm=layout.layer_norm,
            embedding_scale=sizes["hidden"] ** 0.5 if layout.scaled_embedding else 1.0,
            positions=self._positions(),
            share_of_chosen=family.shares(values, layout),
        )

    def _head(self) -> Linear:
        shape = (self.sizes["vocab"], self.sizes["hidden"])
        return _linear("lm_head", self.source.linear("lm_head", shape, bias=False), self.mode)

    def _positions(self) -> native.Matrix | None:
        if self.layout.positions is None:
            return None
        shape = (self.values["max_position_embeddings"], self.sizes["hidden"])
        return native.Matrix.dense(self.source.numbers(f"{self.layout.positions}.weight", shape), exact=True)

    def _layer(self, index: int) -> Layer:
        prefix = f"{self.layout.layers}.{index}."
        experts = family.has_experts(self.values, self.layout, index)
        linears = {
            name: self._linear_of(prefix, name, shape)
            for name, shape in self._shapes(self.sizes["intermediate"]).items()
            if not (experts and name in EXPERT)
        }
        if experts:
            linears["router"] = self._router(prefix)
        return Layer(
            linears,
            self._norms(prefix),
            family.scale(self.values),
            family.rope(self.values, self.layout, index),
            family.window(self.values, self.layout, index),
            self._experts(prefix) if experts else (),
        )

    def _shapes(self, inner: int) -> dict[str, tuple[int, int]]:
        """The shape of each linear layer that the layout names, one for several together as well."""
        sizes, names = self.sizes, self.layout.linears
        hidden, q, kv = sizes["hidden"], *(sizes[n] * sizes["head_dim"] for n in ("heads", "kv_heads"))
        shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        if "k" not in names:
            shapes["q"] = (q + 2 * kv, hidden)
        if "up" not in names and self.layout.gated:
            shapes["gate"] = (2 * inner, hidden)
        return {name: shapes[name] for name in names}

    def _linear_of(self, prefix: str, name: str, shape: tuple[int, int]) -> Linear:
        fqn = f"{prefix}{self.layout.linears[name]}"
        bias = self.source.has(f"{fqn}.bias")
        layer = self.source.linear(fqn, shape, bias, self.layout.turned)
        return _linear(fqn, layer, self.mode, self._sub_norm(fqn, name, shape[1]), self.values["rms_norm_eps"])

    def _sub_norm(self, fqn: str, name: str, width: int) -> Floats | None:
        """The gain of BitNet's norm before the layer `name`, or None if there is no such norm."""
        norm = f"{fqn.rpartition('.')[0]}.{self.layout.sub_norms.get(name)}.weight"
        return self._floats(norm, width) if self.source.has(norm) else None

    def _norms(self, prefix: str) -> dict[str, Floats]:
        found = {}
        for name, weight in self.layout.norms.items():
            width = self.sizes["head_dim" if name in ("q_norm", "k_norm") else "hidden"]
            if name in ("q_norm", "k_norm") and not self.source.has(f"{prefix}{weight}"):
                continue
            read = self._floats if name.endswith("_shift") else self._gain
            found[name] = read(f"{prefix}{weight}", width)
        return found

    def _router(self, prefix: str) -> Linear:
        """A router chooses by small differences, so it is never rounded."""
        shape = (self.sizes["num_experts"], self.sizes["hidden"])
        weight = self.source.numbers(f"{prefix}{ROUTER}", shape)
        return Linear(native.Matrix.dense(weight, exact=True))

    def _experts(self, prefix: str) -> list[dict[str, Linear]]:
        home, hidden, inner = f"{prefix}{EXPERTS}", self.sizes["hidden"], self.sizes["expert_intermediate"]
        apart = self.source.has(f"{home}.0.{APART['gate']}.weight")
        found = []
        for number in range(self.sizes["num_experts"]):
            if apart:
                shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
                names = {name: f"{home}.{number}.{APART[name]}" for name in shapes}
                read = {name: self.source.linear(names[name], shape, bias=False) for name, shape in shapes.items()}
            else:
                shapes = {"gate": (2 * inner, hidden), "down": (hidden, inner)}
                names = {name: f"{home}.{TOGETHER[name]}" for name in shapes}
                read = {name: self.source.expert(names[name], number, shape) for name, shape in shapes.items()}
            found.append({name: _linear(names[name], layer, self.mode) for name, layer in read.items()})
        return found

    def _gain(self, name: str, width: int) -> Floats:
        return self._floats(name, width) + np.float32(1.0 if self.layout.gain_above_one else 0.0)

    def _floats(self, name: str, width: int) -> Floats:
        return _floats(self.source.numbers(name, (width,)))


def _table(embedding: Tensor | PackedLinear | None) -> native.Matrix:
    assert embedding is not None, "an embedding tied to a packed head is not tied in the config"
    if isinstance(embedding, PackedLinear):
        return _matrix(embedding, exact=True)
    return native.Matrix.dense(embedding, exact=not _is_bf16(embedding))


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
