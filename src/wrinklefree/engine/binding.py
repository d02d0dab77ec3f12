"""Call the native decoder through ctypes. The structures are those of native/decoder.h, field for field.

The library checks lengths and token ids. If it refuses a call, its reason is raised as a ValueError.
"""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from wrinklefree.core import library
from wrinklefree.engine.sampling import Sampling
from wrinklefree.packed.products import native

Floats = np.ndarray[Any, np.dtype[np.float32]]
Mask = np.ndarray[Any, np.dtype[np.uint32]]

LINEARS = ("q", "k", "v", "o", "gate", "up", "down", "router")
EXPERT = ("gate", "up", "down")
NORMS = (
    *("attention_norm", "mlp_norm", "attention_shift", "mlp_shift"),
    *("post_attention_norm", "post_mlp_norm", "q_norm", "k_norm"),
)
ACTIVATIONS = {"silu": 0, "relu2": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2}
Mode = Literal["int8", "exact"]
MODES: dict[Mode, int] = {"int8": native.INT8, "exact": native.EXACT}
MASK = 2**64 - 1  # keeps the bits of a seed that C has room for


class _Linear(Structure):
    _fields_ = (("matrix", c_void_p), ("gain", c_void_p), ("eps", c_float), ("rounded", c_int), ("rotated", c_int))


class _Layer(Structure):
    _fields_ = (
        *((name, _Linear) for name in LINEARS),
        ("experts", POINTER(_Linear)),
        *((name, c_void_p) for name in NORMS),
        ("rope", c_int),
        ("window", c_int),
        ("scale", c_float),
    )


SIZES = ("vocab", "hidden", "intermediate", "num_layers", "heads", "kv_heads", "head_dim", "rotary")
EXPERT_SIZES = ("num_experts", "top_k", "expert_intermediate")


class _Model(Structure):
    _fields_ = (
        *((name, c_int) for name in SIZES + EXPERT_SIZES),
        *((name, c_int) for name in ("context", "slots", "max_rows")),
        *((name, c_int) for name in ("layer_norm", "share_of_chosen", "num_ropes")),
        ("eps", c_float),
        ("rope_scale", c_float * 2),
        ("embedding_scale", c_float),
        ("activation", c_int),
        ("mode", c_int),
        ("half_cache", c_int),
        ("frequencies", c_void_p),
        ("embedding", c_void_p),
        ("positions", c_void_p),
        ("norm", c_void_p),
        ("shift", c_void_p),
        ("head", _Linear),
        ("layers", POINTER(_Layer)),
    )


class CSampling(Structure):
    """How to choose a token: `wf_sampling` of native/decoder.h."""

    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("repetition_penalty", c_float),
        ("top_k", c_int),
        ("seed", c_uint64),
        ("counter", c_uint64),
        ("min_p", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("prompt", c_int),
        ("num_biases", c_int),
        ("biased", POINTER(c_int32)),
        ("biases", POINTER(c_float)),
        ("allowed", POINTER(c_uint32)),
    )


class _Append(Structure):
    _fields_ = (
        ("slot", c_int),
        ("length", c_int),
        ("tokens", POINTER(c_int32)),
        ("sampling", POINTER(CSampling)),
        ("next", POINTER(c_int32)),
        ("logits", POINTER(c_float)),
        ("num_logits", c_int),
    )


@dataclass(frozen=True)
class Linear:
    """A linear layer of the decoder, perhaps with a norm of its inputs."""

    matrix: native.Matrix
    gain: Floats | None = None  # [in], of the norm; None if there is no norm
    eps: float = 0.0  # of the norm
    rounded: bool = False  # whether it was trained with int8 inputs, which exact mode then rounds too
    rotated: bool = False  # whether its inputs are rotated


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Without `k` and `v`, `q` holds all three. Without `up`, `gate` holds both, or there is none (native/decoder.h).
    """

    linears: Mapping[str, Linear]  # by the names in LINEARS
    norms: Mapping[str, Floats]  # by the names in NORMS; only attention_norm and mlp_norm have to be there
    scale: float  # of the products of queries and keys
    rope: int = 1  # number of its frequencies, from 1; 0 if positions do not rotate queries and keys
    window: int = 0  # how many of the last tokens it sees; 0 means all
    experts: Sequence[Mapping[str, Linear]] = ()  # each by the names in EXPERT


@dataclass(frozen=True)
class Model:
    """The sizes and weights of a model, as the decoder needs them."""

    sizes: Mapping[str, int]  # by the names in SIZES, and in EXPERT_SIZES if it has experts
    eps: float  # of the norms
    frequencies: Sequence[Floats]  # of each RoPE [rotary / 2], radians per position
    rope_scales: Sequence[float]  # factors on sine and cosine
    activation: str  # one of ACTIVATIONS
    embedding: native.Matrix
    norm: Floats
    head: Linear
    layers: Sequence[Layer]
    shift: Floats | None = None  # of the last norm, if it is a LayerNorm with a bias
    layer_norm: bool = False  # whether norms take the mean off
    embedding_scale: float = 1.0  # factor of the embedding's rows
    positions: native.Matrix | None = None  # [context or more, hidden], added to the embedding
    share_of_chosen: bool = False  # whether the probabilities of the experts chosen are made to add up to 1


@dataclass
class Append:
    """Tokens to add to the sequence in `slot`. With `sampling`, the decoder also chooses the token that follows."""

    slot: int
    tokens: Sequence[int]
    sampling: CSampling | None = None
    logits: Floats | None = None  # [n, vocab]; the decoder writes the logits of the last n tokens into it


class Decoder:
    """A native decoder with `slots` independent sequences of up to `context` tokens.

    `close` frees its memory; the garbage collector does so too.
    """

    def __init__(
        self,
        pool: library.Pool,
        model: Model,
        *,
        context: int,
        slots: int,
        max_rows: int,
        mode: Mode,
        half_cache: bool = False,
    ) -> None:
        self._lib = _library()
        self._pool, self._model = pool, model  # the library refers to both, so they must stay alive
        self.context, self.slots, self.max_rows = context, slots, max_rows
        struct, borrowed = _model_struct(model, MODES[mode])
        struct.context, struct.slots, struct.max_rows = context, slots, max_rows
        struct.half_cache = half_cache
        self._handle = self._lib.wf_decoder_new(pool.handle, ctypes.byref(struct))
        del borrowed  # the struct points into it, so it had to live until here
        if not self._handle:
            raise ValueError(library.last_error(self._lib))
        self._appends = (_Append * slots)()
        self._chosen = [c_int32() for _ in range(slots)]
        self._to_chosen = [ctypes.pointer(token) for token in self._chosen]

    def step(self, appends: Sequence[Append]) -> list[int | None]:
        """Add the tokens of all `appends`. Returns the token chosen for each, or None if it has no sampling."""
        if len(appends) > self.slots:
            raise ValueError(f"{len(appends)} appends for {self.slots} slots")
        keep = []
        for i, append in enumerate(appends):
            tokens = (c_int32 * len(append.tokens))(*append.tokens)
            keep.append(tokens)
            to = self._appends[i]
            to.slot, to.length, to.tokens = append.slot, len(append.tokens), tokens
            to.sampling = None if append.sampling is None else ctypes.pointer(append.sampling)
            to.next = None if append.sampling is None else self._to_chosen[i]
            to.logits = None if append.logits is None else append.logits.ctypes.data_as(POINTER(c_float))
            to.num_logits = 0 if append.logits is None else append.logits.size // self._model.sizes["vocab"]
        self._check(self._lib.wf_decoder_step(self._handle, self._appends, len(appends)))
        return [None if append.sampling is None else self._chosen[i].value for i, append in enumerate(appends)]

    def _check(self, code: int) -> None:
        if code:
            raise ValueError(library.last_error(self._lib))

    def length(self, slot: int) -> int:
        """How many tokens the cache of `slot` holds."""
        return int(self._lib.wf_decoder_length(self._handle, slot))

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of `slot`."""
        self._check(self._lib.wf_decoder_truncate(self._handle, slot, length))

    def copy(self, source: int, target: int, length: int) -> None:
        """Replace the sequence in slot `target` by the first `length` tokens of another."""
        self._check(self._lib.wf_decoder_copy(self._handle, source, target, length))

    def clear(self, slot: int) -> None:
        """Forget all tokens of `slot` and free their memory."""
        self._check(self._lib.wf_decoder_clear(self._handle, slot))

    def bytes(self) -> int:
        """The memory of caches and buffers, in bytes."""
        return int(self._lib.wf_decoder_bytes(self._handle))

    def weight_bytes(self) -> int:
        """The memory of the model's matrices, in bytes. A matrix that is both embedding and head counts once."""
        linears = [self._model.head]
        for layer in self._model.layers:
            linears += [*layer.linears.values(), *(one for expert in layer.experts for one in expert.values())]
        matrices = {id(m): m for m in (self._model.embedding, *(linear.matrix for linear in linears))}
        positions = 0 if self._model.positions is None else self._model.positions.nbytes
        return sum(matrix.nbytes for matrix in matrices.values()) + positions

    def close(self) -> None:
        """Free all memory. No other method may be called afterwards."""
        if self._handle:
            self._lib.wf_decoder_free(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if "_handle" in vars(self):
            self.close()


def c_sampling(sampling: Sampling, prompt: int) -> CSampling:
    """The C struct of `sampling`, for a sequence that begins with `prompt` tokens of others."""
    count = len(sampling.logit_bias)
    return CSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        top_k=sampling.top_k,
        seed=sampling.seed & MASK,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        prompt=prompt,
        num_biases=count,
        biased=(c_int32 * count)(*sampling.logit_bias),  # the struct keeps both arrays alive
        biases=(c_float * count)(*sampling.logit_bias.values()),
    )


def allow(sampling: CSampling, mask: Mask) -> None:
    """Let `sampling` choose among the tokens in `mask` [at least vocab / 32], which has to stay alive."""
    sampling.allowed = mask.ctypes.data_as(POINTER(c_uint32))


def sample(logits: Floats, history: Sequence[int], sampling: CSampling) -> int:
    """Choose a token from logits [vocab] as a decoder does. `history` is what the repetition penalty looks at."""
    values = np.ascontiguousarray(logits, dtype=np.float32)
    tokens = (c_int32 * len(history))(*history)
    lib = _library()
    token = int(lib.wf_sample(values.ctypes.data, len(values), tokens, len(history), ctypes.byref(sampling)))
    if token < 0:
        raise ValueError(library.last_error(lib))
    return token


@cache
def _library() -> ctypes.CDLL:
    """The library, with the decoder's functions declared."""
    lib = library.load()
    handle, model = c_void_p, POINTER(_Model)
    declared: dict[str, tuple[Any, list[Any]]] = {
        "wf_decoder_new": (handle, [handle, model]),
        "wf_decoder_free": (None, [handle]),
        "wf_decoder_step": (c_int, [handle, POINTER(_Append), c_int]),
        "wf_decoder_length": (c_int, [handle, c_int]),
        "wf_decoder_truncate": (c_int, [handle, c_int, c_int]),
        "wf_decoder_clear": (c_int, [handle, c_int]),
        "wf_decoder_copy": (c_int, [handle, c_int, c_int, c_int]),
        "wf_decoder_bytes": (c_size_t, [handle]),
        "wf_sample": (c_int32, [c_void_p, c_int, POINTER(c_int32), c_int, POINTER(CSampling)]),
    }
    library.declare(lib, declared)
    return lib


def _model_struct(model: Model, mode: int) -> tuple[_Model, Any]:
    """The C struct of a model, and the objects that it points to, which must outlive its use."""
    kept: list[Any] = []

    def address(values: Floats | None) -> int | None:
        if values is None:
            return None
        kept.append(np.ascontiguousarray(values, dtype=np.float32))
        return int(kept[-1].ctypes.data)

    def linear(one: Linear | None) -> _Linear:
        if one is None:
            return _Linear()
        return _Linear(one.matrix.handle, address(one.gain), one.eps, one.rounded, one.rotated)

    layers = (_Layer * len(model.layers))()
    for to, layer in zip(layers, model.layers, strict=True):
        for name in LINEARS:
            setattr(to, name, linear(layer.linears.get(name)))
        for name in NORMS:
            setattr(to, name, address(layer.norms.get(name)))
        if layer.experts:
            to.experts = (_Linear * (3 * len(layer.experts)))(
                *(linear(expert.get(name)) for expert in layer.experts for name in EXPERT)
            )
        to.rope, to.window, to.scale = layer.rope, layer.window, layer.scale
    struct = _Model(eps=model.eps, activation=ACTIVATIONS[model.activation], mode=mode)
    for name, size in model.sizes.items():
        setattr(struct, name, size)
    struct.layer_norm, struct.share_of_chosen = model.layer_norm, model.share_of_chosen
    struct.num_ropes = len(model.frequencies)
    struct.rope_scale[: len(model.rope_scales)] = model.rope_scales
    struct.embedding_scale = model.embedding_scale
    struct.frequencies = address(np.concatenate(model.frequencies)) if model.frequencies else None
    struct.norm, struct.shift = address(model.norm), address(model.shift)
    struct.positions = None if model.positions is None else model.positions.handle
    struct.embedding, struct.head, struct.layers = model.embedding.handle, linear(model.head), layers
    return struct, (layers, kept)
