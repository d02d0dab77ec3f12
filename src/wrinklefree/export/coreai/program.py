"""A decoder in plain torch that coreai-torch converts: fp16, with palettized layers and a cache that the caller owns.

| part | how it is written |
|---|---|
| quantized layer of rank r | y = sum_k a_k * (Q (b_k * x)), with Q = lut_to_dense(codes, lut) |
| quantized layer, r above `factored` | its effective weight Q * (a b) as an fp16 constant ("baked") |
| norms and softmax | fp32 inside, because sums of squares overflow in fp16 |
| cache | two states [layers, context, kv heads, head width]; a step writes S rows at `position` |

Inputs: input_ids int32 [1, S], and position int32 [1], the position of the first id.
Output: logits fp16 [1, S, vocabulary].
Padding after the end of a text does no harm: its rows are overwritten before a later id can see them.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from coreai_torch._compression.custom_layers import PalettizeModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.core.method import QuantLinear
from wrinklefree.export.views.decoder import Sizes
from wrinklefree.export.views.lut import Palette
from wrinklefree.families.bitnet import norm_beside

HIDDEN_LOGIT = -3e4  # added to the scores of later rows; fp16 ends at -65504


def cache_shape(sizes: Sizes) -> tuple[int, int, int, int]:
    """Shape of the state for keys, and of that for values."""
    return sizes.layers, sizes.context, sizes.kv_heads, sizes.head_dim


class Decoder(nn.Module):
    """The trained model as a program. `position + S` must not exceed the context."""

    def __init__(self, model: PreTrainedModel, layers: Mapping[str, Palette], sizes: Sizes, factored: int) -> None:
        super().__init__()
        self.sizes = sizes
        body = model.model
        self.register_buffer("embeddings", half(body.embed_tokens.weight))
        positions = torch.arange(sizes.context, device=model.device).unsqueeze(0)
        cos, sin = body.rotary_emb(torch.zeros((), device=model.device), positions)
        self.register_buffer("cos", half(cos[0]))  # [context, head width]
        self.register_buffer("sin", half(sin[0]))
        self.blocks = nn.ModuleList(_Block(model, layers, sizes, factored, number) for number in range(sizes.layers))
        self.norm = Norm(body.norm)
        tied = model.config.tie_word_embeddings and "lm_head" not in layers
        self.head = None if tied else linear(model, layers, factored, "lm_head")

    def forward(self, input_ids: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Return logits fp16 [1, S, vocabulary], and write S rows into both caches, in place."""
        x = F.embedding(input_ids, self.get_buffer("embeddings"))
        rows = position + torch.arange(input_ids.shape[1], dtype=torch.int32)  # [S]
        turn = (self.get_buffer("cos")[rows], self.get_buffer("sin")[rows])  # each [S, head width]
        columns = torch.arange(self.sizes.context, dtype=torch.int32)
        mask = torch.where(rows[:, None] < columns, HIDDEN_LOGIT, 0.0).to(x.dtype)  # [S, context]
        for block in self.blocks:
            x = block(x, rows, turn, mask, k_cache, v_cache)
        x = self.norm(x)
        return F.linear(x, self.get_buffer("embeddings")) if self.head is None else self.head(x)


class _Block(nn.Module):
    """One layer of the decoder: attention and MLP, each with a norm before it."""

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[str, Palette], sizes: Sizes, factored: int, number: int
    ) -> None:
        super().__init__()
        self.sizes, self.number = sizes, number
        prefix = f"model.layers.{number}"
        block = model.get_submodule(prefix)
        self.input_norm = Norm(block.get_submodule("input_layernorm"))
        self.mlp_norm = Norm(block.get_submodule("post_attention_layernorm"))
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(part, linear(model, layers, factored, f"{prefix}.self_attn.{part}"))
        for part in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(part, linear(model, layers, factored, f"{prefix}.mlp.{part}"))
        # In Qwen3, queries and keys have a norm per head.
        own = dict(block.get_submodule("self_attn").named_children())
        self.q_norm = Norm(own["q_norm"]) if "q_norm" in own else nn.Identity()
        self.k_norm = Norm(own["k_norm"]) if "k_norm" in own else nn.Identity()

    def forward(
        self, x: Tensor, rows: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        x = x + self._attention(self.input_norm(x), rows, turn, mask, k_cache, v_cache)
        normed = self.mlp_norm(x)
        gate = F.silu(self.get_submodule("gate_proj")(normed))
        return x + self.get_submodule("down_proj")(gate * self.get_submodule("up_proj")(normed))

    def _attention(
        self, x: Tensor, rows: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        s, length = self.sizes, x.shape[1]
        q = rotated(self.q_norm(self._heads(x, "q_proj", s.heads)), turn)
        k = rotated(self.k_norm(self._heads(x, "k_proj", s.kv_heads)), turn)
        layer = torch.full_like(rows, self.number)
        k_cache.index_put_((layer, rows), k)
        v_cache.index_put_((layer, rows), self._heads(x, "v_proj", s.kv_heads))
        keys, values = (
            cache[self.number].permute(1, 0, 2) for cache in (k_cache, v_cache)
        )  # [kv heads, context, width]
        groups = s.heads // s.kv_heads
        # Queries of one key head lie side by side: [kv heads, groups * S, width].
        q = (q * s.head_dim**-0.5).reshape(length, s.kv_heads, groups, s.head_dim).permute(1, 2, 0, 3)
        scores = q.reshape(s.kv_heads, groups * length, s.head_dim) @ keys.mT
        scores = scores + mask.repeat(groups, 1)
        mixed = scores.float().softmax(-1).to(x.dtype) @ values
        mixed = mixed.reshape(s.kv_heads, groups, length, s.head_dim).permute(2, 0, 1, 3)
        return self.get_submodule("o_proj")(mixed.reshape(1, length, s.heads * s.head_dim))

    def _heads(self, x: Tensor, part: str, heads: int) -> Tensor:
        """Return queries, keys or values [S, heads, head width]."""
        return self.get_submodule(part)(x).reshape(x.shape[1], heads, self.sizes.head_dim)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to x [S, heads, head width]."""
    cos, sin = (table[:, None] for table in turn)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Norm(nn.Module):
    """RMSNorm, in fp32 inside."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        # The gain is fp32 too: the converter would join an fp16 gain with the factors b of the next layer, and round.
        self.register_buffer("gain", norm.get_parameter("weight").detach().cpu().float())
        self.eps = float(vars(norm)["variance_epsilon"])

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.get_buffer("gain")).to(x.dtype)


class Linear(nn.Module):
    """A linear layer with the norms before it and its bias: [1, S, in] -> [1, S, out]."""

    bias: Tensor | None

    def __init__(self, norms: list[Norm], bias: Tensor | None) -> None:
        super().__init__()
        self.norms = nn.Sequential(*norms)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.norms(x))
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        """Multiply by the weight."""
        raise NotImplementedError


class Dense(Linear):
    """A weight that is no palette, or a palette baked into its effective weight."""

    def __init__(self, weight: Tensor, norms: list[Norm], bias: Tensor | None) -> None:
        super().__init__(norms, bias)
        self.register_buffer("weight", half(weight))

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("weight"))


class Palettized(Linear):
    """A table, codes and low-rank scales; the table is looked up when the program runs."""

    b: Tensor | None  # [r, 1, in]; none if it is all ones

    def __init__(self, layer: Palette, norms: list[Norm], bias: Tensor | None) -> None:
        super().__init__(norms, bias)
        # The converter packs 1, 2, 4, 6 or 8 bits, so codes of 3 bits take 4, and the table is filled up with zeros.
        table = F.pad(layer.lut, (0, 2 ** stored_bits(layer.bits) - len(layer.lut)))
        self.palette = PalettizeModule(layer.index, table.reshape(1, 1, -1, 1))
        self.register_buffer("a", layer.a.T.reshape(layer.rank, 1, -1).contiguous())  # [r, 1, out]
        self.register_buffer("b", layer.b.reshape(layer.rank, 1, -1) if layer.has_b() else None)

    def product(self, x: Tensor) -> Tensor:
        a, b = self.get_buffer("a"), self.b
        # The r products lie side by side in the batch, so that the table is looked up once.
        y = F.linear(x if b is None else x * b, self.palette()) * a
        return y if len(a) == 1 else y.sum(0, keepdim=True)


def linear(model: PreTrainedModel, layers: Mapping[str, Palette], factored: int, fqn: str) -> Linear:
    """Return the linear layer `fqn` of a model as a part of a program."""
    module = model.get_submodule(fqn)
    assert isinstance(module, nn.Linear)
    inside = module.rms_norm if isinstance(module, QuantLinear) else None
    norms = [Norm(norm) for norm in (norm_beside(model, fqn), inside) if norm is not None]
    bias = None if module.bias is None else half(module.bias)
    if fqn not in layers:
        return Dense(module.weight, norms, bias)
    layer = layers[fqn]
    return Dense(layer.weight(), norms, bias) if layer.rank > factored else Palettized(layer, norms, bias)


def stored_bits(bits: int) -> int:
    """Return how many bits a code takes in the asset."""
    return 4 if bits == 3 else bits


def half(tensor: Tensor) -> Tensor:
    """Return a tensor as fp16 on the CPU. Values beyond the range of fp16 become infinite."""
    return tensor.detach().cpu().half().contiguous()
