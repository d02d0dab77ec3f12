"""The loader that travels in a packed folder, so that transformers reads it without this package.

`trust_remote_code=True` takes flat Python files with relative imports. They are copies of this package's own modules,
made here, with nothing changed but the imports: `core/codes.py` becomes `wf_core_codes.py`. One source of truth.

| file | copy of |
|---|---|
| `modeling_wrinklefree.py` | `packed/quantizer.py`, with the folder's methods and its model class below |
| `wf_packed_layer.py`, `wf_core_codes.py`, `wf_core_inputs.py` | the layer, its codes, what it does to inputs |
| `wf_methods_<name>_decode.py` | the part of the method that reads; one more for a packed head of another method |

A method without a part `decode` is copied whole, with everything that it imports.
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

LOADER = """\
# from_pretrained(folder, trust_remote_code=True) reads this folder with this file. Written by `wf export`.
{quantizer}

# What follows is this folder's own.
from types import SimpleNamespace

import transformers
{imports}

METHODS = {{
{methods}
}}


class Quantizer(WrinkleFreeQuantizer):
    def method_of(self, settings, fqn):
        return METHODS[settings["name"]](settings, fqn)


class {model}(transformers.{model}):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        with registered(Quantizer):
            return super().from_pretrained(*args, **kwargs)
"""


def files(methods: Iterable[QuantMethod], model: str) -> dict[str, str]:
    """The loader's files, name to text, for a model class of transformers such as `LlamaForCausalLM`."""
    parts = {method.name: part_of(type(method).__module__) for method in methods}
    modules = [module for module in _closure([QUANTIZER, *parts.values()]) if module != QUANTIZER]
    texts = {f"{_flat(m)}.py": f"# Copy of {m}\n{_relative(_source(m))}" for m in modules}
    if any(_checker_imports(_source(m)) for m in modules):
        texts[f"{_flat(CHECKER)}.py"] = CHECKER_STUB
    entry = LOADER.format(
        quantizer=_relative(_source(QUANTIZER)),
        imports="\n".join(_import(name, part) for name, part in parts.items()),
        methods="\n".join(f'    "{name}": {_maker(name, part)},' for name, part in parts.items()),
        model=model,
    )
    return {f"{ENTRY}.py": entry, **texts}


def part_of(module: str) -> str:
    """The module that reads a method's codes: its part `decode`, or all of it."""
    return f"{module}.decode" if _is_module(f"{module}.decode") else module


def _import(name: str, part: str) -> str:
    if part.endswith(".decode"):
        return f"from .{_flat(part)} import decode as decode_{name}, int8_inputs as int8_inputs_{name}"
    return f"from .{_flat(part)} import Config as Config_{name}"


def _maker(name: str, part: str) -> str:
    """The function that makes a layer's method of its settings."""
    if part.endswith(".decode"):
        return (
            f'lambda settings, fqn: SimpleNamespace(name="{name}", decode=decode_{name}, '
            f"int8_inputs=int8_inputs_{name}(settings))"
        )
    return f"lambda settings, fqn: Config_{name}(**settings).config_for(fqn)"


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
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [
            "\n".join(indent + statement for statement in _statements(_targets(node))),
            *[""] * (node.end_lineno - node.lineno),
        ]
    return "\n".join(lines) + "\n"


def _statements(targets: list[tuple[str, str, str]]) -> list[str]:
    """Relative imports of (module, name, alias): each module that is meant itself, then names of one."""
    modules = [statement for module, name, local in targets if not name for statement in _whole(_flat(module), local)]
    named = [target for target in targets if target[1]]
    if not named:
        return modules
    names = (name + (f" as {local}" if local != name else "") for _, name, local in named)
    return [*modules, f"from .{_flat(named[0][0])} import {', '.join(names)}"]


def _whole(file: str, local: str) -> list[str]:
    """An import of a whole file. transformers copies the files that it finds in lines like the first."""
    return [f"from .{file} import __name__ as _{file}", f"from . import {file} as {local}"]


def _flat(module: str) -> str:
    return "wf_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def write(folder: Path, methods: Iterable[QuantMethod], model: str) -> None:
    """Write the loader's files into `folder`."""
    for name, text in files(methods, model).items():
        (folder / name).write_text(text, encoding="utf-8")
