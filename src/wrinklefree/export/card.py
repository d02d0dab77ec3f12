"""The model card: what the model is, how to load it, how it was made, the commands for it, its size and certificate.

`export/formats/packed.py` writes the last two itself, since it knows more of them.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from wrinklefree.config.schema import Config
from wrinklefree.core.method import Coverage, quant_layers
from wrinklefree.export.origin import Origin
from wrinklefree.tracking.terminal import markdown_table

PACKAGES = ("wrinklefree", "torch", "transformers")
TRANSFORMERS = "transformers"  # the library that reads a folder, if its format names no other
SAFETENSORS = "*.safetensors"  # its weights, if the format names no others
SAFETY = ("name", "allow_partial")  # settings of a method that say nothing about the model
NO_TRAINING = {"training": "none: 0 steps, 0 tokens", "learning rate": "none"}


@dataclass(frozen=True)
class Card:
    """What the cards of a model say, whatever the format. Folders of this machine have their last name only."""

    config: Config
    origin: Origin
    coverage: Coverage  # of the blocks' weights: how many are quantized
    command: str  # that trains the model
    run: str  # the folder that this command writes, or the checkpoint in it
    training: Mapping[str, str] = field(default_factory=lambda: NO_TRAINING)  # rows on how it was trained
    quality: str = ""  # a section with the measured figures

    def beginning(self, use: str, exported: str | None = None, library: str = TRANSFORMERS) -> str:
        """Return the beginning of README.md. `exported` are the options of the `wf export` that wrote the folder.

        `use` is the section on how to load it, `library` the hub's name for what reads it.
        """
        parts = [
            *("---", *self._front(library), "---", ""),
            f"# {self.config.model.name}, {self.config.method.name} {self.config.training.stage}\n",
            f"{self._sentence()}\n",
            f"## Use\n\n{use.strip()}\n",
            f"## How it was made\n\n{markdown_table(['', 'value'], self._made())}\n",
            markdown_table(["setting of the method", "value"], settings_of(self.config.method)),
            f"\nTo make it again:\n\n```bash\n{self._commands(exported)}\n```\n",
        ]
        return "\n".join([*parts, self.quality] if self.quality else parts)

    def _front(self, library: str) -> list[str]:
        """The front matter, which hubs read."""
        origin = self.origin
        return [
            f"library_name: {library}",
            "pipeline_tag: text-generation",
            *([f"license: {origin.licence}"] if origin.licence else []),
            *([f"base_model: {origin.base_model}"] if origin.base_model else []),
            f"tags: [wrinklefree, quantization-aware-training, {self.config.method.name}]",
        ]

    def _sentence(self) -> str:
        method = self.config.method
        bits = "" if method.weight_bits is None else f" at {method.weight_bits:g} bits per weight"
        return f"`{self.origin.name}`, quantized with wrinklefree's method `{method.name}`{bits}."

    def _made(self) -> list[list[str]]:
        """The rows of the table of how a model was made."""
        config, bits = self.config, self.config.method.weight_bits
        versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
        return [
            ["base model", self.origin.words],
            ["licence", self.origin.licence_words],
            ["method", config.method.name],
            ["bits per weight, before scales", "by layer, see the settings" if bits is None else f"{bits:g}"],
            ["of the blocks' weights, quantized", f"{self.coverage.share:.2%}"],
            ["data", data_words(config)],
            ["objective", f"{config.training.objective}, distillation={config.distillation.name}"],
            *([name, value] for name, value in self.training.items()),
            ["seed", str(config.seed)],
            ["written with", versions],
        ]

    def _commands(self, exported: str | None) -> str:
        return self.command if exported is None else f"{self.command}\nwf export {self.run} {exported}"


def settings_of(method: Any) -> list[list[str]]:
    """The rows of a method's settings. Those that are off or empty are left out."""
    shown = {key: value for key, value in vars(method).items() if key not in SAFETY and value not in (None, [])}
    return [[key, ", ".join(value) if isinstance(value, list) else str(value)] for key, value in shown.items()]


def data_words(config: Config) -> str:
    """What a model was trained on."""
    data = config.data
    if config.distillation.cache is not None:
        return f"a teacher's answers, in the cache {Path(config.distillation.cache).name}"
    name = data.path or ""
    if data.source != "hub":
        name = Path(name).name
    words = {
        "stdlib": "the source of Python's standard library",
        "local": f"local files, {name}",
        "hub": f"the dataset {name}" + (f", {data.subset}" if data.subset else ""),
        "downstream": f"the task {data.task}",
        "self": "text that the base model wrote itself",
    }
    return f"{words[data.source]} (data={data.source})"


def sizes(model: PreTrainedModel, folder: Path, weights: str) -> str:
    """The section on the size of the files or folders in `folder` that the glob `weights` finds, or of all of it."""
    found = sorted(folder.glob(weights))
    files = [file for path in found or [folder] for file in (path, *path.rglob("*")) if file.is_file()]
    num_bytes, num_weights = sum(file.stat().st_size for file in files), weights_of(model)
    name = found[0].name if len(found) == 1 else f"{len(files)} files"
    rows = [
        [name, f"{num_bytes:,} bytes"],
        ["bits per weight, whole model", f"{8 * num_bytes / num_weights:.4f}"],
        ["parameters", f"{num_weights:,}"],
        ["unquantized, in bf16", f"{2 * num_weights:,} bytes"],
    ]
    return f"## Size\n\n{markdown_table(['size', 'value'], rows)}\n"


def weights_of(model: PreTrainedModel) -> int:
    """The number of weights of a quantized model, without the scales that its layers train beside them."""
    scales = {
        id(parameter)
        for layer in quant_layers(model).values()
        for name, parameter in layer.named_parameters(recurse=False)
        if name not in ("weight", "bias")
    }
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in scales)


def certificate(format: str, table: list[list[str]]) -> str:
    """The comparison `table` as a section."""
    how = f"The export to `{format}` was read back and compared with the trained model:"
    return f"## Certificate\n\n{how}\n\n{markdown_table(['read back and compared', 'value'], table)}\n"
