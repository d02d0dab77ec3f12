"""What `wf export` knows of the formats before it imports one: their flags and options, from literals in their files.

FLAG      what `--format` calls it; left out, the file's name with dashes
OPTIONS   keyword arguments of its `write`: {name: {"help": ..., "choices": [...] or "min": ...}}
NEXT      what to do with a written folder `{target}`

A format whose `write` takes more of the run defines `from_run(config, target)`, which gives it as keyword arguments.
"""

from pathlib import Path
from typing import Any

from wrinklefree.core.find import EXPORT_FORMATS, constant, files

Options = dict[str, dict[str, Any]]


def formats() -> dict[str, Path]:
    """Every flag with its file, our own packed folder first."""
    found = {constant(path, "FLAG", name.replace("_", "-")): path for name, path in files(EXPORT_FORMATS).items()}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "hf", item[0])))


def module_name(path: Path) -> str:
    """The name that a format's file is found by."""
    return path.parent.name if path.stem == "__init__" else path.stem


def options() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every option with the flag of its format and its spec."""
    return {name: (flag, spec) for flag, path in formats().items() for name, spec in options_of(path).items()}


def options_of(path: Path) -> Options:
    found: Options = constant(path, "OPTIONS", {})
    return found
