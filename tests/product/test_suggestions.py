"""What a message tells the user to type exists: commands, their options, and settings with values of their types."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import TypeAdapter, ValidationError
from typer.core import TyperGroup

import wrinklefree
from wrinklefree.cli import app
from wrinklefree.config.check import key_paths
from wrinklefree.config.groups import options
from wrinklefree.config.schema import Config
from wrinklefree.config.values import parse_value
from wrinklefree.core.method import available, find

SRC = Path(wrinklefree.__file__).parent
HOLE = "\N{OBJECT REPLACEMENT CHARACTER}"  # where a message has a value that is known when it is said

GROUPS = ("model", "data", "training", "method", "distributed", "distillation", "task")
KINDS = {path: f.type for path, f in key_paths(Config)}
METHOD_KINDS = {name: {path: f.type for path, f in key_paths(find(name), "method.")} for name in available()}
ROOT = typer.main.get_command(app)
COMMAND = re.compile(r"`wf ([^`]+)`|next: wf ([^\n]+)|\bmake it: wf ([^\n]+)")
SETTING = re.compile(
    rf"(?<![\w.{HOLE}`=/-])((?:[a-z_]+\.)+[a-z_0-9]+|seed|experiment|output_dir|output_root|auto_prereq)"
    rf"=([^\s,;:)'\"`]*)"
)
FLAG = re.compile(rf"(?<![\w{HOLE}-])--([a-z][a-z-]*)")


def texts(node: ast.AST) -> Iterator[str]:
    """Every text of a module but its docstrings, with HOLE for what is filled in."""
    documented = {
        id(n.body[0].value)
        for n in ast.walk(node)
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef) and n.body and isinstance(n.body[0], ast.Expr)
    }
    inside: set[int] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            inside |= {id(value) for value in part.values}
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else HOLE for v in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and not {id(part)} & (inside | documented):
            yield part.value


SAID = [(path, text) for path in sorted(SRC.rglob("*.py")) for text in texts(ast.parse(path.read_text()))]


def found(pattern: re.Pattern[str]) -> dict[str, tuple[str | Any, ...]]:
    """Each match of a pattern in a message, under the file and the text around it."""
    return {
        f"{path.relative_to(SRC)}: {text[max(0, m.start() - 20) : m.end() + 20]!r}": m.groups()
        for path, text in SAID
        for m in pattern.finditer(text)
    }


# Files that hold command lines of other programs: pip, torchrun, sky.
OF_OTHERS = ("commands/doctor.py", "runs/launch.py", "cloud/engines/sky.py", "cloud/task.py", "cloud/wheel.py")
OF_OTHERS += ("distributed/nodes.py",)

COMMANDS, SETTINGS, FLAGS = found(COMMAND), found(SETTING), found(FLAG)
SETTINGS = {where: groups for where, groups in SETTINGS.items() if not where.startswith(("cloud/wheel.py", "gguf/"))}


def test_the_collection_finds_messages() -> None:
    assert len(COMMANDS) > 10
    assert len(SETTINGS) > 40
    assert len(FLAGS) > 40


def leaves(command: Any) -> Iterator[Any]:
    if isinstance(command, TyperGroup):
        for below in command.commands.values():
            yield from leaves(below)
    else:
        yield command


def flags(command: Any) -> set[str]:
    return {flag for each in leaves(command) for p in each.params for flag in (*p.opts, *p.secondary_opts)}


def verb(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and the other words."""
    command: Any = ROOT
    while words and isinstance(command, TyperGroup) and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    assert command is not ROOT, f"no command wf {' '.join(words)}"
    return command, words


@pytest.mark.parametrize("where", COMMANDS)
def test_a_command_that_is_named_exists(where: str) -> None:
    words = next(group for group in COMMANDS[where] if group is not None).partition("    wf ")[0]
    if words.startswith(HOLE):
        return
    command, rest = verb(shlex.split(words))
    assert {word for word in rest if word.startswith("-")} <= flags(command)


@pytest.mark.parametrize("where", FLAGS)
def test_an_option_that_is_named_exists(where: str) -> None:
    (name,) = FLAGS[where]
    others = {"--help", "--version", "--nproc-per-node", "--standalone", "--python"}  # of wf, torchrun and pip
    assert f"--{name}" in flags(ROOT) | others or where.startswith(OF_OTHERS)


def fits(value: str, kind: Any, key: str) -> bool:
    """Whether the text is a value of the type; a word in capitals, dots or a hole stands for one."""
    if not value or HOLE in value or "..." in value or re.fullmatch(r"\W*[A-Z_]+\W*", value):
        return True
    try:
        TypeAdapter(kind).validate_python(parse_value(key, value, {key: kind}))
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("where", SETTINGS)
def test_a_setting_that_is_named_exists_and_takes_the_value(where: str) -> None:
    key, value = SETTINGS[where]
    kinds = [KINDS[key]] if key in KINDS else [known[key] for known in METHOD_KINDS.values() if key in known]
    if key == "hydra.searchpath":  # said to Hydra, not to a user
        return
    assert kinds, f"{key}: no such setting"
    assert any(fits(value, kind, key) for kind in kinds), f"{key}={value}"


CHOICES = found(re.compile(rf"(?<![\w.{HOLE}`-])({'|'.join(GROUPS)})=([a-z0-9_]+)\b(?!{HOLE})"))


@pytest.mark.parametrize("where", CHOICES)
def test_a_choice_that_is_named_exists(where: str) -> None:
    group, name = CHOICES[where]
    assert group == "task" or name in {*options(group), "null"}
