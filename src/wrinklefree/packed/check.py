"""Checks the section `quantization_config` of a packed folder before a layer is built from it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from wrinklefree.config.base import first_problem
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, find
from wrinklefree.packed.layer import LayerSpec, PackedLinear
from wrinklefree.packed.quantizer import FORMAT

WIDTHS = (1, 2, 3, 4, 8)  # bits of a code

TABLE = "lut"  # the tensor that codes point into, in the methods that have one

LARGEST = 2**24  # of each size below; more would be a matrix of hundreds of gigabytes

T = TypeVar("T")


@dataclass
class Quantization:
    """The section `quantization_config` of config.json."""

    quant_method: str = ""
    format: int = 1
    method: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    tied: dict[str, str] | None = None
    stacks: dict[str, int] | None = None


class PackedSection:
    """The checked section of one folder."""

    def __init__(self, folder: Path, values: Any) -> None:
        """Raises UserError if the section cannot be read, or a newer version wrote it."""
        self.folder = folder
        self._adapters: dict[type, TypeAdapter[Any]] = {}
        quantization = self._typed(Quantization, values)
        if quantization.format > FORMAT:
            raise UserError(f"{folder}: packed format {quantization.format}, this version reads to {FORMAT}: upgrade")
        self.layers, self.tied = quantization.layers, quantization.tied or {}
        self.stacks = quantization.stacks or {}
        self._method_values = quantization.method

    def spec(self, fqn: str) -> tuple[LayerSpec, QuantMethod]:
        """The shapes of the layer `fqn`, and its method.

        Raises UserError if the method cannot decode codes and scales of these shapes to a weight of this shape.
        """
        spec = self._typed(LayerSpec, self.layers[fqn])
        sizes = [*spec.shape, *spec.index_shape, *(size for shape in spec.tensors.values() for size in shape)]
        if len(spec.shape) != 2 or not spec.index_shape or not all(1 <= size <= LARGEST for size in sizes):
            raise UserError(f"{self.folder}: {fqn} is packed as {spec.shape} with codes of {spec.index_shape}")
        if spec.bits not in WIDTHS:
            raise UserError(f"{self.folder}: {fqn} has codes of {spec.bits} bits, not one of {WIDTHS}")
        if spec.tensors.get(TABLE, [2**spec.bits]) != [2**spec.bits]:
            raise UserError(f"{self.folder}: {fqn} has {spec.bits} bits and a table of {spec.tensors[TABLE]} entries")
        method = self._method(self._method_values if spec.method is None else spec.method).config_for(fqn)
        self._check_decoding(fqn, spec, method)
        return spec, method

    def _check_decoding(self, fqn: str, spec: LayerSpec, method: QuantMethod) -> None:
        """Decode the layer without data: the meta device computes shapes alone."""
        try:
            with torch.device("meta"):
                decoded = list(method.decode(PackedLinear(method, spec).codes()).shape)
        except (RuntimeError, LookupError, ValueError, TypeError) as error:  # torch's, for shapes that do not fit
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder}: {fqn}: {method.name} cannot decode such codes ({reason})") from error
        if decoded != list(spec.shape):
            raise UserError(f"{self.folder}: {fqn} decodes to {decoded}, but it says {spec.shape}")

    def _typed(self, cls: type[T], values: Any) -> T:
        """Check a part of the section and return it as the dataclass `cls`. Raises UserError if it does not fit."""
        try:
            if cls not in self._adapters:  # making one takes longer than using it for a layer
                self._adapters[cls] = TypeAdapter(cls)
            # Strict, since transformers gets the values as they are; as JSON, where a list may stand for a tuple.
            checked: T = self._adapters[cls].validate_json(json.dumps(values), strict=True)
            return checked
        except ValidationError as error:
            raise UserError(f"{self.folder}: config.json, quantization_config: {first_problem(error)}") from error

    def _method(self, values: Any) -> QuantMethod:
        """The method's config. Raises UserError if the method is unknown or its settings do not fit."""
        name = values.get("name") if isinstance(values, dict) else None
        return self._typed(find(str(name)), values)
