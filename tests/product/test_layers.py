"""The shape of the code: imports point to lower ranks, methods and commands do not know each other, no cycles."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import wrinklefree

ROOT = Path(wrinklefree.__file__).parent
LOOSE = {"cli": 10}  # the only module at the top besides the package's own


def rooms() -> dict[str, tuple[int, str]]:
    """Rank and sentence of every folder, from the first line of its `__init__.py`."""
    found = {}
    for path in ROOT.glob("*/__init__.py"):
        line = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        said = re.fullmatch(r"Rank (\d+): (.+)\.", line)
        assert said, f"{path}: opens with 'Rank N: what it is.'"
        found[path.parent.name] = (int(said[1]), said[2])
    return found


ROOMS = rooms()
RANKS = {name: rank for name, (rank, _) in ROOMS.items()} | LOOSE


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name within it, the package itself left out."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


FILES = files()


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_every_module_is_in_a_room_with_a_rank() -> None:
    assert {top(name) for name in FILES} == RANKS.keys()


def test_the_architecture_page_shows_the_rooms_as_they_say_themselves() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\d+) \| `(\w+)/` \| ([^|]+) \|", page, re.MULTILINE)
    order = sorted((rank, name, sentence) for name, (rank, sentence) in ROOMS.items())
    assert [(int(rank), name, sentence) for rank, name, sentence in shown] == order


def test_tests_are_in_the_folder_of_a_room_or_of_the_whole_product() -> None:
    files = list(Path(__file__).parents[1].glob("**/test_*.py"))
    assert {path.parents[1].name for path in files} == {"tests"}
    assert {path.parent.name for path in files} <= ROOMS.keys() | {"product"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_to_lower_ranks(name: str) -> None:
    """Files of one folder may import each other."""
    wrong = [other for other in GRAPH[name] if top(other) != top(name) and RANKS[top(other)] >= RANKS[top(name)]]
    assert not wrong


def sibling(name: str, folder: str) -> str:
    """The file or folder directly in `folder` that a module is, or is in."""
    return name.removeprefix(f"{folder}.").partition(".")[0]


FOUND_BY_NAME = ["methods", "commands", "export.formats", "objectives.kinds", "data.formats", "training.schedules"]


@pytest.mark.parametrize("folder", FOUND_BY_NAME)
def test_siblings_do_not_import_each_other(folder: str) -> None:
    """What is found by its name is one file, or one folder: none of them knows another."""
    inside = {name for name in FILES if name.startswith(f"{folder}.")}
    for name in inside:
        others = {other for other in GRAPH[name] & inside if sibling(other, folder) != sibling(name, folder)}
        assert not others, name


def test_nothing_imports_a_method() -> None:
    """A fifth method is one file: nothing of the package may name one."""
    methods = {name for name in FILES if name.startswith("methods.")}
    assert methods
    assert all(not GRAPH[name] & methods for name in FILES if top(name) != "methods")


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


@pytest.mark.parametrize("name", sorted(n for n in FILES if re.fullmatch(r"methods\.\w+", n)))
def test_a_method_opens_with_its_paper(name: str) -> None:
    assert "arXiv" in (ast.get_docstring(ast.parse(FILES[name].read_text())) or "")


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_module_opens_with_a_docstring(name: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[name].read_text()))
