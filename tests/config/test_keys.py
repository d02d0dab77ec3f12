"""What shells complete settings to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wrinklefree.config.compose import load_config
from wrinklefree.config.groups import options
from wrinklefree.config.keys import completions
from wrinklefree.core.errors import UserError


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("training=fa", ["training=fairy2_w1", "training=fairy2_w2"]),
        ("training.compile=", ["training.compile=true", "training.compile=false"]),
        ("training.start=", ["training.start=auto", "training.start=plain", "training.start=calibrated"]),
        ("training.scheduler.name=ws", ["training.scheduler.name=wsd"]),
        ("training.precis", ["training.precision=auto", "training.precision=fp32", "training.precision=bf16"]),
        ("training.max_st", ["training.max_steps=", "training.max_steps=null"]),
        ("training.optimizer.s", ["training.optimizer.scale_lr=", "training.optimizer.scale_lr=null"]),
        ("trainingg", []),
        ("training.max_steps=1", []),
    ],
)
def test_a_setting_is_completed(word: str, wanted: list[str]) -> None:
    assert completions([], word) == wanted


def test_bash_takes_a_word_apart_at_the_equals_sign() -> None:
    assert completions(["training", "="], "fairy2_w") == ["fairy2_w1", "fairy2_w2"]
    assert completions(["training.lr=1", "method"], "") == options("method")
    assert "model=" in completions(["training=fairy2_w2"], "")


def test_groups_have_the_options_that_settings_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "training").mkdir(parents=True)
    (tmp_path / "configs" / "training" / "mine.yaml").write_text("# @package _global_\ntraining: {stage: mine}\n")
    monkeypatch.chdir(tmp_path)
    assert "training=mine" in completions([], "training=")
    for group in ("training", "model", "data", "distillation", "distributed", "method"):
        assert completions([], f"{group}=") == [f"{group}={name}" for name in options(group)]


def test_every_key_that_is_completed_is_known(tmp_path: Path) -> None:
    """A key that is not known is an error; a value that does not fit is another one."""
    keys = [word.removesuffix("=") for word in completions([], "training.") if "logging" not in word]
    assert len(keys) > 40
    assert not [key for key in keys[::8] if "unknown key" in _refused(f"{key}=null")]


def _refused(setting: str) -> str:
    try:
        load_config([setting])
    except UserError as error:
        return str(error)
    return ""


def test_a_mistake_in_a_users_file_prints_nothing_while_one_types(tmp_path: Path) -> None:
    (tmp_path / "configs" / "training").mkdir(parents=True)
    (tmp_path / "configs" / "training" / "ternary.yaml").touch()  # the package has one of this name
    typed = {"_WF_COMPLETE": "complete_bash", "COMP_WORDS": "wf train training = fa", "COMP_CWORD": "4"}
    wf = Path(sys.executable).with_name("wf")
    done = subprocess.run([wf], env={**os.environ, **typed}, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == done.stderr == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_what_is_typed(tmp_path: Path) -> None:
    script = """
        source <(wf --show-completion bash)
        COMP_WORDS=(wf train training = fairy2_w); COMP_CWORD=4
        $(complete -p wf | sed -E 's/.*-F ([^ ]+).*/\\1/') wf
        echo "${COMPREPLY[@]}"
    """
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fairy2_w1", "fairy2_w2"], done.stderr
