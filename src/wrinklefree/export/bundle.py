"""Writes the loader into a packed folder, so that transformers can read the folder without this package.

`trust_remote_code=True` takes flat Python files with relative imports. They are copies of this package's own modules in
which only the imports differ: `core/codes.py` becomes `wf_core_codes.py`.

| file | copy of |
|---|---|
| `modeling_wrinklefree.py` | `packed/quantizer.py`, followed by the folder's methods and its model class |
| `wf_packed_layer.py`, `wf_core_codes.py` | the layer and its codes |
| `wf_core_inputs.py`, `wf_core_rotation.py` | what it does to inputs |
| `wf_methods_<name>_decode.py` | the part of the method that decodes; one more if the head has another method |

If a method has no part `decode`, all of it is copied, with everything that it imports.
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

# Methods state the limits of their settings with pydantic, which transformers does not need. Nor does the folder: its
# settings were checked before training.
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
{stacks}

class {model}(transformers.{model}):
    is_custom_code = classmethod(lambda cls: False)  # then transformers computes buffers that no file holds
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        with registered(Quantizer):
            return super().from_pretrained(*args, **kwargs)
"""


STACKS = "wrinklefree.core.stack"
OPENED = """
    def _process_model_before_weight_loading(self, model, **kwargs):
        open_stacks(model, self.quantization_config.stacks)
        super()._process_model_before_weight_loading(model, **kwargs)
"""


def files(methods: Iterable[QuantMethod], model: str, experts: bool = False) -> dict[str, str]:
    """Return the loader's files as {name: text}; `model` is a class of transformers such as `LlamaForCausalLM`.

    `experts` says whether it has stacks of experts.
    """
    parts = {method.name: part_of(type(method).__module__) for method in methods}
    modules = [
        module
        for module in _closure([QUANTIZER, *parts.values(), *([STACKS] if experts else [])])
        if module != QUANTIZER
    ]
    texts = {f"{_flat(m)}.py": f"# Copy of {m}\n{_relative(_source(m))}" for m in modules}
    if any(_checker_imports(_source(m)) for m in modules):
        texts[f"{_flat(CHECKER)}.py"] = CHECKER_STUB
    imported = [f"from .{_flat(STACKS)} import open_stacks"] if experts else []
    entry = LOADER.format(
        quantizer=_relative(_source(QUANTIZER)),
        imports="\n".join([*(_import(name, part) for name, part in parts.items()), *imported]),
        stacks=OPENED if experts else "",
        methods="\n".join(f'    "{name}": {_maker(name, part)},' for name, part in parts.items()),
        model=model,
    )
    return {f"{ENTRY}.py": entry, **texts}


def part_of(module: str) -> str:
    """Return the module that decodes a method's codes: its part `decode`, or if it has none, the method itself."""
    return f"{module}.decode" if _is_module(f"{module}.decode") else module


def _import(name: str, part: str) -> str:
    if part.endswith(".decode"):
        return f"from .{_flat(part)} import decode as decode_{name}, int8_inputs as int8_inputs_{name}"
    return f"from .{_flat(part)} import Config as Config_{name}"


def _maker(name: str, part: str) -> str:
    """Return the source of a function from a layer's settings and fqn to its method."""
    if part.endswith(".decode"):
        return (
            f'lambda settings, fqn: SimpleNamespace(name="{name}", decode=decode_{name}, '
            f"int8_inputs=int8_inputs_{name}(settings))"
        )
    return f"lambda settings, fqn: Config_{name}(**settings).config_for(fqn)"


def _closure(modules: list[str]) -> list[str]:
    """Return `modules` and every module of this package that they import, directly or not, sorted."""
    todo, done = list(modules), set[str]()
    while todo:
        module = todo.pop()
        if module not in done:
            done.add(module)
            todo += [target for node in _own_imports(_source(module)) for target, _, _ in _targets(node)]
    return sorted(done)


def _source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def _own_imports(source: str) -> list[ast.ImportFrom]:
    """Return the statements `from wrinklefree... import ...`."""
    # `import wrinklefree.x` has no relative form, so it is not allowed in these modules.
    nodes = list(ast.walk(ast.parse(source)))
    plain = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    assert not any(name.split(".")[0] == PACKAGE for name in plain), f"write `from {PACKAGE}...` in {plain}"
    return [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == PACKAGE]


def _checker_imports(source: str) -> list[ast.ImportFrom]:
    """Return the statements `from pydantic import Field`."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module == CHECKER]
    assert all(alias.name == "Field" for n in nodes for alias in n.names), "the stub in the folder has `Field` alone"
    return nodes


def _targets(node: ast.ImportFrom) -> list[tuple[str, str, str]]:
    """Return (module, name, alias) for each imported name. If a module itself is imported, the name is empty."""
    assert node.module is not None
    targets = []
    for alias in node.names:
        inside = f"{node.module}.{alias.name}"
        local = alias.asname or alias.name
        targets.append((inside, "", local) if _is_module(inside) else (node.module, alias.name, local))
    return targets


def _is_module(name: str) -> bool:
    """Whether the dotted `name` is a module of this package, and not something defined in one."""
    if not name.startswith(f"{PACKAGE}."):
        return False
    parent = importlib.util.find_spec(name.rpartition(".")[0])
    is_package = parent is not None and parent.submodule_search_locations is not None
    return is_package and importlib.util.find_spec(name) is not None


def _relative(source: str) -> str:
    """Return `source` with its imports from this package rewritten to import from the flat copies."""
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
    """Return relative imports for (module, name, alias): first modules themselves, then the names from one module."""
    modules = [statement for module, name, local in targets if not name for statement in _whole(_flat(module), local)]
    named = [target for target in targets if target[1]]
    if not named:
        return modules
    names = (name + (f" as {local}" if local != name else "") for _, name, local in named)
    return [*modules, f"from .{_flat(named[0][0])} import {', '.join(names)}"]


def _whole(file: str, local: str) -> list[str]:
    """Return two statements that import a whole file as `local`."""
    # transformers copies only the files that it finds in lines like the first one.
    return [f"from .{file} import __name__ as _{file}", f"from . import {file} as {local}"]


def _flat(module: str) -> str:
    return "wf_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def write_loader(folder: Path, methods: Iterable[QuantMethod], model: str, experts: bool = False) -> None:
    """Write the loader's files into `folder`; `model` is a class of transformers such as `LlamaForCausalLM`."""
    for name, text in files(methods, model, experts).items():
        (folder / name).write_text(text, encoding="utf-8")
