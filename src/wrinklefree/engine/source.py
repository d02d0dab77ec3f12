"""Sources of the native decoder's weights: a model in memory, or a folder that is read layer by layer.

A folder is read without building the model, so that only one layer is unpacked at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.core.inputs import PlainRMSNorm
from wrinklefree.core.method import QuantMethod, find
from wrinklefree.packed.layer import LayerSpec, PackedLinear, TiedEmbedding
from wrinklefree.packed.quantizer import FORMAT

WIDTHS = (1, 2, 3, 4, 8)  # bits of a code

T = TypeVar("T")


class Source(Protocol):
    """Weights, by the names that transformers gives them."""

    config: PreTrainedConfig
    generation: GenerationConfig

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The parameter `name`. Raises UserError if it is missing or has another shape."""

    def embedding(self, fqn: str, shape: Sequence[int]) -> Tensor | PackedLinear | None:
        """The weight of an embedding, or None if it shares its rows with the packed output head."""

    def linear(self, fqn: str, shape: Sequence[int], bias: bool) -> nn.Linear | PackedLinear:
        """The linear layer `fqn` of shape [out, in]. `bias` says whether it has a bias, if it is not packed."""

    def has(self, name: str) -> bool:
        """Whether there is a parameter `name`."""


class ModelSource:
    """The weights of a loaded model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self.generation = model.config, model.generation_config
        self._model = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        if not self.has(name):
            raise UserError(f"{name}: this model has no such weight")
        return self._parameters[name].detach().cpu()

    def embedding(self, fqn: str, shape: Sequence[int]) -> Tensor | PackedLinear | None:
        layer = self._model.get_submodule(fqn)
        if isinstance(layer, TiedEmbedding):
            return None
        return layer if isinstance(layer, PackedLinear) else self.tensor(f"{fqn}.weight", shape)

    def linear(self, fqn: str, shape: Sequence[int], bias: bool) -> nn.Linear | PackedLinear:
        layer = self._model.get_submodule(fqn)
        if not isinstance(layer, (nn.Linear, PackedLinear)):
            raise UserError(f"{fqn}: a {type(layer).__name__} is not a linear layer")
        return layer

    def has(self, name: str) -> bool:
        return name in self._parameters


@dataclass
class Quantization:
    """The section `quantization_config` of config.json."""

    quant_method: str = ""
    format: int = 1
    method: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    tied: dict[str, str] | None = None


class FolderSource:
    """The weights of a folder with config.json and safetensors."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder's config cannot be read, or a file is damaged."""
        self.folder = folder
        self._adapters: dict[type, TypeAdapter[Any]] = {}
        try:
            self.config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            # If a value has the wrong type, each model class of transformers fails in its own way.
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: config.json is no model of transformers ({reason})") from error
        has_defaults = (folder / "generation_config.json").is_file()
        self.generation = GenerationConfig.from_pretrained(folder) if has_defaults else GenerationConfig()
        self._files = open_files(folder)
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  # not a dict
        quantization = self._typed(Quantization, self.config.to_dict().get("quantization_config") or {})
        if quantization.format > FORMAT:
            raise UserError(f"{folder}: packed in format {quantization.format}, newer than {FORMAT}: upgrade")
        self._specs, self._values, self._tied = quantization.layers, quantization.method, quantization.tied or {}

    def has(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        if not self.has(name):
            raise UserError(f"{self.folder}: {name} is missing")
        stored = self._file_of[name].get_slice(name).get_shape()  # from the file's header: nothing is read yet
        if list(stored) != list(shape):
            raise UserError(f"{self.folder}: {name} has the shape {stored}, config.json says {list(shape)}")
        loaded: Tensor = self._file_of[name].get_tensor(name)
        return loaded

    def embedding(self, fqn: str, shape: Sequence[int]) -> Tensor | PackedLinear | None:
        if fqn in self._tied:
            return None
        return self._packed(fqn, shape) if fqn in self._specs else self.tensor(f"{fqn}.weight", shape)

    def linear(self, fqn: str, shape: Sequence[int], bias: bool) -> nn.Linear | PackedLinear:
        if fqn in self._specs:
            return self._packed(fqn, shape)
        with torch.device("meta"):
            layer = nn.Linear(shape[1], shape[0], bias=bias)
        layer.weight = _frozen(self.tensor(f"{fqn}.weight", shape))
        if bias:
            layer.bias = _frozen(self.tensor(f"{fqn}.bias", shape[:1]))
        return layer

    def _packed(self, fqn: str, shape: Sequence[int]) -> PackedLinear:
        """Read the packed layer `fqn`. Raises UserError if its shape or a dtype is not the expected one."""
        spec = self._typed(LayerSpec, self._specs[fqn])
        method = self._method(self._values if spec.method is None else spec.method)
        if list(spec.shape) != list(shape) or spec.bits not in WIDTHS or not spec.index_shape:
            raise UserError(f"{self.folder}: {fqn} is packed as {spec.shape}, the model needs {list(shape)}")
        stored = {name: self.tensor(f"{fqn}.{name}", size) for name, size in spec.tensors.items()}
        stored["weight"] = self.tensor(f"{fqn}.weight", spec.packed_shape)
        with torch.device("meta"):
            layer = PackedLinear(method.config_for(fqn), spec)
        for name, tensor in stored.items():
            wanted = layer.get_buffer(name).dtype
            if tensor.dtype != wanted:
                raise UserError(f"{self.folder}: {fqn}.{name} is {tensor.dtype}, not {wanted}: export the model again")
            setattr(layer, name, tensor)
        if spec.bias:
            layer.bias = _frozen(self.tensor(f"{fqn}.bias", shape[:1]))
        if spec.norm_eps is not None:
            layer.rms_norm = PlainRMSNorm(self.tensor(f"{fqn}.rms_norm.weight", shape[1:]), spec.norm_eps)
        return layer

    def _typed(self, cls: type[T], values: Any) -> T:
        """Check a part of config.json and return it as the dataclass `cls`. Raises UserError if it does not fit."""
        try:
            if cls not in self._adapters:  # making one takes longer than using it for a layer
                self._adapters[cls] = TypeAdapter(cls)
            checked: T = self._adapters[cls].validate_python(values)
            return checked
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{self.folder}: config.json, quantization_config: {where}: {first['msg']}") from error

    def _method(self, values: Any) -> QuantMethod:
        """The method's config. Raises UserError if the method is unknown or its settings do not fit."""
        name = values.get("name") if isinstance(values, dict) else None
        return self._typed(find(str(name)), values)


def open_files(folder: Path) -> list[Any]:
    """Open all safetensors files of a folder. Raises UserError if there is none or a file's header is damaged."""
    files = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            files.append(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged ({error}); copy or export it again") from error
    if not files:
        raise UserError(f"{folder}: no safetensors files in it")
    return files


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
