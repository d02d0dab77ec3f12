"""A training fits into its minutes: by a clock that the tests move, so nothing here waits."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toyrun import resolved, rows, run, toy_files

from wrinklefree.config.schema import BlockwiseConfig, ModelConfig, SchedulerConfig, TrainingConfig
from wrinklefree.core.errors import UserError
from wrinklefree.training import loop, pacing
from wrinklefree.training.budget import EVALUATION, SAVE, STEP, Intervals, Pace, fitting, rest, split
from wrinklefree.training.checkpoint import step_folders
from wrinklefree.training.plan import CPU_MINUTES, Plan, choose_minutes
from wrinklefree.training.schedule import rates

LATEST = "training.resume_from=latest"
UNSET = ["training.max_steps=null", "training.total_tokens=auto"]
QUIET = ["training.eval_interval=1000", "training.log_interval=1"]


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_files(tmp_path)
    return tmp_path


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps_take(monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: Callable[[int], float]) -> None:
    """Let step N take `seconds(N)` by the clock."""
    take = loop._step

    def step(run: Any, *args: Any) -> dict[str, float]:
        clock.now += seconds(run.step)
        return take(run, *args)

    monkeypatch.setattr(loop, "_step", step)


def evaluates(clock: Clock, seconds: float) -> Callable[[nn.Module], dict[str, float]]:
    def evaluate(model: nn.Module) -> dict[str, float]:
        clock.now += seconds
        return {"eval_loss": 1.0}

    return evaluate


class StoppedError(Exception):
    """What stands for a kill."""


def stop_at(last: int) -> Callable[[nn.Module, int], None]:
    def on_step(model: nn.Module, step: int) -> None:
        if step == last:
            raise StoppedError

    return on_step


def same(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


def test_the_steps_are_those_that_fit(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_take(monkeypatch, clock, lambda step: 1.0)
    run(resolved(folder, *UNSET, *QUIET, "training.max_minutes=1"), clock=clock, evaluate=evaluates(clock, 5))
    log = rows(folder / "run")
    # Of 60 seconds, three are for the steps that were timed, and five for the evaluation at the end.
    assert int(log[-1]["step"]) == pytest.approx(60 - 3 - 5, abs=6)
    assert clock.now == pytest.approx(60, rel=0.1)
    assert float(log[-1]["lr"]) < 0.1 * float(log[len(log) // 2]["lr"]) == 0.1e-3


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.5, 0.3])
def test_the_end_is_chosen_anew_if_the_machine_gets_slower_or_faster(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, factor: float
) -> None:
    caplog.set_level("INFO", logger="wrinklefree")
    steps_take(monkeypatch, clock, lambda step: 1.0 if step < 25 else factor)
    run(resolved(folder, *UNSET, *QUIET, "training.max_minutes=2"), clock=clock, evaluate=evaluates(clock, 0.5))
    assert clock.now == pytest.approx(120, rel=0.1)
    assert f"the training would end {'late' if factor > 1 else 'early'} at {factor:.3g} s a step" in caplog.text
    rate = [float(row["lr"]) for row in rows(folder / "run")[1:]]
    peak = rate.index(max(rate))
    assert all(later <= earlier for earlier, later in zip(rate[peak:], rate[peak + 1 :], strict=False))
    assert rate[-1] < 0.1 * max(rate)


def test_a_machine_that_is_at_once_much_slower_is_noticed_by_the_time(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By steps alone, the next look would come after ten times a tenth of the minutes."""
    steps_take(monkeypatch, clock, lambda step: 1.0 if step < 95 else 10.0)
    run(resolved(folder, *UNSET, *QUIET, "training.max_minutes=4"), clock=clock, evaluate=evaluates(clock, 0.5))
    assert clock.now == pytest.approx(240, rel=0.1)


@pytest.mark.parametrize("pace", [lambda step: 1.0, lambda step: 1.0 if step < 15 else 1.4], ids=["even", "slower"])
@pytest.mark.parametrize("stopped", [12, 27])
def test_a_resumed_run_goes_on_with_the_plan_to_the_same_bits(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, pace: Callable[[int], float], stopped: int
) -> None:
    steps_take(monkeypatch, clock, pace)
    settings = [*UNSET, *QUIET, "training.max_minutes=1", "training.save_interval=4"]
    free = evaluates(clock, 0)
    expected = run(resolved(folder, *settings, f"output_dir={folder / 'whole'}"), clock=clock, evaluate=free)
    clock.now = 500.0
    with pytest.raises(StoppedError):
        run(resolved(folder, *settings), clock=clock, evaluate=free, on_step=stop_at(stopped))
    clock.now = 9000.0  # the next day
    found = run(resolved(folder, *settings, LATEST), clock=clock, evaluate=free)
    assert same(found, expected)
    assert rows(folder / "run") == rows(folder / "whole")


def test_a_resume_with_other_minutes_counts_those_that_were_trained(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_take(monkeypatch, clock, lambda step: 1.0)
    settings = [*UNSET, *QUIET, "training.save_interval=10"]
    free = evaluates(clock, 0)
    with pytest.raises(StoppedError):
        run(resolved(folder, *settings, "training.max_minutes=2"), clock=clock, evaluate=free, on_step=stop_at(40))
    clock.now = 1000.0
    run(resolved(folder, *settings, "training.max_minutes=1", LATEST), clock=clock, evaluate=free)
    assert int(rows(folder / "run")[-1]["step"]) == pytest.approx(57, abs=3)


def test_a_share_of_the_same_command_is_what_it_was(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, given again, has fewer stages to run, and would give this one more."""
    steps_take(monkeypatch, clock, lambda step: 1.0)
    settings = [*UNSET, *QUIET, "training.save_interval=10", "training.budget_minutes=2"]
    free = evaluates(clock, 0)
    with pytest.raises(StoppedError):
        run(resolved(folder, *settings, "training.max_minutes=1"), clock=clock, evaluate=free, on_step=stop_at(40))
    clock.now = 1000.0
    run(resolved(folder, *settings, "training.max_minutes=1.9", LATEST), clock=clock, evaluate=free)
    assert int(rows(folder / "run")[-1]["step"]) == pytest.approx(57, abs=3)


@pytest.mark.parametrize(("more", "end"), [(["training.max_minutes=2"], 117), (["training.max_steps=9"], None)])
def test_a_finished_run_may_go_on_or_not(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, more: list[str], end: int | None
) -> None:
    steps_take(monkeypatch, clock, lambda step: 1.0)
    settings, free = [*UNSET, *QUIET, "training.max_minutes=1"], evaluates(clock, 0)
    run(resolved(folder, *settings), clock=clock, evaluate=free)
    before = rows(folder / "run")
    for again in ([], more):
        clock.now += 1000
        run(resolved(folder, *settings, *again, LATEST), clock=clock, evaluate=free)
        if not again or end is None:
            assert rows(folder / "run") == before
    log = rows(folder / "run")
    if end is not None:
        assert int(log[-1]["step"]) == pytest.approx(end, abs=4)
        assert float(log[len(before)]["lr"]) > 0.5e-3  # as if the training had been planned so


def test_a_checkpoint_without_minutes_goes_on_with_them(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_take(monkeypatch, clock, lambda step: 1.0)
    free = evaluates(clock, 0)
    with pytest.raises(StoppedError):
        run(resolved(folder, "training.max_steps=20", "training.save_interval=10"), evaluate=free, on_step=stop_at(15))
    settings = [*UNSET, *QUIET, "training.max_minutes=1", LATEST]
    run(resolved(folder, *settings), clock=clock, evaluate=free)
    assert int(rows(folder / "run")[-1]["step"]) == pytest.approx(10 + 57, abs=3)


def test_too_little_for_a_step_says_what_would_do(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_take(monkeypatch, clock, lambda step: 50.0)
    with pytest.raises(UserError, match=r"^training.max_minutes=1: too little for one step, which takes 50 s") as error:
        run(resolved(folder, *UNSET, "training.max_minutes=1"), clock=clock, evaluate=evaluates(clock, 0))
    assert "\n" not in str(error.value)
    assert step_folders(folder / "run" / "checkpoints") == []
    least = re.search(r"at least (\d+) minutes", str(error.value))
    assert least is not None
    run(
        resolved(folder, *UNSET, f"training.max_minutes={least[1]}"),
        clock=clock,
        evaluate=evaluates(clock, 0),
        force=True,
    )
    assert int(rows(folder / "run")[-1]["step"]) >= 10


@pytest.mark.parametrize("length", [["training.max_steps=6"], ["training.max_steps=null", "training.total_tokens=192"]])
def test_steps_that_fit_end_the_training_early_and_timing_them_leaves_no_trace(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, length: list[str]
) -> None:
    expected = run(resolved(folder, *length, "training.optimizer.weight_decay=0.1", f"output_dir={folder / 'without'}"))
    steps_take(monkeypatch, clock, lambda step: 1.0)
    caplog.set_level("INFO", logger="wrinklefree")
    settings = [*length, "training.optimizer.weight_decay=0.1", "training.max_minutes=10"]
    found = run(resolved(folder, *settings), clock=clock)
    assert "all steps fit into the budget, so the training ends about 9" in caplog.text
    assert same(found, expected)
    assert rows(folder / "run") == rows(folder / "without")


def test_many_passes_are_no_error_but_said(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="wrinklefree")
    steps_take(monkeypatch, clock, lambda step: 1.0)
    settings = [*UNSET, *QUIET, "training.max_minutes=1", "data.max_passes=0.1"]
    run(resolved(folder, *settings), clock=clock, evaluate=evaluates(clock, 0))
    assert re.search(r"goes through the text 0.\d+ times; better: give more text \(data=local", caplog.text)


def test_the_state_of_a_budget_is_checked(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_take(monkeypatch, clock, lambda step: 1.0)
    settings = [*UNSET, "training.max_minutes=1"]
    run(resolved(folder, *settings), clock=clock, evaluate=evaluates(clock, 0))
    file = step_folders(folder / "run" / "checkpoints")[-1] / "state" / "trainer.pt"
    state = torch.load(file, weights_only=True)
    for wrong in ({"trained": -1.0}, {"seconds": float("nan")}, {"means": {STEP: 0.0}}, {"max_steps": "many"}):
        if "means" in wrong:
            wrong = {"means": state["budget"]["means"] | wrong["means"]}
        torch.save(state | {"budget": state["budget"] | wrong}, file)
        with pytest.raises(UserError, match=r"trainer.pt: not a trainer state \(budget"):
            run(resolved(folder, *settings, LATEST), clock=clock, evaluate=evaluates(clock, 0))


def test_the_most_steps_that_fit() -> None:
    draw = random.Random(0)
    for _ in range(300):
        means = {STEP: draw.uniform(0.1, 5), EVALUATION: draw.uniform(0, 20), SAVE: draw.uniform(0, 20)}
        every = Intervals(draw.randint(1, 50), draw.randint(1, 50))
        step, seconds = draw.randint(0, 100), draw.uniform(0, 1000)
        last = fitting(step, seconds, means, every)
        assert all(rest(step, last + more, means, every) > seconds for more in range(1, 200))
        assert last == step or rest(step, last, means, every) <= seconds


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize("last", [60, 300])
def test_a_schedule_with_another_end_goes_on_from_where_it_is_and_ends_at_zero(name: str, last: int) -> None:
    before = Plan(100, 1e-3, torch.float32, 16, 32, minutes=1)
    after = before.ending(50, last)
    a_step = 0.5 / (last - 50)
    assert before.progress(49, 0) == pytest.approx(0.5 - 0.01 / 2)
    assert after.progress(50, 0) == pytest.approx(0.5 + a_step / 2)
    assert after.progress(last - 1, 0) == pytest.approx(1 - a_step / 2)
    rate = rates(SchedulerConfig(name=name))
    assert rate(after.progress(50, 0)) == pytest.approx(rate(before.progress(49, 0)), abs=0.07)
    assert rate(1.0) == pytest.approx(0)


def test_minutes_are_split_in_proportion() -> None:
    assert split(90, [1, 0, 2]) == [30, 0, 60]
    assert split(90, [0, 0]) == [0, 0]


def test_the_pace_is_that_of_the_last_look(clock: Clock) -> None:
    pace = Pace(clock)
    for seconds in (1.0, 3.0):
        with pace.timed(STEP):
            clock.now += seconds
    pace.settle()
    with pace.timed(SAVE):
        clock.now += 7
    pace.settle()
    assert pace.means == {STEP: 2.0, SAVE: 7.0}


CPU, GPU = torch.device("cpu"), torch.device("cuda")
SOME = ModelConfig(name="some", pretrained="some")
SMALL = ModelConfig(name="small", pretrained="small", auto_minutes=5)


@pytest.mark.parametrize(
    ("values", "model", "device", "expected"),
    [
        ({}, SOME, CPU, CPU_MINUTES),
        ({}, SMALL, CPU, 5),
        ({}, SOME, GPU, None),
        ({"max_minutes": 3.0}, SOME, GPU, 3),
        ({"max_minutes": 3.0, "max_steps": 10}, SOME, CPU, 3),
        ({"max_minutes": 3.0, "max_steps": 0}, SOME, CPU, None),
        ({"max_minutes": 3.0, "max_steps": 0, "blockwise": BlockwiseConfig(enabled=True)}, SOME, CPU, 3),
        ({"max_steps": 0, "blockwise": BlockwiseConfig(enabled=True)}, SOME, CPU, None),
        ({"max_minutes": None}, SOME, CPU, None),
        ({"max_steps": 10}, SOME, CPU, None),
        ({"total_tokens": 10}, SOME, CPU, None),
    ],
)
def test_auto_is_minutes_on_a_cpu_and_tokens_elsewhere(
    values: dict[str, Any], model: ModelConfig, device: torch.device, expected: float | None
) -> None:
    found = choose_minutes(TrainingConfig(stage="x", **values), model, device)
    assert (None if found is None else found.value) == expected


def test_looks_are_few(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_take(monkeypatch, clock, lambda step: 1.0)
    settled = []
    monkeypatch.setattr(Pace, "settle", lambda self: settled.append(clock.now))
    run(resolved(folder, *UNSET, *QUIET, "training.max_minutes=2"), clock=clock, evaluate=evaluates(clock, 0))
    assert pacing.MARKS / 2 <= len(settled) <= pacing.MARKS


def test_a_checkpoint_is_saved_after_so_many_minutes_without_one(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of four minutes, and `save_interval` far away: every third step saves, and a kill loses two at most."""
    steps_take(monkeypatch, clock, lambda step: 240.0)
    settings = resolved(
        folder, *UNSET, *QUIET, "training.max_minutes=60", "training.save_minutes=10", "training.save_total_limit=9"
    )
    with pytest.raises(StoppedError):
        run(settings, clock=clock, on_step=stop_at(8))
    saved = [path.name for path in step_folders(Path(settings.output_dir) / "checkpoints")]
    assert saved == ["step_3", "step_6"]
