"""Find methods, objectives, schedules and formats by file name: a file in a folder is the whole registration.

Each kind has a folder in the package and one in the user's working directory. Files that begin with `_` are helpers.
"""

import ast
import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import did_you_mean


@dataclass(frozen=True)
class Kind:
    """A kind of plug-in that is found by its file name."""

    word: str  # what messages call it
    package: str  # the package's folder, as a module name
    folder: str  # the user's folder, in the working directory
    member: str  # the class or function that every file of this kind defines
    setting: str  # the setting or option that chooses one by name


METHODS = Kind("method", "wrinklefree.methods", "methods", "Config", "method")
OBJECTIVES = Kind("objective", "wrinklefree.objectives.kinds", "objectives", "Objective", "training.objective")
SCHEDULES = Kind("schedule", "wrinklefree.training.schedules", "schedules", "rate", "training.scheduler.name")
EXPORT_FORMATS = Kind("export format", "wrinklefree.export.formats", "export_formats", "write", "--format")
DATA_FORMATS = Kind("data format", "wrinklefree.data.formats", "data_formats", "document", "data.format")
KINDS = (METHODS, OBJECTIVES, SCHEDULES, EXPORT_FORMATS, DATA_FORMATS)


def names(kind: Kind) -> list[str]:
    """All names of this kind, sorted: the package's and the user's."""
    return sorted(files(kind))


def find_named(kind: Kind, name: str) -> Any:
    """Import the file `name` and return its `kind.member`. Raises UserError if the name is unknown."""
    return vars(find_module(kind, name))[kind.member]


def find_module(kind: Kind, name: str) -> ModuleType:
    """Import the file `name` of this kind. Raises UserError if the name is unknown."""
    own, users = _own_and_users(kind)
    module = f"{kind.package}.{name}"
    if name in own:
        return importlib.import_module(module)
    if name in users:
        return _import_file(module, users[name])
    raise UserError(unknown(kind, name, own | users))


def unknown(kind: Kind, name: str, known: Iterable[str]) -> str:
    """The error message for a name that is not among the `known` ones."""
    path = _files([kind.folder]).get(name)
    if path is None:
        return f"unknown {kind.word} {name!r}{did_you_mean(name, known)}; available: {', '.join(sorted(known))}"
    try:
        _parse(path)
    except SyntaxError as error:
        return f"{path}, line {error.lineno}: {error.msg}"
    return f"{path}: defines no `{kind.member}`, so it is no {kind.word}"


def files(kind: Kind) -> dict[str, Path]:
    """All names of this kind with their files.

    Raises UserError if the user's folder has a name that the package has already.
    """
    own, users = _own_and_users(kind)
    return own | users


def users_file(kind: Kind, name: str) -> Path | None:
    """The user's own file of this name; None if the package has it, or nobody."""
    return _own_and_users(kind)[1].get(name)


def _own_and_users(kind: Kind) -> tuple[dict[str, Path], dict[str, Path]]:
    """The package's names and the user's. Raises UserError if both have one."""
    own, users = _own(kind), _users(kind)
    for name in sorted(own.keys() & users.keys()):
        raise UserError(f"{users[name]}: the package has a {kind.word} {name!r} already; rename the file")
    return own, users


def _own(kind: Kind) -> dict[str, Path]:
    return _files(importlib.import_module(kind.package).__path__)


def _users(kind: Kind) -> dict[str, Path]:
    """The files in the user's folder that define `kind.member`."""
    folder = str(Path.cwd() / kind.folder)
    if folder in importlib.import_module(kind.package).__path__:  # the user works inside the package
        return {}
    # Another project may have a folder `methods/` too. Its files define no `Config`, so they are not counted.
    return {name: path for name, path in _files([folder]).items() if kind.member in _defined(path)}


def summary(path: Path) -> str:
    """The first sentence of a file's docstring, without its full stop."""
    words = " ".join((ast.get_docstring(_parse(path)) or "").partition("\n\n")[0].split())
    return words.partition(". ")[0].rstrip(".")


def constant(path: Path, name: str, default: Any) -> Any:
    """Read the literal that a file assigns to `name`, without importing the file. `default` if there is none."""
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and name in [ast.unparse(target) for target in node.targets]:
            return ast.literal_eval(node.value)
    return default


def _files(folders: Iterable[str]) -> dict[str, Path]:
    """Map every name in these folders to its file: `name.py` or `name/__init__.py`."""
    paths = {}
    for folder in folders:
        for module in pkgutil.iter_modules([folder]):
            if not module.name.startswith("_"):
                path = Path(folder, module.name)
                paths[module.name] = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
    return paths


def _defined(path: Path) -> set[str]:
    """The names that a file defines, assigns or imports at top level. Empty if the file is not valid Python."""
    try:
        nodes = _parse(path).body
    except SyntaxError:
        return set()
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {ast.unparse(node.target) for node in nodes if isinstance(node, ast.AnnAssign)}
    defined |= {ast.unparse(target) for node in nodes if isinstance(node, ast.Assign) for target in node.targets}
    imported = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return defined | {alias.asname or alias.name for alias in imported}


def _parse(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache
def _parsed(path: Path, changed: int) -> ast.Module:
    """Parse a file. `changed`, its modification time, makes the cache miss after an edit."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _import_file(name: str, path: Path) -> ModuleType:
    """Import a user's file under the module name `name`. A module already loaded from this file is returned."""
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    inside = [str(path.parent)] if path.name == "__init__.py" else None
    spec = spec_from_file_location(name, path, submodule_search_locations=inside)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
