"""The shape of the code: imports point to lower ranks, methods and commands do not know each other, no cycles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import wrinklefree

ROOT = Path(wrinklefree.__file__).parent

# By the first component of the name. Within a rank of the design, what builds on another has a later decimal.
RANKS = {
    "core": 0,
    "bitnet": 0.5,
    "workers": 0.5,
    **dict.fromkeys(["methods", "losses", "schedule", "optim", "storage", "data", "terminal", "streaming"], 1),
    **dict.fromkeys(["config", "distributed", "packed"], 2),
    "sharding": 2.05,
    **dict.fromkeys(["checkpoint", "objectives", "tracking"], 2.1),
    "plotting": 2.2,
    **dict.fromkeys(["load", "evaluate", "export", "generate"], 3),
    "stages": 3.05,
    **dict.fromkeys(["locate", "session", "report"], 3.1),
    "serve": 3.2,
    "trainer": 4,
    "thinking": 4.05,
    "pipeline": 4.1,
    "launch": 4.2,
    "commands": 5,
    "cli": 6,
}


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name within it; `configs` and the package itself left out."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not name.startswith(("configs", "models")):
            found[name] = path
    return found


FILES = files()


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports, also inside of functions; not those under TYPE_CHECKING."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("wrinklefree."):
                yield module_of(name.removeprefix("wrinklefree."))


def module_of(name: str) -> str:
    """The module that an imported name is, or is in."""
    while name not in FILES:
        name = name.rpartition(".")[0]
        assert name
    return name


GRAPH = {name: set(imports(path)) - {name} for name, path in FILES.items()}


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_has_a_rank() -> None:
    assert {top(name) for name in FILES} == RANKS.keys()


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_to_lower_ranks(name: str) -> None:
    """Files of one folder may import each other."""
    wrong = [other for other in GRAPH[name] if top(other) != top(name) and RANKS[top(other)] >= RANKS[top(name)]]
    assert not wrong


@pytest.mark.parametrize("folder", ["methods", "commands"])
def test_siblings_do_not_import_each_other(folder: str) -> None:
    """A method is one file; a command is one file."""
    siblings = {name for name in FILES if name.startswith(f"{folder}.")}
    assert siblings
    assert all(not GRAPH[name] & siblings for name in siblings)


def test_only_commands_and_the_tables_of_names_reach_methods_by_import() -> None:
    """A fifth method is one file: nothing else may name one, but for the stages of a thinker, which are trm's alone."""
    methods = {name for name in FILES if name.startswith("methods.")}
    assert all(not GRAPH[name] & methods for name in FILES if top(name) != "thinking")
    assert all(GRAPH[name] & methods <= {"methods.trm"} for name in FILES)


def test_there_are_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(n for n in FILES if n.startswith("methods.")))
def test_a_method_is_a_file_of_under_300_lines_that_opens_with_its_paper(name: str) -> None:
    text = FILES[name].read_text()
    assert len(text.splitlines()) < 300
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert "arXiv" in doc


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_module_opens_with_a_docstring(name: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[name].read_text()))
