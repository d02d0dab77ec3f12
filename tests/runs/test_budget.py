"""The minutes of a command: how they are written, who gets which part, and what is said before anything starts."""

import re
from pathlib import Path

import pytest
import torch
from toyrun import toy_files
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.commands import train
from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import write_json
from wrinklefree.runs import budget, launch
from wrinklefree.runs.budget import CommandBudget, command_budget, parse_minutes

NUMBERS = ["training.total_tokens=64"]


class Clock:
    """A clock that stands still until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of every command of the test."""
    clock = Clock()
    timed = budget.command_budget
    monkeypatch.setattr(launch, "command_budget", lambda text, model: timed(text, model, clock))
    monkeypatch.setattr(train, "command_budget", lambda text, model: timed(text, model, clock))
    return clock


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[Config]:
    """The stages that ran. Each takes 10 minutes, trains nothing, and is done."""
    configs: list[Config] = []

    def stage(config: Config, force: bool) -> None:
        configs.append(config)
        clock.now += 600
        write_json(_made(Path(config.output_dir) / "final") / "config.json", {})
        (Path(config.output_dir) / "final" / "wrinklefree.yaml").write_text(config_yaml(config))
        figures = {"ppl": 1.0, "kl": 0.0}
        write_json(Path(config.output_dir) / "results.json", {"trained": figures, "one_shot": figures, "accuracy": {}})

    monkeypatch.setattr(launch, "train_stage", stage)
    return configs


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def wf(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.stdout + result.stderr


def minutes(configs: list[Config]) -> dict[str, object]:
    return {config.training.stage: config.training.max_minutes for config in configs}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2h", 120), ("90m", 90), ("1h30m", 90), ("45s", 0.75), ("1.5h", 90), (" 2H ", 120), ("1h0m30s", 60.5)],
)
def test_times_are_read(text: str, expected: float) -> None:
    assert parse_minutes(text) == expected


@pytest.mark.parametrize("text", ["", "2", "h", "0m", "2 hours", "1m2h", "-1h", "nanh", "1e3h"])
def test_what_is_no_time_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^--budget .*: not a length of time; write 2h, 90m, 1h30m or 45s$"):
        parse_minutes(text)


def test_stages_share_what_is_left(folder: Path, ran: list[Config]) -> None:
    """What a stage does not need, the others get."""
    command = ["bitdistill", "-m", "./toy", "--task", "sst2", "--stages", "1,2,3", "--budget", "110m"]
    code, said = wf(*command, "2:training.budget_share=3", "3:training.budget_share=1")
    assert code == 0, said
    assert minutes(ran) == pytest.approx({"stage1_subln": 110 / 9, "stage2_pretrain": 75, "stage3_distill": 90})
    assert {config.training.budget_minutes for config in ran} == {110}
    assert re.search(r"budget of 110 minutes: stage1_subln 12.2 minutes, stage2_pretrain 73.3 minutes", said)


def test_steps_that_are_made_for_gpus_are_smaller_on_a_cpu(folder: Path, ran: list[Config]) -> None:
    command = ["bitdistill", "-m", "./toy", "--task", "sst2", "--stages", "2", "--budget", "110m"]
    wf(*command, "training.max_seq_length=256")
    wf(*command, "training.max_seq_length=256", "training.batch_size=64", "--force")
    wf(*command[:-2], "training.max_seq_length=256", "training.max_steps=3", "--force")
    sizes = [(config.training.batch_size, config.training.gradient_accumulation_steps) for config in ran]
    assert sizes == [(8, 1), (64, 16), (32, 16)]


@pytest.mark.slow
def test_a_stage_that_is_done_gives_its_share_to_the_others(folder: Path, ran: list[Config]) -> None:
    command = ["anemll", "-m", "./toy", "--workflow", "c", "--budget", "2h", "q4:training.max_minutes=5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wrinklefree.commands.anemll.load_model", lambda *args, **more: (_ for _ in ()).throw(KeyError))
        wf(*command)
        assert minutes(ran) == {"c_q4": 5, "c_q2": 110}
        (Path(ran[1].output_dir) / "results.json").unlink()
        ran.clear()
        wf(*command)
        assert minutes(ran) == {"c_q2": 120}


def test_needed_stages_have_a_share(folder: Path, ran: list[Config]) -> None:
    command = ["train", "model=./toy", "training=stage2_pretrain", "auto_prereq=true", "--budget", "70m"]
    code, said = wf(*command)
    assert code == 0, said
    assert minutes(ran) == {"stage1_subln": 14, "stage2_pretrain": 60}


def test_a_budget_that_is_over_is_one_line(folder: Path, ran: list[Config]) -> None:
    code, said = wf("bitdistill", "-m", "./toy", "--task", "sst2", "--stages", "1,2", "--budget", "9m")
    assert code == 2
    assert said.splitlines()[-1].startswith("error: --budget: the 9 minutes are over before stage2_pretrain: the same")


def test_on_a_cpu_there_is_a_budget_unless_one_says_how_long(
    folder: Path, ran: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "own_device", lambda: torch.device("cpu"))
    code, said = wf("fairy2", "-m", "./toy")
    assert code == 0, said
    assert "on a CPU this takes 2 hours, unless you say otherwise: --budget 8h, training.total_tokens=N or" in said
    assert minutes(ran) == {"w2": 120}
    ran.clear()
    code, said = wf("bitdistill", "-m", "./toy", "--task", "sst2", "--stages", "1,2,3", "2:training.max_steps=5")
    assert code == 0, said
    assert minutes(ran) == {"stage1_subln": "auto", "stage2_pretrain": "auto", "stage3_distill": 100}
    ran.clear()
    for more in (NUMBERS, ["training.max_steps=5"], ["training.max_minutes=7"], ["training.max_minutes=null"]):
        code, said = wf("fairy2", "-m", "./toy", "--force", *more)
        assert (code, "on a CPU this takes" in said) == (0, False)
    assert [config.training.budget_minutes for config in ran] == [None] * 4


def test_a_training_of_your_own_is_as_long_as_it_says(folder: Path, ran: list[Config]) -> None:
    (folder / "configs" / "training").mkdir(parents=True)
    own = "# @package _global_\ndefaults:\n  - fairy2_w1\n\ntraining:\n  stage: own\n  max_steps: 100000\n"
    (folder / "configs" / "training" / "own.yaml").write_text(own)
    assert wf("train", "model=./toy", "training=own")[0] == 0
    assert minutes(ran) == {"own": "auto"}


@pytest.mark.parametrize(("model", "device"), [("model=tiny", "cpu"), ("model=./toy", "cuda")])
def test_other_defaults_than_two_hours(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, device: str) -> None:
    """The small model says by itself how long a stage is, and a GPU has the table of tokens."""
    monkeypatch.setattr(budget, "own_device", lambda: torch.device(device))
    config = load_config([model])
    assert command_budget(None, config) is None
    asked = command_budget("1h", config)
    assert isinstance(asked, CommandBudget)
    assert asked.minutes == 60


def test_a_dry_run_shows_the_budget_and_the_split(
    folder: Path, clock: Clock, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", logger="wrinklefree")
    train.run(
        ["model=./toy", "training=stage3_distill", "task=sst2", "auto_prereq=true", "training.max_seq_length=32"],
        dry_run=True,
        budget="90m",
    )
    assert re.search(
        r"budget of 90 minutes: stage0_sft [\d.]+ minutes, stage2_pretrain [\d.]+ minutes, stage3", caplog.text
    )
    assert re.search(r"max_minutes: \d+", capsys.readouterr().out)
    assert "minutes for this stage" in caplog.text
    assert not (folder / "outputs").exists()
