"""The first part of the model card: what the model is, and how it was made.

`export/formats/packed.py` adds how to load it, its sizes and the certificate.
"""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

from wrinklefree.config.schema import Config
from wrinklefree.tracking.terminal import markdown_table

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MOST_CHARACTERS = 65_536  # that are read of another model's card
PACKAGES = ("wrinklefree", "torch", "transformers")


def card(config: Config, training: Mapping[str, str] | None = None) -> str:
    """Return the beginning of README.md for a run that quantizes. `training` adds rows on how it was made.

    Folders of this machine are named by their last part only.
    """
    base = Path(config.model.pretrained)
    here = base.is_dir() or not HUB_ID.fullmatch(config.model.pretrained)
    method = config.method.name
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    licence = licence_of(base) if here else None
    front += [f"license: {licence}"] if licence else []
    front += [] if here else [f"base_model: {config.model.pretrained}"]
    front += [f"tags: [wrinklefree, quantization-aware-training, {method}]"]
    name = base.name if here else config.model.pretrained
    stage = f"stage `{config.training.stage}`, seed {config.seed}"
    settings = [[key, str(value)] for key, value in vars(config.method).items() if key != "name"]
    return "\n".join(
        [
            *("---", *front, "---", ""),
            f"# {config.model.name}, {config.training.stage}\n",
            f"`{name}` quantized with `{method}`, trained by `wf train` ({stage}).\n",
            markdown_table(["setting of the method", "value"], settings),
            "",
            markdown_table(["how it was made", ""], [*made(config), *map(list, (training or {}).items())]),
            "",
        ]
    )


def made(config: Config) -> list[list[str]]:
    """Rows of the table of how a model was made, as far as its config tells."""
    data = config.data
    on_hub = data.source == "hub" and not Path(data.path or "").exists()
    named = [f"data={data.source}", *([data.task] if data.task else []), *([str(data.path)] if on_hub else [])]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return [["with", versions], ["text", " ".join(named)], ["objective", config.training.objective]]


def licence_of(folder: Path) -> str | None:
    """The licence that a model's own card names, if there is one."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    with readme.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(MOST_CHARACTERS), re.DOTALL)
    named = front and re.search(r"^license: *([\w.-]+) *$", front[1], re.MULTILINE)
    return named[1] if named else None
