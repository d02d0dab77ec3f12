"""The native decoder through ctypes: native/decoder.h, type for type.

Lengths and token ids are checked on the other side; what it refuses comes back as a ValueError.
"""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from wrinklefree.packed.products import native

Floats = np.ndarray[Any, np.dtype[np.float32]]

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
ACTIVATIONS = {"silu": 0, "relu2": 1}
MODES = {"int8": 0, "exact": 1}
MASK = 2**64 - 1  # of a seed


class _Linear(Structure):
    _fields_ = (("matrix", c_void_p), ("gain", c_void_p), ("eps", c_float), ("rounded", c_int))


class _Layer(Structure):
    _fields_ = (
        *((name, _Linear) for name in LINEARS),
        *((name, c_void_p) for name in NORMS),
        ("rope", c_int),
        ("window", c_int),
    )


SIZES = ("vocab", "hidden", "intermediate", "num_layers", "heads", "kv_heads", "head_dim")


class _Model(Structure):
    _fields_ = (
        *((name, c_int) for name in SIZES),
        *((name, c_int) for name in ("context", "slots", "max_rows")),
        ("eps", c_float),
        ("rope_scale", c_float),
        ("activation", c_int),
        ("mode", c_int),
        ("half_cache", c_int),
        ("frequencies", c_void_p),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("head", _Linear),
        ("layers", POINTER(_Layer)),
    )


class CSampling(Structure):
    """`wf_sampling`."""

    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("repetition_penalty", c_float),
        ("top_k", c_int),
        ("seed", c_uint64),
        ("counter", c_uint64),
    )


class _Append(Structure):
    _fields_ = (
        ("slot", c_int),
        ("length", c_int),
        ("tokens", POINTER(c_int32)),
        ("sampling", POINTER(CSampling)),
        ("next", POINTER(c_int32)),
        ("logits", POINTER(c_float)),
    )


@dataclass(frozen=True)
class Linear:
    """A matrix, the norm of its inputs (gain [in]) where it has one, and whether it was trained on 8-bit inputs."""

    matrix: native.Matrix
    gain: Floats | None = None
    eps: float = 0.0
    rounded: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer: `linears` by the names in `LINEARS`, `norms` by those in `NORMS`; the last two may be missing."""

    linears: Mapping[str, Linear]
    norms: Mapping[str, Floats]
    rope: bool = True
    window: int = 0


@dataclass(frozen=True)
class Model:
    """All that a decoder needs to know. `sizes` by the names in `SIZES`, frequencies [head_dim / 2]."""

    sizes: Mapping[str, int]
    eps: float
    frequencies: Floats
    rope_scale: float
    activation: str
    embedding: native.Matrix
    norm: Floats
    head: Linear
    layers: Sequence[Layer]


@dataclass
class Append:
    """`tokens` to put at the end of the sequence in `slot`; with `sampling`, a token is chosen to follow them."""

    slot: int
    tokens: Sequence[int]
    sampling: CSampling | None = None
    logits: Floats | None = None  # [vocab], filled in


class Decoder:
    """A native decoder. Keeps what it borrows alive; `close` or the garbage collector gives its memory back."""

    def __init__(
        self,
        pool: native.Pool,
        model: Model,
        *,
        context: int,
        slots: int,
        max_rows: int,
        mode: Literal["int8", "exact"],
        half_cache: bool = False,
    ) -> None:
        self._lib = _library()
        self._pool, self._model = pool, model
        self.context, self.slots, self.max_rows = context, slots, max_rows
        described, layers = _described(model, MODES[mode])
        described.context, described.slots, described.max_rows = context, slots, max_rows
        described.half_cache = half_cache
        self._handle = self._lib.wf_decoder_new(pool.handle, ctypes.byref(described))
        del layers  # was borrowed until here
        if not self._handle:
            raise ValueError(_why(self._lib))
        self._appends = (_Append * slots)()
        self._chosen = [c_int32() for _ in range(slots)]
        self._to_chosen = [ctypes.pointer(token) for token in self._chosen]

    def step(self, appends: Sequence[Append]) -> list[int | None]:
        """Append all of them; for each that has a sampling, the token it chose."""
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
        self._check(self._lib.wf_decoder_step(self._handle, self._appends, len(appends)))
        return [None if append.sampling is None else self._chosen[i].value for i, append in enumerate(appends)]

    def _check(self, code: int) -> None:
        if code:
            raise ValueError(_why(self._lib))

    def length(self, slot: int) -> int:
        """Tokens in the cache of `slot`."""
        return int(self._lib.wf_decoder_length(self._handle, slot))

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._check(self._lib.wf_decoder_truncate(self._handle, slot, length))

    def clear(self, slot: int) -> None:
        """Forget all tokens and give the memory back."""
        self._check(self._lib.wf_decoder_clear(self._handle, slot))

    def bytes(self) -> int:
        """Memory of caches and buffers."""
        return int(self._lib.wf_decoder_bytes(self._handle))

    def weight_bytes(self) -> int:
        """Memory of the model's matrices, one that serves twice counted once."""
        linears = [self._model.head, *(linear for layer in self._model.layers for linear in layer.linears.values())]
        matrices = {id(m): m for m in (self._model.embedding, *(linear.matrix for linear in linears))}
        return sum(matrix.nbytes for matrix in matrices.values())

    def close(self) -> None:
        """Give everything back; nothing works after it."""
        if self._handle:
            self._lib.wf_decoder_free(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if "_handle" in vars(self):
            self.close()


def sample(logits: Floats, history: Sequence[int], sampling: CSampling) -> int:
    """The token that a decoder would choose from logits [vocab]."""
    values = np.ascontiguousarray(logits, dtype=np.float32)
    tokens = (c_int32 * len(history))(*history)
    library = _library()
    token = int(library.wf_sample(values.ctypes.data, len(values), tokens, len(history), ctypes.byref(sampling)))
    if token < 0:
        raise ValueError(_why(library))
    return token


def _why(library: ctypes.CDLL) -> str:
    return str(library.wf_error().decode())


@cache
def _library() -> ctypes.CDLL:
    """The library, its decoder's functions declared."""
    lib = native.load()
    handle, model = c_void_p, POINTER(_Model)
    declared: dict[str, tuple[list[Any], Any]] = {
        "wf_decoder_new": ([handle, model], handle),
        "wf_decoder_free": ([handle], None),
        "wf_decoder_step": ([handle, POINTER(_Append), c_int], c_int),
        "wf_decoder_length": ([handle, c_int], c_int),
        "wf_decoder_truncate": ([handle, c_int, c_int], c_int),
        "wf_decoder_clear": ([handle, c_int], c_int),
        "wf_decoder_bytes": ([handle], c_size_t),
        "wf_sample": ([c_void_p, c_int, POINTER(c_int32), c_int, POINTER(CSampling)], c_int32),
    }
    for name, (arguments, result) in declared.items():
        function = lib[name]
        function.argtypes, function.restype = arguments, result
        setattr(lib, name, function)
    return lib


def _described(model: Model, mode: int) -> tuple[_Model, Any]:
    """The C struct of a model, and what it points to."""
    kept: list[Any] = []

    def address(values: Floats | None) -> int | None:
        if values is None:
            return None
        kept.append(np.ascontiguousarray(values, dtype=np.float32))
        return int(kept[-1].ctypes.data)

    def linear(one: Linear) -> _Linear:
        return _Linear(one.matrix.handle, address(one.gain), one.eps, one.rounded)

    layers = (_Layer * len(model.layers))()
    for to, layer in zip(layers, model.layers, strict=True):
        for name in LINEARS:
            setattr(to, name, linear(layer.linears[name]))
        for name in NORMS:
            setattr(to, name, address(layer.norms.get(name)))
        to.rope, to.window = layer.rope, layer.window
    described = _Model(eps=model.eps, rope_scale=model.rope_scale, activation=ACTIVATIONS[model.activation], mode=mode)
    for name in SIZES:
        setattr(described, name, model.sizes[name])
    described.frequencies, described.norm = address(model.frequencies), address(model.norm)
    described.embedding, described.head, described.layers = model.embedding.handle, linear(model.head), layers
    return described, (layers, kept)
