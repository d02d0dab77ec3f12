"""Sources of the native decoder's weights: a model in memory, or a folder that is read layer by layer.

A folder is read without building the model, so that only one layer is unpacked at a time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wrinklefree.core.errors import UserError
from wrinklefree.core.inputs import PlainRMSNorm
from wrinklefree.core.method import QuantLinear, find
from wrinklefree.core.numbers import not_numbers
from wrinklefree.families.foreign import refused_in_one_line
from wrinklefree.packed.check import PackedSection
from wrinklefree.packed.layer import PackedLinear, TiedEmbedding
from wrinklefree.packed.pack import pack_layer


class Source(Protocol):
    """Weights, by the names that transformers gives them."""

    config: PreTrainedConfig
    generation: GenerationConfig

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The parameter `name`. Raises UserError if it is missing or has another shape."""

    def embedding(self, fqn: str, shape: Sequence[int]) -> Tensor | PackedLinear | None:
        """The weight of an embedding, or None if it shares its rows with the packed output head."""

    def numbers(self, name: str, shape: Sequence[int]) -> Tensor:
        """The parameter `name`. Raises UserError for the same reasons, and if its values are not finite numbers."""

    def linear(self, fqn: str, shape: Sequence[int], bias: bool, turned: bool = False) -> nn.Linear | PackedLinear:
        """The linear layer `fqn` of shape [out, in].

        If it is not packed, `bias` says whether it has a bias, and `turned` whether its weight is stored as [in, out].
        """

    def expert(self, fqn: str, number: int, shape: Sequence[int]) -> nn.Linear | PackedLinear:
        """Matrix [out, in] of one expert from the tensor `fqn` [experts, out, in]."""

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

    def numbers(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.tensor(name, shape)

    def embedding(self, fqn: str, shape: Sequence[int]) -> Tensor | PackedLinear | None:
        layer = self._model.get_submodule(fqn)
        if isinstance(layer, TiedEmbedding):
            return None
        return layer if isinstance(layer, PackedLinear) else self.tensor(f"{fqn}.weight", shape)

    def linear(self, fqn: str, shape: Sequence[int], bias: bool, turned: bool = False) -> nn.Linear | PackedLinear:
        layer = self._model.get_submodule(fqn)
        if isinstance(layer, Conv1D):
            return _plain(layer.weight.detach().T, layer.bias)
        if not isinstance(layer, (nn.Linear, PackedLinear)):
            raise UserError(f"{fqn}: a {type(layer).__name__} is not a linear layer")
        return layer

    def expert(self, fqn: str, number: int, shape: Sequence[int]) -> nn.Linear | PackedLinear:
        if fqn in self._parameters:
            return _plain(self.tensor(fqn, shape)[number])
        return self.linear(f"{fqn}.{number}", shape, bias=False)

    def has(self, name: str) -> bool:
        return name in self._parameters


class RoundedSource(ModelSource):
    """The weights of a loaded model, rounded to 8-bit integers as they are read, with a scale per row.

    Packed layers stay as they are, and norms stay in floating point.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        settings: dict[str, Any] = {"bits": 8, "granularity": "row", "scale_mode": "absmax"}
        self._method = find("uniform")(**settings)

    def embedding(self, fqn: str, shape: Sequence[int]) -> Tensor | PackedLinear | None:
        found = super().embedding(fqn, shape)
        return self._rounded(found, None) if isinstance(found, Tensor) else found

    def linear(self, fqn: str, shape: Sequence[int], bias: bool, turned: bool = False) -> nn.Linear | PackedLinear:
        layer = super().linear(fqn, shape, bias)
        return layer if isinstance(layer, PackedLinear) else self._rounded(layer.weight, layer.bias)

    def expert(self, fqn: str, number: int, shape: Sequence[int]) -> nn.Linear | PackedLinear:
        layer = super().expert(fqn, number, shape)
        return layer if isinstance(layer, PackedLinear) else self._rounded(layer.weight, None)

    @torch.no_grad()
    def _rounded(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = _frozen(weight.detach().cpu().float())
        layer: QuantLinear = self._method.layer(plain, self._method)
        return pack_layer(PackedLinear, self._method, layer.encode(), bias)


class FolderSource:
    """The weights of a folder with config.json and safetensors."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder's config cannot be read, or a file is damaged."""
        self.folder = folder
        with refused_in_one_line(f"{folder}: config.json is no model of transformers"):
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.generation = GenerationConfig()
        if (folder / "generation_config.json").is_file():
            with refused_in_one_line(f"{folder / 'generation_config.json'}: not settings of transformers"):
                self.generation = GenerationConfig.from_pretrained(folder)
        self._files = open_files(folder)
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  # not a dict
        self._section = PackedSection(folder, self.config.to_dict().get("quantization_config") or {})

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

    def numbers(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a tensor of finite floating-point numbers. Raises UserError if it is none."""
        loaded = self.tensor(name, shape)
        problem = not_numbers(loaded)
        if problem:
            raise UserError(f"{self.folder}: {name} {problem}")
        return loaded

    def embedding(self, fqn: str, shape: Sequence[int]) -> Tensor | PackedLinear | None:
        if fqn in self._section.tied:
            return None
        return self._packed(fqn, shape) if fqn in self._section.layers else self.numbers(f"{fqn}.weight", shape)

    def linear(self, fqn: str, shape: Sequence[int], bias: bool, turned: bool = False) -> nn.Linear | PackedLinear:
        if fqn in self._section.layers:
            return self._packed(fqn, shape)
        weight = self.numbers(f"{fqn}.weight", shape[::-1] if turned else shape)
        return _plain(weight.T if turned else weight, self.numbers(f"{fqn}.bias", shape[:1]) if bias else None)

    def expert(self, fqn: str, number: int, shape: Sequence[int]) -> nn.Linear | PackedLinear:
        if f"{fqn}.{number}" in self._section.layers:
            return self._packed(f"{fqn}.{number}", shape)
        stored = self._file_of[fqn].get_slice(fqn).get_shape() if self.has(fqn) else []
        if stored[1:] != list(shape) or number >= stored[0]:
            raise UserError(
                f"{self.folder}: {fqn} has the shape {stored}, config.json says [..., {shape[0]}, {shape[1]}]"
            )
        weight = self._file_of[fqn].get_slice(fqn)[number]
        problem = not_numbers(weight)
        if problem:
            raise UserError(f"{self.folder}: {fqn} {problem}")
        return _plain(weight)

    def _packed(self, fqn: str, shape: Sequence[int]) -> PackedLinear:
        """Read the packed layer `fqn`. Raises UserError if its shape or a dtype is not the expected one."""
        spec, method = self._section.spec(fqn)
        if list(spec.shape) != list(shape):
            raise UserError(f"{self.folder}: {fqn} is packed as {spec.shape}, the model needs {list(shape)}")
        stored = {name: self.numbers(f"{fqn}.{name}", size) for name, size in spec.tensors.items()}
        stored["weight"] = self.tensor(f"{fqn}.weight", spec.packed_shape)
        with torch.device("meta"):
            layer = PackedLinear(method, spec)
        for name, tensor in stored.items():
            wanted = layer.get_buffer(name).dtype
            if tensor.dtype != wanted:
                raise UserError(f"{self.folder}: {fqn}.{name} is {tensor.dtype}, not {wanted}: export the model again")
            setattr(layer, name, tensor)
        if spec.bias:
            layer.bias = _frozen(self.numbers(f"{fqn}.bias", shape[:1]))
        if spec.norm_eps is not None:
            layer.rms_norm = PlainRMSNorm(self.numbers(f"{fqn}.rms_norm.weight", shape[1:]), spec.norm_eps)
        return layer


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


def _plain(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with this weight [out, in], which is not copied if it is contiguous."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = _frozen(weight.detach().contiguous())
    if bias is not None:
        layer.bias = _frozen(bias.detach())
    return layer


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
