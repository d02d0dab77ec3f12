"""What an earlier stage gets from the run that needs it, and that the command which makes it is one that works."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from torch.distributed.run import parse_args

from wrinklefree.cli import app
from wrinklefree.commands.trm import VERBS, load_stage
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import launch, prerequisites


def parsed(line: str) -> Config:
    """The config that a command line makes, through the shell's words and the CLI's own parser."""
    program, *words = shlex.split(line)
    assert program == "wf"
    command: Any
    thinker, command = words[0] == "trm", typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    overrides = context.params["overrides"]
    training = VERBS[command.name][2] if command.name in VERBS else "trm_compressor"
    return load_stage(overrides, training) if thinker else load_config(overrides)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("toy", "it's (1)", "tiny"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


HANDED_ON: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "experiment": (["experiment=foo (1)"], "stage2_pretrain", {"experiment": "foo (1)"}),
    "method": (["method.granularity=group"], "stage2_pretrain", {"method.granularity": "group"}),
    "precision": (["training.precision=fp32"], "stage2_pretrain", {"training.precision": "fp32"}),
    "root and seed": (["output_root=a b", "seed=7"], "stage0_sft", {"output_root": "a b", "seed": 7}),
    "task": (["task=mnli", "data.path=x#y"], "stage0_sft", {"data.task": "mnli", "data.path": "x#y"}),
    "processes": (
        ["distributed=fsdp_multi", "distributed.prefetch=2"],
        "stage2_pretrain",
        {"distributed.name": "fsdp_multi", "distributed.prefetch": 2},
    ),
    "folder": (["model=it's (1)"], "stage2_pretrain", {"model.pretrained": "it's (1)"}),
    "folder of a known name": (["model=./tiny"], "stage2_pretrain", {"model.pretrained": "./tiny"}),
    "hub id": (
        ["model=pretrained", "model.name=q", "model.pretrained=gpt2"],
        "stage0_sft",
        {"model.pretrained": "gpt2"},
    ),
    "bits": (["model.quantization.activation_bits=none"], "stage2_pretrain", {"method.activation_bits": None}),
}


def flat(config: Config) -> dict[str, Any]:
    from wrinklefree.config.check import flatten

    return dict(flatten(dataclasses.asdict(config)))


@pytest.mark.parametrize("case", HANDED_ON)
def test_an_earlier_stage_gets_what_makes_it(case: str) -> None:
    settings, stage, expected = HANDED_ON[case]
    config = load_config(
        ["model=toy", "training=stage3_distill", "training.lr=1e-3", "training.max_steps=3", *settings]
    )
    made, line = load_config(prerequisites.prerequisite(config, stage)), prerequisites.command(config, stage)
    assert made == parsed(line)
    assert {key: flat(made)[key] for key in expected} == expected
    assert made.output_dir == str(prerequisites.stage_folder(config, stage))
    assert (made.training.lr, made.training.max_steps) != (1e-3, 3)  # these belong to one stage


def test_text_goes_to_stages_that_read_text() -> None:
    text = ["data=hub", "data.path=a/b", "data.subset=1e5", "data.split=train[:10%]", "data.text_column=c d"]
    config = load_config(["model=toy", "training=stage2_pretrain", *text])
    assert parsed(prerequisites.command(config, "stage1_subln")).data == config.data
    on_task = load_config(["model=toy", "training=stage3_distill", "data.path=x"])
    assert parsed(prerequisites.command(on_task, "stage2_pretrain")).data.path != "x"


def test_what_a_stage_has_by_itself_stays_its_own() -> None:
    """Among them what the YAML files of this run's stage set: `stage3_distill` learns its scales."""
    config = load_config(["model=tiny", "training=stage3_distill"])
    assert prerequisites.prerequisite(config, "stage2_pretrain") == ["model=tiny", "training=stage2_pretrain"]


@pytest.mark.parametrize("stage", prerequisites.VERBS)
def test_the_next_command_of_a_thinker_carries_model_and_settings(stage: str) -> None:
    given = ["experiment=it's", "output_root=a b", "thinking.d_compressed=32", "thinking.pairs.problems=x y.jsonl"]
    config = load_stage(["model=toy", *given], "trm_recursion")
    made = parsed(prerequisites.command(config, stage))
    assert (made.model, made.experiment, made.output_root) == (config.model, config.experiment, config.output_root)
    assert made.thinking == config.thinking
    assert made.training.stage == stage


def test_auto_prereq_is_offered_only_where_it_helps() -> None:
    for more, offered in (([], True), (["auto_prereq=true"], False)):
        config = load_config(["model=toy", "training=stage2_pretrain", *more])
        with pytest.raises(UserError, match="needs stage1_subln") as refused:
            prerequisites.stage_model(config, "stage1_subln")
        assert ("auto_prereq" in str(refused.value)) is offered
    with pytest.raises(UserError, match=r"auto_prereq=true: has no effect on `wf trm`"):
        load_stage(["model=toy", "auto_prereq=true"], "trm_pairs")


def test_torchrun_hands_on_settings_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["model=it's (1)", "output_dir=a#b, 'c' \\", "data.split=train[:10%]", "experiment=-x"]
    started: list[list[str]] = []

    class Done:
        def __init__(self, command: list[str], **more: object) -> None:
            started.append(command)

        def wait(self) -> int:
            return 0

        def send_signal(self, number: int) -> None:
            """None is sent."""

    monkeypatch.setattr("subprocess.Popen", Done)
    launch.torchrun("train", 2, overrides, force=True)
    _, _, program, *words = started[0]
    assert program == "wrinklefree.distributed.workers"
    assert parse_args(words).training_script_args == ["train", *overrides, "--force"]
