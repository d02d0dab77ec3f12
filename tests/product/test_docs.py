"""The documents keep up with the code: every setting is described, every link, path and command in them exists."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from build_site import MORE_PAGES, build, commands, with_mathml

from wrinklefree.cli import SECTIONS, app
from wrinklefree.config.groups import option_files, options
from wrinklefree.config.keys import key_paths
from wrinklefree.config.schema import Config
from wrinklefree.core import method

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("native/*.md")])
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def settings() -> list[str]:
    """Every key with its full path, sections left out."""
    keys = [key for key, _ in key_paths(Config)]
    for name in method.available():
        keys += [key for key, _ in key_paths(method.find(name), "method.")]
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


@pytest.mark.parametrize("key", settings())
def test_every_setting_is_described(key: str) -> None:
    assert f"| `{key}` |" in CONFIGURATION


def test_no_described_setting_is_unknown() -> None:
    described = re.findall(
        r"^\| `((?:model|data|training|distillation|method|thinking)\.[\w.]+)` \|", CONFIGURATION, re.MULTILINE
    )
    assert described
    assert set(described) <= set(settings()) | {"model.architecture"}


@pytest.mark.parametrize("group", ["model", "data", "distributed", "distillation"])
def test_the_choices_of_a_group_are_those_that_there_are(group: str) -> None:
    (listed,) = re.findall(rf"^\| `{group}` \| (.*) \|$", CONFIGURATION, re.MULTILINE)
    known = set(options(group))
    assert {name for name in re.findall(r"`(\w+)`", listed) if name in known} == known


def test_every_training_is_listed_with_what_its_file_says() -> None:
    for file in option_files("training"):
        opening = file.read_text(encoding="utf-8").splitlines()[1]
        assert f"| `{file.stem}` | {opening.removeprefix('# ')}" in CONFIGURATION


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_tests_exist(document: Path) -> None:
    """Files, and the folders of `head`'s pattern, from the root or from beside the document."""
    named = re.findall(r"[\w/]*tests/[\w*/]*\.\w+", document.read_text(encoding="utf-8"))
    assert [path for path in named if not any(any(at.glob(path)) for at in (ROOT, document.parent))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    """`wf VERB` in code: planned commands are named as such on two pages."""
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    planned = {"logs", "cancel", "wandb-status"} if document.name in ("results.md", "guides.md") else set()
    named = re.findall(
        r"^(?:\$ )?wf ([a-z][\w-]*)|`wf ([a-z][\w-]*)", document.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {a or b for a, b in named} <= verbs | planned


def test_the_page_of_commands_is_what_they_print() -> None:
    """If this fails: python docs/build_site.py."""
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == commands()


def test_every_verb_is_in_one_section_of_the_help() -> None:
    verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
    verbs += [str(group.name) for group in app.registered_groups]
    assert sorted(verb for section in SECTIONS.values() for verb in section) == sorted(verbs)


def test_all_pages_of_the_site_are_in_its_menu(tmp_path: Path) -> None:
    build(tmp_path)
    menu = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert {page.name for page in tmp_path.glob("*.md")} == menu
    assert set(MORE_PAGES.values()) <= menu
    assert "arXiv 2512.02901" in (tmp_path / "fairy2.md").read_text(encoding="utf-8").partition("## In the code")[2]
    assert not any("](../" in page.read_text(encoding="utf-8") for page in tmp_path.glob("*.md"))


@pytest.mark.parametrize("name", method.available())
def test_every_method_has_a_page_whose_formulas_are_mathml(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    formulas = page.partition("\n## Formulas\n")[2]
    assert formulas.count("$$") >= 4
    shown = with_mathml(formulas)
    assert shown.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == formulas.count("$$") // 2
    assert not re.search(r"\$|\\[a-z]|^<math[^>]*inline", shown, re.MULTILINE)  # nothing of LaTeX is left


def test_code_is_no_formula() -> None:
    code = "`$HOME` and `$PATH`\n\n```bash\n$ wf methods $X\n```\n"
    assert with_mathml(code) == code


def test_the_citation_has_the_packages_version() -> None:
    assert f"version: {importlib.metadata.version('wrinklefree')}\n" in (ROOT / "CITATION.cff").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("script", sorted(ROOT.glob("runs/*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
