"""Every benchmark can be imported, and the random engines whose speed is measured decode."""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import benchmarks
from benchmarks import scoring, shapes
from wrinklefree.core import library
from wrinklefree.engine.sampling import Sampling

MODULES = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_is_imported(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.skipif(library.available() is not None, reason="needs the native library")
@pytest.mark.parametrize("kind", shapes.KINDS)
def test_random_engines_decode(kind: str) -> None:
    shape = shapes.Shape(
        vocab=96, hidden=64, intermediate=96, num_layers=2, heads=4, kv_heads=2, head_dim=16, context=32
    )
    engine = shapes.random_engine(shape, kind, threads=1)
    assert len(list(engine.generate([1, 2, 3], Sampling(max_new_tokens=4)))) == 4


def test_questions_have_one_right_answer(tmp_path: Path) -> None:
    scoring.tasks(tmp_path)
    for file in ("capitals", "sums"):
        rows = [json.loads(line) for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        assert rows
        assert all(row["choices"][row["gold"]] == row["answer"] for row in rows)
        assert all(len(set(row["choices"])) == scoring.CHOICES for row in rows)
