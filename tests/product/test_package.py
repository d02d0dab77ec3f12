"""What an index of packages shows of this one, and that what commands write is not for git."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_the_package_can_be_found_by_what_it_does(project: dict[str, Any]) -> None:
    assert {"quantization", "distillation"} <= set(project["keywords"])
    kinds = {classifier.partition(" :: ")[0] for classifier in project["classifiers"]}
    assert {"Operating System", "Programming Language", "Topic"} <= kinds


def test_the_licence_is_an_expression_alone(project: dict[str, Any]) -> None:
    """An index refuses a classifier of the licence beside an expression."""
    assert f"license: {project['license']}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert not [classifier for classifier in project["classifiers"] if classifier.startswith("License")]
    assert all((ROOT / name).is_file() for name in project["license-files"])


def test_the_versions_of_python_are_those_that_are_allowed(project: dict[str, Any]) -> None:
    named = [re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", each) for each in project["classifiers"]]
    minors = sorted(int(found[1]) for found in named if found)
    assert f">=3.{minors[0]}" == project["requires-python"]
    assert minors == list(range(minors[0], minors[-1] + 1))


WRITTEN = re.compile(r"(?:--(?:out|output|output-dir|output_dir|cache-dir)|-o)[ =](?!or )([a-z][\w./-]*)")
PAGES = [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
# What libraries write beside, and what the guides name in other ways.
MORE = ["trackio/x", ".trackio/x", "wandb/x", "outputs/x", "checkpoints/x", "caches/x", "loss.png", "local.yaml"]


def written() -> list[str]:
    """The files and folders that the commands of pages and help write into the working directory."""
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    commands = [line for line in lines if re.match(r"\s*(wf|python) ", line)]
    found = {name for line in commands for name in WRITTEN.findall(line)}
    return sorted(found | set(MORE))


@pytest.mark.parametrize("name", written())
def test_what_a_command_writes_is_not_for_git(name: str) -> None:
    ignored = subprocess.run(["git", "check-ignore", "-q", f"{name.rstrip('/')}/x"], cwd=ROOT, check=False)
    if ignored.returncode == 128:
        pytest.skip("not a checkout")
    assert ignored.returncode == 0
