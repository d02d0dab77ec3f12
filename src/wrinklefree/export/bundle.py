"""The loader that travels in a packed folder, so that transformers reads it without this package.

`trust_remote_code=True` takes flat Python files with relative imports. They are copies of this package's own modules,
made here, with nothing changed but the imports: `core/codes.py` becomes `wf_core_codes.py`. One source of truth.
"""

import ast
import importlib.util
import inspect
from collections.abc import Iterable
from pathlib import Path

from wrinklefree.core.method import QuantMethod

PACKAGE = "wrinklefree"
ENTRY = "modeling_wrinklefree"
QUANTIZER = "wrinklefree.packed.quantizer"

# Methods state the limits of their settings with pydantic, which transformers does not need. In the folder nothing is
# checked: the settings passed before training.
CHECKER = "pydantic"
CHECKER_STUB = '''\
"""Stands in for pydantic: the settings in this folder were checked before training."""


def Field(**limits):
    return None
'''

LOADER = '''\
"""Reads this folder without the wrinklefree package: from_pretrained(folder, trust_remote_code=True).

Written by `wf export`; the wf_*.py files are copies of the package's modules.
"""

import transformers

# transformers copies the files that it finds in lines like these.
{imports}
from .{quantizer} import WrinkleFreeQuantizer, registered
{methods}

METHODS = {{{names}}}


class Quantizer(WrinkleFreeQuantizer):
    """Knows the methods of this folder."""

    def method_class(self, name):
        return METHODS[name]


class {model}(transformers.{model}):
    """The same model, read with the quantizer of this folder."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        with registered(Quantizer):
            return super().from_pretrained(*args, **kwargs)
'''


def files(methods: Iterable[QuantMethod], model: str) -> dict[str, str]:
    """The loader's files, name to text, for a model class of transformers such as `LlamaForCausalLM`."""
    found = {method.name: type(method).__module__ for method in methods}
    modules = _closure([QUANTIZER, *found.values()])
    texts = {f"{_flat(m)}.py": f"# Copy of {m}\n{_relative(_source(m))}" for m in modules}
    imports = "\n".join(f"from .{_flat(m)} import __name__ as _{_flat(m)}" for m in [*modules, CHECKER])
    classes = {name: f"{name.title().replace('_', '')}Config" for name in found}
    entry = LOADER.format(
        imports=imports,
        quantizer=_flat(QUANTIZER),
        methods="\n".join(f"from .{_flat(found[name])} import Config as {cls}" for name, cls in classes.items()),
        names=", ".join(f'"{name}": {cls}' for name, cls in classes.items()),
        model=model,
    )
    return {f"{ENTRY}.py": entry, f"{_flat(CHECKER)}.py": CHECKER_STUB, **texts}


def _closure(modules: list[str]) -> list[str]:
    """`modules` and every module of this package that they need, sorted."""
    todo, found = list(modules), set[str]()
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += [target for node in _own_imports(_source(module)) for target, _, _ in _targets(node)]
    return sorted(found)


def _source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def _own_imports(source: str) -> list[ast.ImportFrom]:
    """The `from wrinklefree... import ...` statements; `import wrinklefree.x` has no relative form."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    assert not any(name.split(".")[0] == PACKAGE for name in plain), f"write `from {PACKAGE}...` in {plain}"
    return [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == PACKAGE]


def _checker_imports(source: str) -> list[ast.ImportFrom]:
    """The `from pydantic import Field` statements."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module == CHECKER]
    assert all(alias.name == "Field" for n in nodes for alias in n.names), "the stub in the folder has `Field` alone"
    return nodes


def _targets(node: ast.ImportFrom) -> list[tuple[str, str, str]]:
    """(module, name, alias) of each imported name; the name is empty where the module itself is imported."""
    assert node.module is not None
    targets = []
    for alias in node.names:
        inside = f"{node.module}.{alias.name}"
        local = alias.asname or alias.name
        targets.append((inside, "", local) if _is_module(inside) else (node.module, alias.name, local))
    return targets


def _is_module(name: str) -> bool:
    """Whether `name`, as in `from parent import name`, is a module of this package."""
    if not name.startswith(f"{PACKAGE}."):
        return False
    parent = importlib.util.find_spec(name.rpartition(".")[0])
    is_package = parent is not None and parent.submodule_search_locations is not None
    return is_package and importlib.util.find_spec(name) is not None


def _relative(source: str) -> str:
    """The same source, its imports from this package pointing at the flat copies."""
    lines = source.splitlines()
    for node in _own_imports(source) + _checker_imports(source):
        indent = " " * node.col_offset
        statements = [indent + _statement(*target) for target in _targets(node)]
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = ["\n".join(statements)] + [""] * (node.end_lineno - node.lineno)
    return "\n".join(lines) + "\n"


def _statement(module: str, name: str, local: str) -> str:
    if not name:
        return f"from . import {_flat(module)} as {local}"
    return f"from .{_flat(module)} import {name}" + (f" as {local}" if local != name else "")


def _flat(module: str) -> str:
    return "wf_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def write(folder: Path, methods: Iterable[QuantMethod], model: str) -> None:
    """Write the loader's files into `folder`."""
    for name, text in files(methods, model).items():
        (folder / name).write_text(text, encoding="utf-8")
