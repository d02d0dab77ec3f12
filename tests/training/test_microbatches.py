"""However a step is cut into micro-batches and processes, its loss and gradient are the same, for every objective."""

import importlib
import inspect
import os
import pkgutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cutting
import pytest
import torch
from torch import Tensor

import wrinklefree.objectives.kinds
import wrinklefree.thinking
from wrinklefree.objectives.base import Objective
from wrinklefree.training.microbatches import steps

pytestmark = pytest.mark.numeric

WHOLE = [[0, 1, 2, 3]]
RATIOS = {"-relative_error", "-variance_ratio"}  # of sums: averaged over micro-batches, for the log alone
CUTS = {"2x2": [[0, 1], [2, 3]], "1x4": [[0], [1], [2], [3]], "3+1": [[0, 1, 2], [3]]}


def gradients(name: str, rows: cutting.Rows) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return cutting.gradients(cutting.CASES[name](), rows)


@pytest.fixture(scope="module")
def whole() -> dict[str, list[dict[str, Tensor]]]:
    return {name: gradients(name, WHOLE) for name in cutting.CASES}


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for mine, one in zip(found, expected, strict=True):
        names = [name for name in one if not name.startswith("-")]
        largest = max(float(one[name].norm()) for name in names)
        for name in names:
            assert float((mine[name] - one[name]).norm()) < 1e-6 * largest, name
        for name in one.keys() - set(names) - RATIOS:
            torch.testing.assert_close(mine[name], one[name], rtol=1e-5, atol=1e-6, msg=name)
        for name in mine.keys() - one.keys():  # several processes add up zeros for what has no gradient
            assert not mine[name].any(), name


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", cutting.CASES)
def test_the_gradient_is_the_same_however_a_step_is_cut(
    whole: dict[str, list[dict[str, Tensor]]], name: str, cut: str
) -> None:
    assert_same(gradients(name, CUTS[cut]), whole[name])


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(whole: dict[str, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, cutting.__file__, str(tmp_path)]
    running = [subprocess.Popen(program, env=os.environ | shared | {"RANK": rank}) for rank in ("0", "1")]
    assert [process.wait(60) for process in running] == [0, 0]
    for rank in (0, 1):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert_same(found, whole[name])


def subclasses(cls: type) -> Iterator[type]:
    for below in cls.__subclasses__():
        yield below
        yield from subclasses(below)


def test_every_objective_of_the_package_is_cut_here() -> None:
    for package in (wrinklefree.objectives.kinds, wrinklefree.thinking):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    here = Path(wrinklefree.objectives.__file__).parents[1]  # other tests may have added objectives of their own
    known = {cls for cls in subclasses(Objective) if here in Path(inspect.getfile(cls)).parents}
    covered = {base for make in cutting.CASES.values() for base in type(make().objective).__mro__}
    assert {cls.__module__ for cls in known - covered} == set()


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_unequal_numbers_of_losses_are_an_error(order: tuple[int, int]) -> None:
    class Uneven(Objective):
        def __call__(self, batch: dict[str, Tensor]) -> Iterator[Any]:
            for _ in range(int(batch["times"])):
                yield torch.zeros(()), {}

    case = cutting.CASES["ce"]()
    batches = [case.take([0]) | {"times": torch.tensor(times)} for times in order]
    run: Any = SimpleNamespace(
        objective=Uneven(), stream=iter(batches), training=SimpleNamespace(gradient_accumulation_steps=2)
    )
    run.world, run.placement, run.autocast = cutting.ALONE, cutting.Whole(cutting.ALONE), cutting.nullcontext
    with pytest.raises(TypeError, match="Uneven yields"):
        [list(step) for step in steps(run)]
