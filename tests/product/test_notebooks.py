"""The notebooks run from top to bottom, at toy size."""

import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from toyrun import toy_files
from typer.testing import CliRunner

from wrinklefree.cli import app

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def cells(name: str, kind: str = "code") -> list[str]:
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run_cell(cell: str, values: dict[str, Any], small: dict[str, Any]) -> None:
    """Run a cell as Jupyter does. Its constants that `small` names get those values."""
    if cell.startswith("!"):
        program, *arguments = shlex.split(eval(f"f{cell[1:]!r}", values))
        result = CliRunner().invoke(app, arguments)
        assert (program, result.exit_code) == ("wf", 0), result.output
        return
    exec(compile(ast.parse(cell), "cell", "exec"), values)
    values |= {name: value for name, value in small.items() if name in values}


def run(name: str, **small: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for cell in cells(name):
        run_cell(cell, values, small)
    assert set(small) <= set(values)
    return values


def test_the_notebook_of_the_guide_writes_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, text = toy_files(tmp_path)
    small = {"TEACHER": str(model), "DATA": ["data=local", f"data.path={text}"], "NAME": "toy"}
    sizes = {"TOP_K": 8, "RANDOM_NEGATIVES": 4, "MAX_LENGTH": 16, "SEQUENCES": 6, "HELDOUT": 2}
    values = run("Generate_KD_Cache_K64_K128.ipynb", **small, **sizes)
    assert values["cache"] == "caches/toy_L16_K8_R4"
    assert values["batch"]["kd_ids"].shape == (1, 15, 12)
    assert Path("caches/toy_L16_K8_R4.tar.gz").is_file()


@pytest.mark.slow
def test_the_quick_start_ends_with_a_model_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = (
        "max_steps=2",
        "max_seq_length=64",
        "batch_size=2",
        "start=plain",
        "eval_tokens=512",
        "final_eval_tokens=512",
    )
    values = run("Quick_Start.ipynb", BUDGET="", SETTINGS=" ".join(f"training.{setting}" for setting in small))
    assert values["results"]["packed_bytes"] < values["results"]["original_bytes"]
    assert values["model"].name_or_path == "outputs/quick_start/packed"


@pytest.mark.parametrize("name", [path.name for path in sorted(NOTEBOOKS.glob("*.ipynb"))])
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
