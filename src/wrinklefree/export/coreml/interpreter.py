"""Runs a Core ML program that was read back from its package, with torch, operation by operation.

Core ML itself predicts on macOS only. This follows coremltools' descriptions of the operations. It shows that the model
is what lies on the disk, but not what Apple's compiler makes of it, nor how fast it is.
Arithmetic is fp32. With `rounded`, every result is rounded to fp16, as on the device.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools as ct
import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load
from torch import Tensor, nn

from wrinklefree.core.ste import round_fp16

Operation = Any  # of a program; coremltools has no annotations
Values = dict[str, Any]


def functions(package: Path) -> dict[str, Any]:
    """Return the functions of a package by name, weights included."""
    model = ct.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    by_name: dict[str, Any] = load(spec, spec.specificationVersion, model.weights_dir).functions
    return by_name


class Decoder(nn.Module):
    """Calls a package's `prefill` and `decode` like a transformers model, on ids [1, L]."""

    def __init__(self, loaded: Mapping[str, Any], rounded: bool = False) -> None:
        super().__init__()
        self.prefill, self.decode = (Function(loaded[name], rounded) for name in ("prefill", "decode"))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Return an object with `logits`, fp32 [1, L, vocabulary]. Each call starts with an empty cache."""
        length = input_ids.shape[1]
        states = self.decode.new_states()
        pieces = []
        for function, start, end in self._steps(length):
            feed = {"input_ids": input_ids[:, start:end].cpu(), "position": torch.tensor([start])}
            pieces.append(function(feed, states)["logits"])
        return SimpleNamespace(logits=torch.cat(pieces, 1).to(input_ids.device))

    def _steps(self, length: int) -> Iterator[tuple["Function", int, int]]:
        """Yield (function, start, end): `prefill` as often as it fits, then `decode` for each remaining id.

        At least one id is left for `decode`, so that both functions, and the cache between them, are tested.
        """
        width = self.prefill.shapes["input_ids"][1]
        chunks = (length - 1) // width
        yield from ((self.prefill, k * width, (k + 1) * width) for k in range(chunks))
        yield from ((self.decode, k, k + 1) for k in range(chunks * width, length))


class Function:
    """One function of a program, ready to be called."""

    def __init__(self, function: Any, rounded: bool = False) -> None:
        self.rounded = rounded
        self.shapes = {name: tuple(var.shape) for name, var in function.inputs.items() if not _is_state(var)}
        self.state_shapes = {name: _state_shape(var) for name, var in function.inputs.items() if _is_state(var)}
        self.outputs = [var.name for var in function.outputs]
        self.constants: Values = {}
        self.operations = []
        for operation in function.operations:
            if operation.op_type == "const" or operation.op_type.startswith("constexpr_"):
                self.constants[operation.outputs[0].name] = _constant(operation)
            else:
                self.operations.append(operation)

    def new_states(self) -> Values:
        """Return states full of zeros. A call changes them in place."""
        return {name: torch.zeros(shape) for name, shape in self.state_shapes.items()}

    @torch.no_grad()
    def __call__(self, feed: Values, states: Values) -> Values:
        """Run all operations and return the outputs by name."""
        values = self.constants | feed | {name: name for name in states}
        for operation in self.operations:
            arguments = {name: _argument(values, given) for name, given in operation.inputs.items()}
            if operation.op_type in STATES:
                results = STATES[operation.op_type](states, **arguments)
            else:
                results = OPERATIONS[operation.op_type](**arguments)
            results = results if isinstance(results, tuple) else (results,)
            for var, result in zip(operation.outputs, results, strict=True):
                assert tuple(var.shape) == tuple(result.shape), f"{var.name}: {var.shape} and {tuple(result.shape)}"
                values[var.name] = self._kept(result)
        return {name: values[name] for name in self.outputs}

    def _kept(self, x: Tensor) -> Tensor:
        return round_fp16(x) if self.rounded and x.is_floating_point() else x


def _is_state(var: Any) -> bool:
    return bool(ct.converters.mil.mil.types.is_state(var.sym_type))


def _state_shape(var: Any) -> tuple[int, ...]:
    return tuple(var.sym_type.wrapped_type().get_shape())


def _constant(operation: Operation) -> Any:
    """Return a constant as a tensor (fp32, int64 or bool), or as a plain string or bool."""
    packed = operation.op_type.startswith("constexpr_")
    value = operation.materialized_val_inference() if packed else operation.outputs[0].val
    if isinstance(value, (str, bool, np.bool_)):
        return value
    array = np.asarray(value)
    kinds = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}
    return torch.from_numpy(array.astype(kinds[array.dtype.kind]))


def _argument(values: Values, given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return [values[var.name] for var in given]
    return None if given is None else values[given.name]


def _ints(x: Tensor) -> list[int]:
    return [int(i) for i in x.tolist()]


def _slice_by_size(x: Tensor, begin: Tensor, size: Tensor, **_: Any) -> Tensor:
    return x[tuple(slice(b, b + s) for b, s in zip(_ints(begin), _ints(size), strict=True))]


def _slice_update(x: Tensor, update: Tensor, begin: Tensor, end: Tensor, **_: Any) -> Tensor:
    changed = x.clone()
    changed[tuple(slice(b, e) for b, e in zip(_ints(begin), _ints(end), strict=True))] = update
    return changed


def _gather(x: Tensor, indices: Tensor, axis: Tensor, **_: Any) -> Tensor:
    assert int(axis) == 0
    return x[indices]


def _layer_norm(x: Tensor, axes: Tensor, gamma: Tensor, epsilon: Tensor, **_: Any) -> Tensor:
    (axis,) = _ints(axes)
    last = x.movedim(axis, -1)
    return F.layer_norm(last, last.shape[-1:], gamma, None, float(epsilon)).movedim(-1, axis)


def _matmul(x: Tensor, y: Tensor, transpose_x: Any, transpose_y: Any, **_: Any) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _linear(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return F.linear(x, weight)


def _expand_dims(x: Tensor, axes: Tensor, **_: Any) -> Tensor:
    (axis,) = _ints(axes)
    return x.unsqueeze(axis)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "less": lambda x, y: x < y,
    "greater_equal": lambda x, y: x >= y,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "cast": lambda x, dtype: x.float() if dtype == "fp16" else x,
    "identity": lambda x: x,
    "silu": lambda x: F.silu(x),
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "conv": lambda x, weight, **_: F.conv2d(x, weight),
    "linear": _linear,
    "matmul": _matmul,
    "layer_norm": _layer_norm,
    "reduce_sum": lambda x, axes, keep_dims: x.sum(_ints(axes), keepdim=bool(keep_dims)),
    "gather": _gather,
    "concat": lambda values, axis, **_: torch.cat(values, int(axis)),
    "split": lambda x, num_splits, axis: x.chunk(int(num_splits), int(axis)),
    "reshape": lambda x, shape: x.reshape(_ints(shape)),
    "transpose": lambda x, perm: x.permute(_ints(perm)),
    "squeeze": lambda x, axes: x.squeeze(_ints(axes)),
    "expand_dims": _expand_dims,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
}


def _read(states: Values, input: str) -> Tensor:
    value: Tensor = states[input]
    return value


def _write(states: Values, state: str, value: Tensor) -> Tensor:
    states[state] = value
    return value


STATES: dict[str, Callable[..., Any]] = {"read_state": _read, "coreml_update_state": _write}
