"""Finding by name: a file in a folder is the whole registration.

Each kind of thing has a folder in the package and one where the user stands. A file there counts if it defines what
its kind asks for, so that a folder `methods/` of another project does no harm. Files that begin with `_` are helpers.
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
    """One kind of thing that is found by its name."""

    word: str  # in messages
    package: str
    folder: str  # where the user stands
    member: str  # what a file of this kind defines
    setting: str  # what chooses one


METHODS = Kind("method", "wrinklefree.methods", "methods", "Config", "method")
OBJECTIVES = Kind("objective", "wrinklefree.objectives.kinds", "objectives", "Objective", "training.objective")
SCHEDULES = Kind("schedule", "wrinklefree.training.schedules", "schedules", "rate", "training.scheduler.name")
EXPORT_FORMATS = Kind("export format", "wrinklefree.export.formats", "export_formats", "write", "--format")
DATA_FORMATS = Kind("data format", "wrinklefree.data.formats", "data_formats", "document", "data.format")
KINDS = (METHODS, OBJECTIVES, SCHEDULES, EXPORT_FORMATS, DATA_FORMATS)


def names(kind: Kind) -> list[str]:
    """All names of a kind, sorted."""
    return sorted(files(kind))


def find_named(kind: Kind, name: str) -> Any:
    """What the file `name` defines. Raises UserError for an unknown name."""
    return vars(find_module(kind, name))[kind.member]


def find_module(kind: Kind, name: str) -> ModuleType:
    """The module of a name. Raises UserError for an unknown one."""
    found = files(kind)
    if name not in found:
        raise UserError(unknown(kind, name, found))
    module = f"{kind.package}.{name}"
    return importlib.import_module(module) if name in _own(kind) else _import_file(module, found[name])


def unknown(kind: Kind, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not there."""
    if Path(kind.folder, f"{name}.py").is_file():
        return f"{kind.folder}/{name}.py: defines no `{kind.member}`, so it is no {kind.word}"
    return f"unknown {kind.word} {name!r}{did_you_mean(name, known)}; available: {', '.join(sorted(known))}"


def files(kind: Kind) -> dict[str, Path]:
    """Every name with its file. Raises UserError if the user's folder has a name that the package has."""
    own, users = _own(kind), _users(kind)
    for name in sorted(own.keys() & users.keys()):
        raise UserError(f"{users[name]}: the package has a {kind.word} {name!r} already; rename the file")
    return own | users


def _own(kind: Kind) -> dict[str, Path]:
    return _files(importlib.import_module(kind.package).__path__)


def _users(kind: Kind) -> dict[str, Path]:
    """What the folder where the user stands has, unless that is the package's own."""
    folder = str(Path.cwd() / kind.folder)
    if folder in importlib.import_module(kind.package).__path__:
        return {}
    return {name: path for name, path in _files([folder]).items() if kind.member in _defined(path)}


def summary(path: Path) -> str:
    """The first sentence of a file's docstring."""
    words = " ".join((ast.get_docstring(_parse(path)) or "").partition("\n\n")[0].split())
    return words.partition(". ")[0].rstrip(".")


def constant(path: Path, name: str, default: Any) -> Any:
    """The literal that a file assigns to `name`, read without importing it; `default` if it assigns none."""
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and name in [ast.unparse(target) for target in node.targets]:
            return ast.literal_eval(node.value)
    return default


def _files(folders: Iterable[str]) -> dict[str, Path]:
    """Names in some folders: `name.py` or `name/__init__.py`."""
    found = {}
    for folder in folders:
        for module in pkgutil.iter_modules([folder]):
            if not module.name.startswith("_"):
                path = Path(folder, module.name)
                found[module.name] = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
    return found


def _defined(path: Path) -> set[str]:
    """Names that a file defines or imports at its top; none if it is not valid Python."""
    try:
        nodes = _parse(path).body
    except SyntaxError:
        return set()
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imported = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return found | {alias.asname or alias.name for alias in imported}


def _parse(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache
def _parsed(path: Path, changed: int) -> ast.Module:
    """The syntax tree of a file, once for each time it is changed."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _import_file(name: str, path: Path) -> ModuleType:
    """Import a file of the user's under `name`, once for as long as it is the same file."""
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
