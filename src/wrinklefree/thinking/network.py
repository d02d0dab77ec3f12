"""LLM-TRM: a tiny recursive network thinks in a language model's compressed hidden states, instead of in words.

Recursion: "Less is More" (arXiv 2510.04871). Soft tokens: Coconut (arXiv 2412.06769). D is the width of the language
model, D' that of its compressed states, H that of the network, L the length of the prompt.

    compress    c = W x                       x' = W^T c          W [D', D]; PCA is its optimum (thinking/moments.py)
    whiten      u = (c - mean) / deviation    on each of the D' axes
    block       h = rms(h + attention(h)),  h = rms(h + swiglu(h))    no causal mask, RoPE, norms after, no gains
    f           num_layers blocks on L + 1 places, the prompt and a slot; everything below has the same weights
    recursion   n times z = f(x + y + z), then y = f(y + z); all of this T times, a gradient for the last alone
    read        thought = Wo y[slot] [D'], halt = wh . y[slot]        halt > 0 ends the thinking of a sample
    speak       s = Wa decompress(thought) + ba [D]                   a soft token between <think> and </think>

Two ways to think (`mode`):

trajectory  thought j is made from thought j - 1, which stands in the slot of y beside the embedding of j. Training runs
            all j at once, on the language model's thoughts (teacher forcing), later on the network's own (scheduled
            sampling).
final       the published way: y and z go on from round to round, and each round aims at the last thought (deep
            supervision).
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core.errors import UserError

THETA, EPS = 10_000.0, 1e-5  # of the rotary angles, of the norms
SHAPE = ("hidden_size", "num_layers", "num_heads", "dropout", "n_latent_steps", "n_deep_recursions")


class DimensionCompressor(nn.Module):
    """[..., D] -> [..., D'] -> [..., D], linear and without bias, in fp32 also under autocast.

    The decoder is the transpose of the encoder if `tied`, else a matrix of its own.
    """

    def __init__(self, width: int, compressed: int, tied: bool = True) -> None:
        """Begin with random orthonormal rows. Raises UserError if `compressed` is more than `width`."""
        super().__init__()
        if compressed > width:
            raise UserError(f"thinking.d_compressed={compressed}: the model's hidden states have {width} entries")
        self.weight = nn.Parameter(torch.empty(compressed, width))
        nn.init.orthogonal_(self.weight)
        self.decoder = None if tied else nn.Parameter(self.weight.detach().clone())

    def compress(self, states: Tensor) -> Tensor:
        """States [..., D] as codes [..., D']."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight)

    def decompress(self, codes: Tensor) -> Tensor:
        """Codes [..., D'] as states [..., D]."""
        with torch.autocast(codes.device.type, enabled=False):
            return codes.float() @ (self.weight if self.decoder is None else self.decoder)

    def forward(self, states: Tensor) -> Tensor:
        return self.decompress(self.compress(states))


def rms(x: Tensor) -> Tensor:
    """x over its root mean square, without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class Block(nn.Module):
    """Attention and SwiGLU over [B, P, H], each followed by a norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = math.ceil(8 * width / 3 / 64) * 64
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, h: Tensor, context: "Context", slot_only: bool = False) -> Tensor:
        """[B, P, H] for all places, or [B, 1, H] for the slot, which is the last one."""
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, P, -1]
        (q, k), v = rotate(qkv[:2], context.cos, context.sin), qkv[2]
        if slot_only:
            q, h = q[:, :, -1:], h[:, -1:]
        mixed = F.scaled_dot_product_attention(q, k, v, context.seen, self.dropout if self.training else 0.0)
        h = rms(h + self.out(mixed.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return rms(h + self.down(F.silu(gate) * up))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [..., B, heads, P, E] by its positions; `cos` and `sin` [B, 1, P, E], the first half of `sin` negative."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sin.to(x.dtype)


@dataclass
class Context:
    """Prompts as the network sees them: x [B, L + 1, H], zero in the slot; rotary angles; a mask [B, 1, 1, L + 1]."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    seen: Tensor

    def take(self, rows: Tensor) -> "Context":
        """The samples `rows` [N], each as often as it is named."""
        return Context(self.x[rows], self.cos[rows], self.sin[rows], self.seen[rows])


class RecursiveNetwork(nn.Module):
    """The network f, its embeddings and heads, and both ways to think."""

    y0: Tensor
    z0: Tensor

    def __init__(self, config: "ThinkerConfig") -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.blocks = nn.ModuleList(Block(width, config.num_heads, config.dropout) for _ in range(config.num_layers))
        self.embed = nn.Linear(config.d_compressed, width, bias=False)  # of the prompt
        self.slot = nn.Linear(config.d_compressed, width, bias=False)  # of the thought before
        self.number = nn.Embedding(config.max_thoughts, width)
        self.head = nn.Linear(width, config.d_compressed, bias=False)
        self.halt = nn.Linear(width, 1)
        nn.init.normal_(self.number.weight, std=0.1)
        nn.init.zeros_(self.halt.weight)
        nn.init.zeros_(self.halt.bias)
        for name in ("y0", "z0"):
            self.register_buffer(name, nn.init.trunc_normal_(torch.empty(width), std=1.0))

    def context(self, prompt: Tensor, mask: Tensor) -> Context:
        """The context of whitened states [B, L, D'], padded on either side; `mask` [B, L] is False for padding."""
        counted = F.pad(mask.long(), (0, 1), value=1).cumsum(1)  # the slot is the position after the prompt
        x = F.pad(self.embed(prompt) * mask[..., None], (0, 0, 0, 1))
        half = self.config.hidden_size // self.config.num_heads // 2
        speeds = THETA ** (-torch.arange(half, device=mask.device) / half)
        angles = ((counted - 1)[..., None] * speeds)[:, None]
        cos, sin = angles.cos().repeat(1, 1, 1, 2), torch.cat([-angles.sin(), angles.sin()], -1)
        return Context(x, cos, sin, F.pad(mask, (0, 1), value=True)[:, None, None])

    def f(self, h: Tensor, context: Context, slot_only: bool = False) -> Tensor:
        """All blocks on [B, L + 1, H]; with `slot_only` the last one gives the slot alone, [B, 1, H]."""
        for place, block in enumerate(self.blocks, start=1):
            h = block(h, context, slot_only and place == len(self.blocks))
        return h

    def recurse(self, context: Context, y: Tensor, z: Tensor, slot_only: bool = False) -> tuple[Tensor, Tensor]:
        """One deep recursion: improve y and z [B, L + 1, H] T times; with `slot_only` the y returned is the slot's."""
        for last in [False] * (self.config.n_deep_recursions - 1) + [True]:
            with torch.set_grad_enabled(last and torch.is_grad_enabled()):
                for _ in range(self.config.n_latent_steps):
                    z = self.f(context.x + y + z, context)
                y = self.f(y + z, context, last and slot_only)
        return y, z

    def read(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The thought [B, D'] and the halting logit [B], read from the slot."""
        slot = y[:, -1]
        return self.head(slot), self.halt(slot).squeeze(-1)

    def step(self, context: Context, before: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Mode trajectory: thought `number` [B] after the thought `before` [B, D'], which is zero for the first."""
        place = self.slot(before) + self.number(number)
        y = F.pad(place[:, None], (0, 0, context.x.shape[1] - 1, 0))
        return self.read(self.recurse(context, y, self.z0.expand_as(context.x), slot_only=True)[0])

    def begin(self, context: Context) -> tuple[Tensor, Tensor]:
        """Mode final: y and z before the first round."""
        return self.y0.expand_as(context.x), self.z0.expand_as(context.x)


class ThinkerConfig(PreTrainedConfig):  # type: ignore[misc]
    """The shape of a `LatentThinker`."""

    model_type = "wrinklefree_trm"

    def __init__(
        self,
        width: int = 128,
        d_compressed: int = 64,
        tied: bool = True,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        dropout: float = 0.0,
        n_latent_steps: int = 1,
        n_deep_recursions: int = 1,
        max_thoughts: int = 8,
        mode: str = "trajectory",
        averaged: bool = True,
        **others: Any,
    ) -> None:
        self.width, self.d_compressed, self.tied = width, d_compressed, tied
        self.hidden_size, self.num_layers, self.num_heads, self.dropout = hidden_size, num_layers, num_heads, dropout
        self.n_latent_steps, self.n_deep_recursions = n_latent_steps, n_deep_recursions
        self.max_thoughts, self.mode, self.averaged = max_thoughts, mode, averaged
        super().__init__(**others)


class LatentThinker(PreTrainedModel):  # type: ignore[misc]
    """Compressor, whitening, network and adapter for one language model, and as their control the pause tokens."""

    config_class = ThinkerConfig
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__(config)
        self.compressor = DimensionCompressor(config.width, config.d_compressed, config.tied)
        self.register_buffer("mean", torch.zeros(config.d_compressed))
        self.register_buffer("deviation", torch.ones(config.d_compressed))
        self.network = RecursiveNetwork(config)
        # The mean of the weights over the last steps (EMA). It is what thinks outside of training.
        self.average = copy.deepcopy(self.network).requires_grad_(False) if config.averaged else None
        self.adapter = nn.Linear(config.width, config.width)
        self.pause = nn.Parameter(0.02 * torch.randn(config.max_thoughts, config.width))

    def whiten(self, codes: Tensor) -> Tensor:
        """Codes [..., D'] with mean 0 and deviation 1 on each axis."""
        return (codes.float() - self.mean) / self.deviation

    def states(self, thoughts: Tensor) -> Tensor:
        """Whitened thoughts [..., D'] as hidden states [..., D] of the language model."""
        return self.compressor.decompress(thoughts.float() * self.deviation + self.mean)

    def speak(self, thoughts: Tensor) -> Tensor:
        """Whitened thoughts [..., D'] as soft tokens [..., D]."""
        return self.adapter(self.states(thoughts))

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average = decay x average + (1 - decay) x network."""
        if self.average is not None:
            for mean, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)

    def keep_average(self) -> None:
        """Replace the weights by their mean, and keep none from now on: what trains is then what thinks."""
        if self.average is not None:
            self.network.load_state_dict(self.average.state_dict())
            self.average, self.config.averaged = None, False

    def think(self, prompt: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Thoughts [B, S, D'] about whitened prompts [B, L, D'], and a mask [B, S]: False after a sample has halted.

        Every sample has at least one thought. S is the longest of them, and at most `max_thoughts`.
        """
        network = self.network if self.average is None else self.average
        context = network.context(prompt, mask)
        going = mask.new_ones(len(mask))
        before, (y, z) = prompt.new_zeros(len(mask), self.config.d_compressed), network.begin(context)
        thoughts, masks = [], []
        for number in range(self.config.max_thoughts):
            if self.config.mode == "trajectory":
                before, halt = network.step(context, before, torch.full_like(going, number, dtype=torch.long))
            else:
                y, z = network.recurse(context, y, z)
                before, halt = network.read(y)
            thoughts.append(before.float())
            masks.append(going)
            going = going & (halt <= 0)
            if not going.any():
                break
        return torch.stack(thoughts, 1), torch.stack(masks, 1)


def make_thinker(model: PreTrainedModel, settings: ThinkingConfig) -> LatentThinker:
    """An untrained thinker for a language model, in which nothing changes. Raises UserError if D' is wider than D."""
    network = settings.network
    shape = ThinkerConfig(
        width=model.get_input_embeddings().embedding_dim,
        d_compressed=settings.d_compressed,
        tied=settings.objective != "fisher",
        max_thoughts=network.max_thoughts,
        mode=network.mode,
        averaged=network.ema_decay > 0,
        **{name: vars(network)[name] for name in SHAPE},
    )
    return LatentThinker(shape)
