"""What `wf export` knows about the formats without importing them, because some import slowly or not at all.

Each format states these literals in its file:

FLAG      its name for `--format`; by default the file's name, with dashes
NEEDS     the package that it imports, which comes with the extra of its flag; by default none
OPTIONS   options of its `write`: {name: {"help": ..., "choices": [...] or "min": ...}}
NEXT      what to do with the written folder `{target}`; `{prompt}` is a text that fits the model
USE       how to load the folder `{name}`, in Markdown, for its model card; by default a code span of NEXT
LIBRARY   the hub's name of the library that reads it; by default transformers
WEIGHTS   the files or folders with the weights, as a glob; by default `*.safetensors`

If its `write` needs more from the run, it also defines `from_run(config, card, target)`, which returns its keyword
arguments.
"""

import importlib.util
from pathlib import Path
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.core.find import EXPORT_FORMATS, constant, files

Options = dict[str, dict[str, Any]]


def formats() -> dict[str, Path]:
    """Return {flag: file} for all formats, `hf` first."""
    by_flag = {constant(path, "FLAG", name.replace("_", "-")): path for name, path in files(EXPORT_FORMATS).items()}
    return dict(sorted(by_flag.items(), key=lambda item: (item[0] != "hf", item[0])))


def check_package(flag: str) -> None:
    """Raises UserError if the package that a format needs is not installed."""
    package = constant(formats()[flag], "NEEDS", None)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"--format {flag} needs its package: pip install 'wrinklefree[{flag}]'")


def module_name(path: Path) -> str:
    """Return the name by which a format's file is found."""
    return path.parent.name if path.stem == "__init__" else path.stem


def options() -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Return {option: (flags of the formats that have it, its entry in OPTIONS)} for all formats."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for flag, path in formats().items():
        for name, spec in options_of(path).items():
            found.setdefault(name, ([], spec))[0].append(flag)
    return found


def options_of(path: Path) -> Options:
    """Return the OPTIONS of a format's file, without importing it."""
    own: Options = constant(path, "OPTIONS", {})
    return own
