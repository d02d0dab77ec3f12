"""The command in a card makes the same settings again, and tells no path of the machine."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.runs import again
from wrinklefree.runs.prerequisites import flat

CASES: dict[str, list[str]] = {
    "a training as it is": ["model=tiny", "training=fairy2_w2"],
    "of another model": ["model=smollm2_135m", "training=ternary", "training.lr=1e-5", "seed=3"],
    "a list and a condition": [
        "model=tiny",
        "training=fairy2_w1",
        "method.per_layer=['num_stages=2 *.q_proj *.k_proj']",
    ],
    "other data": ["model=tiny", "training=anemll_q2a4", "data=hub", "data.path=me/texts", "data.split=train[:10%]"],
    "a task": ["model=tiny", "training=stage3_distill", "task=sst2", "training.max_steps=3"],
    "a stage of its own name": ["model=tiny", "training=anemll_v2", "training.stage=a_v2", "training.start_from=[v1]"],
    "other groups": ["model=tiny", "training=full_precision", "method=fairy2", "distillation=logits"],
    "a hub's model": ["model=me/small", "training=uniform_w4", "training.optimizer.lr=1e-3"],
}


def of_the_model(config: Config) -> dict[str, Any]:
    """All settings but those that say where a run keeps things, and how much it tells."""
    return {key: value for key, value in flat(config).items() if not key.startswith(again.ASIDE)}


@pytest.mark.parametrize("case", CASES)
def test_the_command_has_the_settings_of_the_run(case: str) -> None:
    config = load_config(["output_dir=/somewhere/else", "training.log_interval=7", *CASES[case]])
    program, verb, *overrides = shlex.split(again.command(config))
    assert (program, verb) == ("wf", "train")
    assert of_the_model(load_config(overrides)) == of_the_model(config)
    assert "somewhere" not in again.command(config) + again.run_folder(config)


def test_settings_at_their_defaults_are_left_out() -> None:
    config = load_config(["model=tiny", "training=fairy2_w2", "training.lr=1e-3"])
    assert again.command(config) == "wf train model=tiny training=fairy2_w2 training.lr=0.001"
    assert again.run_folder(config) == "outputs/fairy2_tiny_w2"


def test_settings_in_local_yaml_are_not_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of the card has another one, or none."""
    monkeypatch.chdir(tmp_path)
    Path("local.yaml").write_text("seed: 7\n")
    assert "seed=7" in again.command(load_config(["model=tiny", "training=fairy2_w2"]))


def test_files_and_folders_have_their_last_name(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    paths = ["data=local", f"data.path={tmp_path}/text", f"data.heldout_path={tmp_path}/held.txt"]
    starts = [f"training.start_from=[{tmp_path}/first]", f"distillation.teacher={tmp_path}/large"]
    line = again.command(load_config([f"model={tmp_path / 'my model'}", "training=fairy2_w2", *paths, *starts]))
    assert str(tmp_path) not in line
    words = shlex.split(line)
    assert {"model=./my model", "data.path=text", "data.heldout_path=held.txt", "distillation.teacher=large"} < {*words}
    assert 'training.start_from=["first"]' in words


def test_text_that_the_model_wrote_is_written_again(tmp_path: Path) -> None:
    config = load_config(["model=me/small", "training=fairy2_w2"])
    config.data.path = str(tmp_path / "self_text" / "small-0123.jsonl")
    assert "data.path" not in again.command(config)


def test_minutes_of_a_budget_are_round() -> None:
    config = load_config(["model=tiny", "training=fairy2_w2", "training.max_minutes=99.99873"])
    config.training.budget_minutes = 100.0
    assert again.command(config).endswith(" training.max_minutes=100.0")
