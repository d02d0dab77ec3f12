"""Every benchmark can be imported: what it takes from the package is still there."""

import importlib
import pkgutil

import pytest

import benchmarks

# These run in environments of their own, without this package.
OTHERS = ("benchmarks.real.auto_round_worker", "benchmarks.real.llama_worker")

MODULES = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in OTHERS])
def test_a_benchmark_is_imported(name: str) -> None:
    importlib.import_module(name)
