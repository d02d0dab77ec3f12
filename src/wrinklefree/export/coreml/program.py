"""Writes a decoder as a Core ML program: MIL for iOS 18, in the layout that the Neural Engine wants.

| part | how it is written |
|---|---|
| activations | fp16 [1, channels, 1, S] |
| linear layer | a 1x1 convolution with a weight [out, in, 1, 1] |
| quantized layer of rank r | y = sum_k a_k * (Q (b_k * x)), with Q = constexpr_lut_to_dense(codes, lut) |
| quantized layer, r above `factored` | its effective weight Q * (a b) as an fp16 constant ("baked") |
| cache | two states [layers, kv heads, context, head width]; a step writes S columns at `position` |

Inputs: input_ids int32 [1, S], and position int32 [1], the position of the first id.
Output: logits fp16 [1, S, vocabulary].
Padding after the end of a text does no harm: its columns are overwritten before a later id can see them.
"""

from collections.abc import Mapping
from typing import Any

import coremltools as ct
import numpy as np
import numpy.typing as npt
import torch
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its name in all of its documentation
from coremltools.converters.mil.mil import Function, Program, types
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.core.method import QuantLinear
from wrinklefree.export.views.decoder import Sizes
from wrinklefree.export.views.lut import Palette
from wrinklefree.families.bitnet import norm_beside

Var = Any  # a value of the program; coremltools has no annotations
Array = npt.NDArray[Any]

HIDDEN_LOGIT = -3e4  # added to the scores of later columns; fp16 ends at -65504
INDEX_TYPES = {2: types.np_uint2_dtype, 3: types.np_uint3_dtype, 4: types.np_uint4_dtype}


@torch.no_grad()
def build_program(
    model: PreTrainedModel, layers: Mapping[str, Palette], sizes: Sizes, length: int, factored: int
) -> Program:
    """Return the program for `length` ids at a time. Layers of a rank above `factored` are baked."""
    cache = (sizes.layers, sizes.kv_heads, sizes.context, sizes.head_dim)
    inputs = {
        "input_ids": mb.placeholder((1, length), dtype=types.int32),
        "position": mb.placeholder((1,), dtype=types.int32),
        "k_cache": mb.state_tensor_placeholder(cache, dtype=types.fp16),
        "v_cache": mb.state_tensor_placeholder(cache, dtype=types.fp16),
    }
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        builder = _Decoder(model, layers, sizes, length, factored, function.inputs)
        function.set_outputs([builder.logits()])
    result = Program()
    result.add_function("main", function)
    return result


class _Decoder:
    """Adds the operations of one forward pass to the MIL function that is open."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, Palette],
        sizes: Sizes,
        length: int,
        factored: int,
        inputs: Mapping[str, Var],
    ) -> None:
        self.model, self.layers, self.sizes, self.length, self.factored = model, layers, sizes, length, factored
        self.input_ids, self.position = inputs["input_ids"], inputs["position"]
        self.states = {"k": inputs["k_cache"], "v": inputs["v_cache"]}
        # Read once, then hand the value from update to update: coremltools merges two reads of a state into one.
        self.caches = {part: mb.read_state(input=state) for part, state in self.states.items()}
        self.end = mb.add(x=self.position, y=np.int32(length))
        self.cos, self.sin = (self._at_position(table) for table in rotary_tables(model, sizes.context))
        self.mask = self._mask()

    def logits(self) -> Var:
        """Return the logits, fp16 [1, S, vocabulary]."""
        table = mb.const(val=half(self.model.model.embed_tokens.weight), name="embed_tokens")
        x = mb.gather(x=table, indices=self.input_ids, axis=0)
        x = mb.expand_dims(x=mb.transpose(x=x, perm=[0, 2, 1]), axes=[2])
        for number in range(self.sizes.layers):
            x = self._block(x, number)
        x = _flat(_rms_norm(x, self.model.model.norm))
        if "lm_head" in self.layers:
            x = mb.expand_dims(x=mb.transpose(x=x, perm=[0, 2, 1]), axes=[2])
            return mb.identity(x=_flat(self._linear(x, "lm_head")), name="logits")
        if not self.model.config.tie_word_embeddings:
            table = mb.const(val=half(self.model.lm_head.weight), name="lm_head")
        return mb.matmul(x=x, y=table, transpose_y=True, name="logits")

    def _block(self, x: Var, number: int) -> Var:
        prefix = f"model.layers.{number}"
        block = self.model.get_submodule(prefix)
        normed = _rms_norm(x, block.get_submodule("input_layernorm"))
        x = mb.add(x=x, y=self._attention(normed, f"{prefix}.self_attn", number))
        normed = _rms_norm(x, block.get_submodule("post_attention_layernorm"))
        gate = mb.silu(x=self._linear(normed, f"{prefix}.mlp.gate_proj"))
        product = mb.mul(x=gate, y=self._linear(normed, f"{prefix}.mlp.up_proj"))
        return mb.add(x=x, y=self._linear(product, f"{prefix}.mlp.down_proj"))

    def _attention(self, x: Var, prefix: str, number: int) -> Var:
        s = self.sizes
        groups = s.heads // s.kv_heads
        q = self._rotated(self._heads(x, prefix, "q", s.heads))
        k = self._rotated(self._heads(x, prefix, "k", s.kv_heads))
        keys = self._remembered("k", k, number)
        values = self._remembered("v", self._heads(x, prefix, "v", s.kv_heads), number)
        q = mb.mul(x=q, y=np.float16(s.head_dim**-0.5))
        q = mb.reshape(x=q, shape=[s.kv_heads, groups, s.head_dim, self.length])
        scores = mb.matmul(x=q, y=keys, transpose_x=True, transpose_y=True)  # [kv heads, groups, S, context]
        weights = mb.softmax(x=mb.add(x=scores, y=self.mask), axis=-1)
        mixed = mb.matmul(x=values, y=weights, transpose_x=True, transpose_y=True)  # [kv heads, groups, width, S]
        mixed = mb.reshape(x=mixed, shape=[1, s.heads * s.head_dim, 1, self.length])
        return self._linear(mixed, f"{prefix}.o_proj")

    def _heads(self, x: Var, prefix: str, part: str, heads: int) -> Var:
        """Return queries, keys or values [1, heads, head width, S]. In Qwen3, queries and keys have a norm per head."""
        y = self._linear(x, f"{prefix}.{part}_proj")
        y = mb.reshape(x=y, shape=[1, heads, self.sizes.head_dim, self.length])
        if f"{part}_norm" in dict(self.model.get_submodule(prefix).named_children()):
            y = _rms_norm(y, self.model.get_submodule(f"{prefix}.{part}_norm"), axis=2)
        return y

    def _rotated(self, x: Var) -> Var:
        first, second = mb.split(x=x, num_splits=2, axis=2)
        turned = mb.concat(values=[mb.mul(x=second, y=np.float16(-1)), first], axis=2)
        return mb.add(x=mb.mul(x=x, y=self.cos), y=mb.mul(x=turned, y=self.sin))

    def _remembered(self, part: str, new: Var, number: int) -> Var:
        """Write `new` [1, kv heads, width, S] into the cache, and return the layer's [kv heads, 1, context, width]."""
        s = self.sizes
        updated = mb.slice_update(
            x=self.caches[part],
            update=mb.transpose(x=new, perm=[0, 1, 3, 2]),
            begin=mb.concat(values=[_ints(number, 0), self.position, _ints(0)], axis=0),
            end=mb.concat(values=[_ints(number + 1, s.kv_heads), self.end, _ints(s.head_dim)], axis=0),
        )
        self.caches[part] = mb.coreml_update_state(state=self.states[part], value=updated)
        size = [1, s.kv_heads, s.context, s.head_dim]
        own = mb.slice_by_size(x=self.caches[part], begin=[number, 0, 0, 0], size=size)
        return mb.reshape(x=own, shape=[s.kv_heads, 1, s.context, s.head_dim])

    def _at_position(self, table: Array) -> Var:
        """Return the columns for these S ids: [1, 1, width, S] from a table [1, 1, width, context]."""
        begin = mb.concat(values=[_ints(0, 0, 0), self.position], axis=0)
        return mb.slice_by_size(x=table, begin=begin, size=[1, 1, table.shape[2], self.length])

    def _mask(self) -> Var:
        """Return fp16 [1, 1, S, context]: 0 up to an id's own column, `HIDDEN_LOGIT` after it."""
        rows = mb.add(x=self.position, y=np.arange(self.length, dtype=np.int32))
        rows = mb.reshape(x=rows, shape=[1, 1, self.length, 1])
        columns = np.arange(self.sizes.context, dtype=np.int32).reshape(1, 1, 1, -1)
        ahead = mb.cast(x=mb.less(x=rows, y=columns), dtype="fp16")
        return mb.mul(x=ahead, y=np.float16(HIDDEN_LOGIT))

    def _linear(self, x: Var, fqn: str) -> Var:
        """Apply the linear layer `fqn`, and before it the norm of its inputs, if it has one."""
        linear = self.model.get_submodule(fqn)
        assert isinstance(linear, nn.Linear)
        inside = linear.rms_norm if isinstance(linear, QuantLinear) else None
        for norm in (norm_beside(self.model, fqn), inside):
            x = x if norm is None else _rms_norm(x, norm)
        y = self._product(x, fqn, linear)
        return y if linear.bias is None else mb.add(x=y, y=half(linear.bias).reshape(1, -1, 1, 1))

    def _product(self, x: Var, fqn: str, linear: nn.Linear) -> Var:
        if fqn not in self.layers:
            return mb.conv(x=x, weight=_kernel(half(linear.weight)), name=op_name(fqn))
        layer = self.layers[fqn]
        if layer.rank > self.factored:
            return mb.conv(x=x, weight=_kernel(half(layer.weight())), name=op_name(fqn))
        return palettized(x, layer, op_name(fqn))


def palettized(x: Var, layer: Palette, name: str) -> Var:
    """Apply a quantized layer: [1, in, 1, S] -> [1, out, 1, S]. Its operations are `name_in`, `name` and `name_out`."""
    # The r products lie side by side in the batch: x times b [r, in, 1, 1], one convolution with Q, times a
    # [r, out, 1, 1], summed over the batch.
    indices = _kernel(layer.index.numpy()).astype(INDEX_TYPES[layer.bits])
    q = mb.constexpr_lut_to_dense(indices=indices, lut=layer.lut.numpy().reshape(1, 1, 1, 1, -1, 1))
    if layer.has_b():
        x = mb.mul(x=x, y=layer.b.numpy()[:, :, None, None], name=f"{name}_in")
    y = mb.conv(x=x, weight=q, name=name)
    y = mb.mul(x=y, y=layer.a.T.contiguous().numpy()[:, :, None, None], name=f"{name}_out")
    return y if layer.rank == 1 else mb.reduce_sum(x=y, axes=[0], keep_dims=True)


def op_name(fqn: str) -> str:
    """Return the name of a layer's convolution."""
    return fqn.replace(".", "_")


def half(tensor: Tensor) -> Array:
    """Return a tensor as an fp16 array on the CPU. Values beyond the range of fp16 become infinite."""
    return tensor.detach().cpu().half().numpy()


def rotary_tables(model: PreTrainedModel, context: int) -> tuple[Array, Array]:
    """Return cosines and sines of the model's rotary positions, each fp16 [1, 1, head width, context]."""
    positions = torch.arange(context, device=model.device).unsqueeze(0)
    cos, sin = model.model.rotary_emb(torch.zeros((), device=model.device), positions)
    return half(cos.mT.unsqueeze(0)), half(sin.mT.unsqueeze(0))


def _ints(*values: int) -> Array:
    return np.array(values, dtype=np.int32)


def _kernel(weight: Array) -> Array:
    """View a weight [out, in] as that of a 1x1 convolution, [out, in, 1, 1]."""
    return weight[:, :, None, None]


def _flat(x: Var) -> Var:
    """Turn [1, channels, 1, S] into [1, S, channels]."""
    return mb.transpose(x=mb.squeeze(x=x, axes=[2]), perm=[0, 2, 1])


def _rms_norm(x: Var, norm: nn.Module, axis: int = 1) -> Var:
    # layer_norm of (x, -x), whose mean is zero: the sum of squares is inside it, and does not overflow in fp16.
    gain, eps = half(norm.get_parameter("weight")), np.float16(vars(norm)["variance_epsilon"])
    both = mb.concat(values=[x, mb.mul(x=x, y=np.float16(-1))], axis=axis)
    normed = mb.layer_norm(x=both, axes=[axis], gamma=np.concatenate([gain, gain]), epsilon=eps)
    return mb.slice_by_size(x=normed, begin=[0] * x.rank, size=list(x.shape))
