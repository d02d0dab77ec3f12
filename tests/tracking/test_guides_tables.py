"""What the guides' tables say of W&B: names of projects and metrics, and what is on by default."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from product.test_code_blocks import script
from toyrun import overrides, toy_files
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.config.schema import WandbConfig
from wrinklefree.tracking import run_log

Runs = dict[str, "Recorded"]


class Recorded:
    """A run of W&B that keeps what it is given."""

    def __init__(self, config: WandbConfig) -> None:
        self.config, self.names, self.steps = config, set[str](), list[int]()

    def log(self, data: dict[str, float], step: int) -> None:
        self.names |= data.keys()
        self.steps.append(step)

    def finish(self) -> None:
        pass


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs by project and name, of commands in a folder with a toy."""
    runs: Runs = {}

    def start(out_dir: Path, config: WandbConfig, *rest: Any) -> Recorded:
        return runs.setdefault(f"{config.project}/{config.name or out_dir.name}", Recorded(config))

    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_log, "start_service", start)
    stand_in = ModuleType("wandb")
    stand_in.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return runs


def fairy2(folder: Path) -> None:
    settings = overrides(folder, "training.max_steps=2", "training.logging.wandb.enabled=true")
    assert CliRunner().invoke(app, ["train", *settings]).exit_code == 0


def anemll(folder: Path, *more: str) -> None:
    text = ["data=local", f"data.path={folder / 'text'}"]
    sizes = ["--topk", "8", "--length", "16", "--sequences", "8", "--heldout", "4"]
    made = CliRunner().invoke(app, ["cache", "-m", "./toy", "--out", "cache", *sizes, *text])
    assert made.exit_code == 0, made.output
    words = ["--model-id", "./toy", "--from-scratch", "--cache-dir", "cache", "--max-steps", "2", "--batch-size", "2"]
    few = [*text, "training.final_eval_tokens=64", "training.eval_tokens=64"]
    assert script(["scripts/train_v2_simple.py", *words, *more, *few]) == 0


def compressor(folder: Path, *more: str) -> None:
    words = ["--model_name", "./toy", "--num_samples", "8", "--batch_size", "2", "--max_seq_length", "16"]
    text = ["data=local", f"data.path={folder / 'text'}", "training.eval_tokens=64", "training.final_eval_tokens=64"]
    assert script(["-m", "src.train.phase1_compressor", *words, "--use_wandb", *more, *text]) == 0


ERRORS = {f"quant_error/model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("up", "gate", "down")}
LOSSES = {"train_loss", "lr", "elapsed_sec"}
STATES = {"mse", "cosine_similarity", "relative_error", "variance_ratio"}

TABLES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "wrinklefree-fairy2/run": (fairy2, {*LOSSES, *ERRORS, "eval_loss", "grad_norm"}),
    "qwen3-qat/v2_output": (lambda folder: anemll(folder, "--wandb"), {*LOSSES, "eval_loss"}),
    "my-qat-project/experiment-1": (
        lambda folder: anemll(folder, "--wandb", "--wandb-project", "my-qat-project", "--wandb-run", "experiment-1"),
        LOSSES,
    ),
    "llm-trm-phase1/d16_bs2_lr0.001_1a": (lambda folder: compressor(folder, "--d_compressed", "16"), STATES),
}


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.slow] if "qat" in run else []) for run in TABLES])
def test_a_run_has_the_project_and_the_metrics_of_the_guide(run: str, recorded: Runs, tmp_path: Path) -> None:
    train, names = TABLES[run]
    train(tmp_path)
    assert set(recorded) == {run}
    assert names <= recorded[run].names


def test_each_width_of_a_sweep_is_a_run_of_its_own(recorded: Runs, tmp_path: Path) -> None:
    compressor(tmp_path, "--sweep", "--sweep_d_values", "8", "16")
    assert sorted(recorded) == ["llm-trm-phase1/sweep_1a_d16", "llm-trm-phase1/sweep_1a_d8"]
    assert all(run.names >= STATES for run in recorded.values())


@pytest.mark.slow
def test_the_scripts_of_anemll_log_only_if_asked(recorded: Runs, tmp_path: Path) -> None:
    anemll(tmp_path)
    assert recorded == {}
