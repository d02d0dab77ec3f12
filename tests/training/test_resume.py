"""A resumed run: the plan it goes on with, the branch it is on, and what it must never destroy."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toyrun import CPU, resolved, rows, run, tensors, toy_files

from wrinklefree.config.schema import ModelConfig, SchedulerConfig, TrainingConfig
from wrinklefree.core import replaced
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import SCHEDULES, names
from wrinklefree.core.signals import STOPPING
from wrinklefree.runs.folder import outputs
from wrinklefree.runs.setup import Run, open_run
from wrinklefree.training import checkpoint, saved_state, uploads
from wrinklefree.training.plan import Plan
from wrinklefree.training.schedule import rates

LATEST = "training.resume_from=latest"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_files(tmp_path)
    return tmp_path


def steps(run_folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.step_folders(run_folder / "checkpoints")]


def saving(*more: str) -> list[str]:
    """Settings of a run that keeps a checkpoint of every second step."""
    return ["training.save_interval=2", "training.save_total_limit=9", *more]


class StoppedError(Exception):
    """What stands for a kill."""


def stop_at(step: int) -> Callable[[nn.Module, int], None]:
    def on_step(model: nn.Module, now: int) -> None:
        if now == step:
            raise StoppedError

    return on_step


@pytest.fixture
def finished(folder: Path) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    run(resolved(folder, *saving()))
    return folder


def test_a_run_past_its_end_says_so_and_ends(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = saved_state.load_state(finished / "run" / "checkpoints" / "step_6")
    caplog.set_level("INFO", logger="wrinklefree")
    run(resolved(finished, *saving(LATEST, "training.max_steps=4")))
    assert "the training ends with step 4, so there is nothing left to train" in caplog.text
    assert steps(finished / "run") == [2, 4, 6]
    after = saved_state.load_state(finished / "run" / "checkpoints" / "step_6")
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors(before), tensors(after), strict=True))


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 9), (2, 6), (3, 5), (4, 4)])
def test_tokens_are_the_plan_whatever_the_batch(folder: Path, batch_size: int, expected: int) -> None:
    """192 tokens: 3 steps of 32, then what is left in steps of another size."""
    tokens = ["training.max_steps=null", "training.total_tokens=192", "training.log_interval=1"]
    with pytest.raises(StoppedError):
        run(resolved(folder, "training.save_interval=3", *tokens), on_step=stop_at(3))
    run(resolved(folder, LATEST, *tokens, f"training.batch_size={batch_size}"))
    last = rows(folder / "run")[-1]
    assert int(last["step"]) == expected
    assert 192 - 16 * batch_size < int(last["tokens"]) <= 192
    assert 0 < float(last["lr"]) <= 1e-3


def plan(per_step: int, **values: int | None) -> Plan:
    return Plan(6, 1e-3, torch.float32, 16, per_step, **values)


def test_progress_goes_from_0_to_1_however_steps_are_cut() -> None:
    whole = plan(32, total_tokens=192)
    by_step = [whole.progress(step, 32 * step) for step in range(6)]
    assert by_step == [plan(32).progress(step, 32 * step) for step in range(6)]  # the bits of a plan in steps
    other = plan(64, total_tokens=192).resumed(3, 96)
    assert other.max_steps == 4
    assert by_step[2] < other.progress(3, 96) < 1


@pytest.mark.parametrize("name", names(SCHEDULES))
def test_schedules_are_clamped_at_their_end(name: str) -> None:
    rate = rates(SchedulerConfig(name=name, min_lr_ratio=0.1))
    assert rate(1.0) == rate(1.5) == rate(50.0)
    assert rate(50.0) == pytest.approx(0.1)


def test_going_back_sets_later_checkpoints_aside(finished: Path) -> None:
    log = rows(finished / "run")
    (finished / "run" / "results.json").write_text("{}")
    early = f"training.resume_from={finished / 'run' / 'checkpoints' / 'step_2'}"
    with pytest.raises(StoppedError):
        run(resolved(finished, *saving(early, "training.lr=0.002")), on_step=stop_at(5))
    out, kept = finished / "run", finished / "run" / "abandoned_1"
    assert steps(out) == [2, 4]
    assert steps(kept) == [4, 6]
    assert (kept / "final" / "model.safetensors").is_file()
    assert (kept / "results.json").is_file()
    assert not (out / "results.json").exists()
    assert rows(kept) == log
    run(resolved(finished, *saving(LATEST, "training.lr=0.002")))  # the newest of this branch
    assert [float(row["lr"]) for row in rows(out)][3:] == pytest.approx([2 * float(row["lr"]) for row in log][3:])
    run(resolved(finished, *saving(early)))
    assert steps(finished / "run" / "abandoned_2") == [4, 6]


def test_a_resume_that_is_refused_changes_nothing(finished: Path) -> None:
    out = finished / "run"
    (out / "results.json").write_text("{}")
    (finished / "text" / "00.txt").rename(finished / "text" / "zz.txt")
    back = f"training.resume_from={out / 'checkpoints' / 'step_2'}"
    with pytest.raises(UserError, match=r"saved with data\.path"):
        run(resolved(finished, *saving(back)))
    assert steps(out) == [2, 4, 6]
    assert (out / "results.json").is_file()
    assert not (out / "abandoned_1").exists()


def test_checkpoints_of_another_branch_are_never_pruned_for_it(finished: Path) -> None:
    """With a limit of 1, the first checkpoint of the new branch would be the oldest of all."""
    early = f"training.resume_from={finished / 'run' / 'checkpoints' / 'step_2'}"
    one = ["training.save_interval=1", "training.save_total_limit=1"]
    with pytest.raises(StoppedError):
        run(resolved(finished, early, *one), on_step=stop_at(2))
    assert steps(finished / "run") == [2]
    with pytest.raises(StoppedError):
        run(resolved(finished, LATEST, *one), on_step=stop_at(3))
    assert steps(finished / "run") == [3]
    assert steps(finished / "run" / "abandoned_1") == [4, 6]


def test_a_checkpoint_from_elsewhere_sets_all_of_this_folder_aside(finished: Path) -> None:
    other = [f"output_dir={finished / 'other'}", *saving()]
    run(resolved(finished, *other, "training.max_steps=4"))
    elsewhere = f"training.resume_from={finished / 'run' / 'checkpoints' / 'step_2'}"
    run(resolved(finished, *other, elsewhere))
    assert steps(finished / "other") == [4, 6]
    assert steps(finished / "other" / "abandoned_1") == [2, 4]
    assert steps(finished / "run") == [2, 4, 6]


def held_out(losses: dict[int, float]) -> tuple[Callable[[nn.Module], dict[str, float]], Callable[..., None]]:
    """An evaluation with these losses by step, and the `on_step` that counts the steps for it."""
    now = [0]

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"eval_loss": losses[now[0]]}

    def count(model: nn.Module, step: int) -> None:
        now[0] = step + 1

    return evaluate, count


def best_step(folder: Path) -> int:
    step: int = json.loads((folder / "run" / "best" / "progress.json").read_text())["step"]
    return step


KEEP = ["training.keep_best=true", "training.eval_interval=1", "training.save_total_limit=9"]


def test_patience_that_ran_out_stays_run_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    patient = [*KEEP, "training.patience=2", "training.save_interval=9"]
    evaluate, count = held_out({1: 1.0, 2: 2.0, 3: 3.0})
    run(resolved(folder, *patient), evaluate=evaluate, on_step=count)
    assert steps(folder / "run") == [3]
    evaluate, count = held_out({3: 3.0})
    run(resolved(folder, *patient, LATEST), evaluate=evaluate, on_step=count)
    assert steps(folder / "run") == [3]
    evaluate, count = held_out({3: 3.0, 4: 0.5, 5: 0.4, 6: 0.3})
    run(resolved(folder, *patient[:-2], "training.patience=3", LATEST), evaluate=evaluate, on_step=count)
    assert steps(folder / "run") == [3, 6]
    assert best_step(folder) == 6


def test_the_best_model_is_the_one_that_the_checkpoint_knows(folder: Path) -> None:
    """Killed after a better model was saved, and resumed where no step is better: the older one is back."""
    settings = [*KEEP, "training.save_interval=2"]
    evaluate, count = held_out({1: 2.0, 2: 3.0, 3: 1.0})

    def stopped(model: nn.Module, step: int) -> None:
        count(model, step)
        stop_at(3)(model, step)

    with pytest.raises(StoppedError):
        run(resolved(folder, *settings), evaluate=evaluate, on_step=stopped)
    assert best_step(folder) == 3
    assert (folder / "run" / ".best_before").is_dir()
    worse, count = held_out({3: 4.0, 4: 4.0, 5: 4.0, 6: 4.0})
    run(resolved(folder, *settings, LATEST), evaluate=worse, on_step=count)
    assert best_step(folder) == 1
    assert not (folder / "run" / ".best_before").exists()


def test_another_machine_finds_the_best_model_in_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    """The machine with the best model is lost, and no later step is better: it is in the store, and final."""
    settings = [*KEEP, "training.save_interval=2"]
    losses = {1: 1.0} | dict.fromkeys(range(2, 7), 4.0)
    evaluate, count = held_out(losses)
    expected = run(resolved(folder, *settings), evaluate=evaluate, on_step=count)
    shutil.rmtree(folder / "run")
    store = tmp_path / "store"
    evaluate, count = held_out(losses)

    def stopped(model: nn.Module, step: int) -> None:
        count(model, step)
        stop_at(5)(model, step)

    with pytest.raises(StoppedError):
        run(resolved(folder, *settings, f"training.upload_to=file://{store}"), evaluate=evaluate, on_step=stopped)
    shutil.rmtree(folder / "run")
    evaluate, count = held_out(losses)
    found = run(
        resolved(folder, *settings, f"training.resume_from=file://{store}/step_4"), evaluate=evaluate, on_step=count
    )
    assert best_step(folder) == 1
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_a_best_model_of_an_abandoned_branch_is_not_final(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = [*KEEP, "training.save_interval=2"]
    evaluate, count = held_out({1: 3.0, 2: 2.0, 3: 1.5, 4: 1.0, 5: 1.1, 6: 1.2})
    run(resolved(folder, *settings), evaluate=evaluate, on_step=count)
    assert best_step(folder) == 4
    caplog.set_level("INFO", logger="wrinklefree")
    worse, count = held_out({3: 4.0, 4: 4.0, 5: 4.0, 6: 4.0})
    early = f"training.resume_from={folder / 'run' / 'checkpoints' / 'step_2'}"
    model = run(resolved(folder, *settings, early), evaluate=worse, on_step=count)
    assert best_step(folder) == 2  # from its checkpoint
    saved = saved_state.load_state(folder / "run" / "checkpoints" / "step_6")
    assert (saved["best_step"], saved["best_loss"]) == (2, 2.0)
    assert json.loads((folder / "run" / "abandoned_1" / "best" / "progress.json").read_text())["step"] == 4
    again = f"training.resume_from={folder / 'run' / 'abandoned_1' / 'checkpoints' / 'step_6'}"
    worse, count = held_out({6: 9.0})
    run(resolved(folder, *settings, again), evaluate=worse, on_step=count)
    assert torch.isfinite(model.get_parameter("model.norm.weight")).all()


def test_a_best_model_that_cannot_be_copied_is_named(folder: Path) -> None:
    settings = [*KEEP, "training.save_interval=2"]
    evaluate, count = held_out({1: 3.0, 2: 2.0, 3: 1.5, 4: 1.0, 5: 1.1, 6: 1.2})
    run(resolved(folder, *settings), evaluate=evaluate, on_step=count)
    step = folder / "run" / "checkpoints" / "step_2"
    (step / "gone.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"step_2/gone\.json: cannot be copied to .*best"):
        run(resolved(folder, *settings, f"training.resume_from={step}"), evaluate=evaluate, on_step=count)


def test_a_best_model_of_this_branch_stays_when_its_checkpoint_is_gone(folder: Path) -> None:
    evaluate, on_step = held_out({1: 3.0, 2: 2.0} | dict.fromkeys(range(3, 7), 4.0))
    few = ["training.save_interval=1", *KEEP, "training.save_total_limit=3"]
    run(resolved(folder, *few), evaluate=evaluate, on_step=on_step)
    assert (best_step(folder), steps(folder / "run")) == (2, [4, 5, 6])
    back = f"training.resume_from={folder / 'run' / 'checkpoints' / 'step_4'}"
    run(resolved(folder, *few, back), evaluate=evaluate, on_step=on_step)
    assert best_step(folder) == 2
    assert not (folder / "run" / "abandoned_1" / "best").exists()


def test_a_new_run_that_was_killed_after_its_first_save_stays(finished: Path) -> None:
    """Between its first checkpoint and the end of the old run."""
    out = finished / "run"
    replaced.set_aside(out, outputs(out))
    shutil.copytree(out / ".replaced" / "checkpoints" / "step_2", out / "checkpoints" / "step_2")
    run(resolved(finished, *saving(LATEST, "training.max_steps=3")))
    assert steps(out) == [2, 3]
    assert not (out / ".replaced").exists()


def test_a_run_without_a_checkpoint_is_not_offered_to_go_on(folder: Path) -> None:
    with pytest.raises(StoppedError):
        run(resolved(folder), on_step=stop_at(1))
    with pytest.raises(UserError, match="already holds a run: choose another output_dir"):
        run(resolved(folder))


def test_force_keeps_the_old_run_until_the_new_one_has_saved(finished: Path) -> None:
    before = (finished / "run" / "final" / "model.safetensors").read_bytes()
    with pytest.raises(StoppedError):
        run(resolved(finished, "training.lr=0.01"), force=True, on_step=stop_at(3))
    assert (finished / "run" / "final" / "model.safetensors").read_bytes() == before
    assert steps(finished / "run") == [2, 4, 6]
    assert len(rows(finished / "run")) == 6
    with pytest.raises(StoppedError):
        run(resolved(finished, "training.lr=0.01", "training.save_interval=1"), force=True, on_step=stop_at(1))
    assert steps(finished / "run") == [1]
    assert not (finished / "run" / ".replaced").exists()


def test_a_kill_before_the_first_save_is_undone_at_the_next_start(finished: Path) -> None:
    out = finished / "run"
    (out / ".replaced").mkdir()
    for name in ("checkpoints", "final"):
        (out / name).rename(out / ".replaced" / name)
    (out / "checkpoints" / ".step_2.tmp").mkdir(parents=True)  # what a kill in the middle of a save leaves
    with pytest.raises(UserError, match="already holds a run"):
        run(resolved(finished))
    assert steps(out) == [2, 4, 6]


def test_two_runs_in_one_folder_are_refused(folder: Path) -> None:
    refused = []

    def second(model: nn.Module, step: int) -> None:
        for more in ([], [LATEST]):
            with pytest.raises(UserError, match="another process is writing it") as error:
                run(resolved(folder, *more), force=not more)
            refused.append(str(error.value))

    run(resolved(folder, "training.max_steps=1"), on_step=second)
    assert len(refused) == 2
    run(resolved(folder, "training.max_steps=1"), force=True)


def test_the_plan_counts_tokens_only_if_the_user_did() -> None:
    from wrinklefree.distributed.world import ALONE
    from wrinklefree.training.plan import make_plan

    model = ModelConfig(name="some", pretrained="some", auto_tokens=640)
    lm = nn.Linear(1, 1)
    lm.num_parameters = lambda: 2  # type: ignore[assignment]
    steps_set = make_plan(TrainingConfig(stage="x", max_steps=3, batch_size=2), model, lm, 16, ALONE)  # type: ignore[arg-type]
    tokens_set = make_plan(TrainingConfig(stage="x", total_tokens=320, batch_size=2), model, lm, 16, ALONE)  # type: ignore[arg-type]
    assert (steps_set.max_steps, steps_set.total_tokens) == (3, None)
    assert (tokens_set.max_steps, tokens_set.total_tokens) == (10, 320)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_saves_and_ends(folder: Path, number: signal.Signals) -> None:
    """Ctrl-C; SIGTERM, which Slurm, Kubernetes and spot machines send; SIGHUP, when a terminal closes."""
    before = signal.signal(number, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    try:
        with pytest.raises(UserError, match=r"stopped at step 3, saved; go on with training.resume_from=latest"):
            run(resolved(folder), on_step=lambda model, step: signal.raise_signal(number) if step == 2 else None)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert steps(folder / "run") == [3]


def test_a_signal_before_the_first_step_does_not_say_that_it_saved(folder: Path) -> None:
    def interrupt(model: nn.Module) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return {"eval_loss": 1.0}

    config = resolved(folder, "training.eval_first=true")
    with pytest.raises(UserError, match="stopped before the first step, so nothing is saved; start over with --force"):
        run(config, evaluate=interrupt)
    assert steps(folder / "run") == []


def test_an_ignored_signal_stays_ignored(folder: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(resolved(folder), on_step=lambda model, step: signal.raise_signal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert rows(folder / "run")[-1]["step"] == "6"


class Failing(Iterator[Batch]):
    """A stream whose fourth batch cannot be read until it is mended."""

    skipped = 0

    def __init__(self, stream: Iterator[Batch], broken: list[bool]) -> None:
        self.stream, self.broken, self.served = stream, broken, 0

    def __next__(self) -> Batch:
        batch = next(self.stream)
        self.served += 1
        if self.served == 4 and self.broken:
            raise UserError("rows.jsonl, line 7: not JSON")
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served, "inner": self.stream.state_dict()}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]
        self.stream.load_state_dict(state["inner"])  # type: ignore[attr-defined]


def test_data_that_cannot_be_read_on_is_saved_before_and_read_again_after(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches a step, of which the second of the second step is broken: that step's first is read again."""
    two = ["training.gradient_accumulation_steps=2"]
    expected = run(resolved(folder, *two, f"output_dir={folder / 'whole'}"))
    broken, stream = [True], Run.stream
    monkeypatch.setattr(Run, "stream", lambda self: Failing(stream(self), broken))
    with pytest.raises(UserError, match=r"rows.jsonl, line 7: not JSON; stopped at step 1, saved; once it is mended"):
        run(resolved(folder, *two))
    assert steps(folder / "run") == [1]
    broken.clear()
    found = run(resolved(folder, *two, LATEST))
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_data_that_cannot_be_read_at_all_saves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Run.stream

    def nothing(self: Run) -> Failing:
        failing = Failing(stream(self), [True])
        failing.served = 3
        return failing

    monkeypatch.setattr(Run, "stream", nothing)
    with pytest.raises(UserError, match=r"rows.jsonl, line 7: not JSON") as error:
        run(resolved(folder))
    assert "saved" not in str(error.value)
    assert steps(folder / "run") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda moments: moments.update(step=torch.tensor(-1.0)), "step of parameter 0 is below 0"),
        (lambda moments: moments.update(exp_avg=moments["exp_avg"] * float("nan")), "exp_avg of parameter 0"),
    ],
    ids=["negative step", "nan"],
)
def test_moments_that_no_training_leaves_are_refused(
    finished: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    file = finished / "run" / "checkpoints" / "step_4" / "state" / "trainer.pt"
    state = torch.load(file, weights_only=True)
    change(state["optimizers"][0]["state"][0])
    torch.save(state, file)
    with pytest.raises(UserError, match=message):
        run(resolved(finished, f"training.resume_from={file.parents[1]}"))


def test_a_run_that_ended_while_this_one_was_loading_is_not_replaced(folder: Path) -> None:
    opened = open_run(resolved(folder), world=CPU)
    run(resolved(folder))
    with opened, pytest.raises(UserError, match="already holds a run: go on with"):
        opened.begin()
    assert (folder / "run" / "final" / "model.safetensors").is_file()
    assert steps(folder / "run") == [6]


def test_checkpoints_of_a_new_branch_are_not_taken_for_uploaded(finished: Path) -> None:
    record = finished / "run" / uploads.RECORD
    record.write_text("{}")
    early = f"training.resume_from={finished / 'run' / 'checkpoints' / 'step_2'}"
    run(resolved(finished, *saving(early)))
    assert not record.exists()
    assert (finished / "run" / "abandoned_1" / uploads.RECORD).is_file()
