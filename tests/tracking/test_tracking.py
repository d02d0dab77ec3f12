"""What a run leaves for people to read: the CSV log, progress lines, W&B records and plots."""

import csv
import json
import sqlite3
import sys
import types
from pathlib import Path

import pytest
import yaml

from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import Config, WandbConfig
from wrinklefree.core.errors import UserError
from wrinklefree.tracking.plotting import plot_runs, smooth
from wrinklefree.tracking.progress import Lines
from wrinklefree.tracking.run_log import COLUMNS, CSV_NAME, Tracker
from wrinklefree.tracking.terminal import short_number, short_size, short_time

ROW = {"train_loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "tokens": 4096, "tokens_per_sec": 1234.5}


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config([])


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / CSV_NAME).open(newline="") as file:
        return list(csv.DictReader(file))


def record(folder: Path, config: Config, steps: range, start: int = 0) -> None:
    with Tracker(folder, 100, config.training.logging.wandb, config_yaml(config), start) as tracker:
        for step in steps:
            tracker.log(step, ROW)
            tracker.update(step, ROW["train_loss"], ROW["lr"], ROW["tokens_per_sec"])


def test_columns_and_empty_cells(tmp_path: Path, config: Config) -> None:
    record(tmp_path, config, range(1, 4))
    rows = read(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["eval_loss"] == ""
    assert float(rows[0]["lr"]) == 1e-4
    assert rows[0]["tokens"] == "4096"


def test_a_row_is_on_disk_while_the_run_goes_on(tmp_path: Path, config: Config) -> None:
    with Tracker(tmp_path, 10, config.training.logging.wandb) as tracker:
        tracker.log(1, ROW)
        assert len(read(tmp_path)) == 1


def test_resume_drops_what_came_after(tmp_path: Path, config: Config) -> None:
    record(tmp_path, config, range(1, 8))
    before = read(tmp_path)
    record(tmp_path, config, range(5, 7), start=4)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert rows[:4] == before[:4]
    elapsed = [float(row["elapsed_sec"]) for row in rows]
    assert elapsed == sorted(elapsed)
    assert list(tmp_path.iterdir()) == [tmp_path / CSV_NAME]


def test_resume_survives_a_row_cut_short(tmp_path: Path, config: Config) -> None:
    record(tmp_path, config, range(1, 4))
    path = tmp_path / CSV_NAME
    path.write_text(path.read_text() + "4,2.5")
    record(tmp_path, config, range(5, 6), start=4)
    assert [row["step"] for row in read(tmp_path)] == ["1", "2", "3", "5"]


def test_a_fresh_start_begins_a_new_log(tmp_path: Path, config: Config) -> None:
    record(tmp_path, config, range(1, 8))
    record(tmp_path, config, range(1, 3))
    assert [row["step"] for row in read(tmp_path)] == ["1", "2"]


def test_a_new_metric_becomes_a_column(tmp_path: Path, config: Config) -> None:
    with Tracker(tmp_path, 10, config.training.logging.wandb) as tracker:
        tracker.log(1, ROW)
        tracker.log(2, ROW | {"eval_loss": 2.25, "train_kl": 0.5, "quant_error/layers.0": 0.3})
        tracker.log(3, ROW)
    rows = read(tmp_path)
    assert tuple(rows[0]) == (*COLUMNS, "train_kl")
    assert [row["train_kl"] for row in rows] == ["", "0.5", ""]
    assert [row["eval_loss"] for row in rows] == ["", "2.25", ""]


def test_progress_is_plain_lines_without_a_terminal(tmp_path: Path, config: Config, capsys) -> None:
    record(tmp_path, config, range(99, 101))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "step 100/100  loss 2.500  lr 1.0e-04  1.23k tok/s  ETA 0:00:00"
    assert max(map(len, lines)) <= 80


def test_progress_lines_are_seldom(capsys) -> None:
    lines = Lines(1000)
    for step in range(1, 1001):
        lines.show(step, "x")
    assert capsys.readouterr().out.splitlines() == ["step 1/1000  x", "step 1000/1000  x"]


def test_missing_wandb_names_the_extra(tmp_path: Path, config: Config, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'wrinklefree\[wandb\]'"):
        Tracker(tmp_path, 10, WandbConfig(enabled=True))


def test_trackio_keeps_every_number_and_goes_on_with_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # read when the package is imported, here alone
    trackio = pytest.importorskip("trackio")
    config = WandbConfig(enabled=True, service="trackio")
    for start in (0, 1):
        with Tracker(tmp_path / "run", 10, config, "seed: 1", start) as tracker:
            tracker.log(start + 1, ROW | {"quant_error/mean": 0.25})
    trackio._cleanup_current_run()  # what the package does when the process ends
    assert "rackio" not in capsys.readouterr().out
    with sqlite3.connect(tmp_path / "kept" / "wrinklefree-fairy2.db") as kept:
        rows = kept.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [("run", 1), ("run", 2)]
    logged = json.loads(rows[0][2])
    assert logged["quant_error/mean"] == 0.25
    assert ROW.items() <= logged.items()


class FakeRun:
    """Records what a W&B run would."""

    id = "abc"

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((step, data))

    def finish(self) -> None:
        """Nothing to send."""


def test_wandb_gets_every_number_and_the_same_run_on_resume(tmp_path: Path, config, monkeypatch) -> None:
    calls: list[dict[str, object]] = []
    run = FakeRun()

    def init(**kwargs: object) -> FakeRun:
        calls.append(kwargs)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for start in (0, 1):
        with Tracker(tmp_path, 10, WandbConfig(enabled=True), config_yaml(config), start) as tracker:
            tracker.log(start + 1, ROW | {"quant_error/mean": 0.25})
    assert [call["id"] for call in calls] == [None, "abc"]
    assert calls[0]["mode"] == "offline"
    assert calls[0]["project"] == "wrinklefree-fairy2"
    assert calls[0]["config"] == yaml.safe_load(config_yaml(config))
    step, logged = run.logged[0]
    assert step == 1
    assert logged["quant_error/mean"] == 0.25
    assert ROW.items() <= logged.items()


def test_plot_of_runs_with_and_without_a_teacher_is_a_png(tmp_path: Path, config: Config) -> None:
    record(tmp_path / "w1", config, range(1, 30))
    with Tracker(tmp_path / "w2", 30, config.training.logging.wandb) as tracker:
        for step in range(1, 30):
            tracker.log(step, ROW | {"train_ce": 3.0 / step, "train_kl": 1.0 / step, "eval_loss": 4.0 / step})
    out = tmp_path / "plots" / "loss.png"
    plot_runs([tmp_path / name / CSV_NAME for name in ("w1", "w2")], out)
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "step,train_loss\n", "step,other\n1,2\n"])
def test_plot_refuses_what_is_no_log(tmp_path: Path, content: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"log\.csv"):
        plot_runs([path], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_a_straight_line_straight() -> None:
    line = [float(i) for i in range(20)]
    assert smooth(line, 4) == line
    assert smooth([0.0, 3.0, 0.0], 1) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.9, "1.00k"), (12_345, "12.3k"), (4_560_000, "4.56M"), (1e10, "10.0B")],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


def test_short_size_and_time() -> None:
    assert short_size(12_140_000) == "12.1 MB"
    assert short_size(812) == "812 B"
    assert short_time(3792) == "1:03:12"
