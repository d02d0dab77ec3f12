"""Stages that build on one another: where their folders are, and which of them must run first.

The stages of one experiment have sibling folders, `output_root/EXPERIMENT_STAGE/`. Each has its model in `final/`.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wrinklefree.config.check import flatten
from wrinklefree.config.compose import compose_values, read_yaml, resolve_model
from wrinklefree.config.groups import option_files, options
from wrinklefree.config.keys import key_paths
from wrinklefree.config.schema import Config, ModelConfig
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.runs.report import RESULTS

# Settings of `training` that all stages of an experiment share. The others belong to one stage.
SHARED = ("training.max_seq_length", "training.precision", "training.gradient_checkpointing")

# Stages that have their own command instead of `wf train`.
VERBS = {
    "trm_compressor": "trm compressor",
    "trm_pairs": "trm pairs",
    "trm_recursion": "trm train",
    "trm_injection": "trm inject",
    "trm_grpo": "trm grpo",
    "trm_eval": "trm eval",
}


def stage_folder(config: Config, stage: str) -> Path:
    """The output folder for `stage` in this experiment."""
    return Path(config.output_root) / f"{config.experiment}_{stage}"


def is_done(run: Path) -> bool:
    """Whether the run in this folder has finished: its results are written, after all else."""
    return (run / RESULTS).is_file() and (run / "final" / "config.json").is_file()


def stage_model(config: Config, name: str) -> str:
    """The folder of the model that stage `name` made. A `name` that is no stage (a folder, a hub id) is returned as is.

    Raises UserError if the stage has not been run. The message names the command that runs it.
    """
    if name not in options("training"):
        return name
    run = stage_folder(config, name)
    if not is_done(run):
        offer = "" if name in VERBS or config.auto_prereq else ", or add auto_prereq=true"
        raise UserError(
            f"{config.training.stage} needs {name}, but there is no {run}/final: run `{command(config, name)}`{offer}"
        )
    return str(run / "final")


def teacher(config: Config) -> str | None:
    """The folder or hub id of the model to distil from; None means the original, as for a stage that was not run.

    The BitDistill guide goes from stage 2 to 3 without the stage that fine-tunes a teacher.
    """
    name = config.distillation.teacher
    if name is None or (name in options("training") and not is_done(stage_folder(config, name))):
        return None
    return stage_model(config, name)


def command(config: Config, stage: str, *more: str) -> str:
    """The command line that runs `stage` in this experiment, such as `wf train model=tiny training=...`.

    `more` are further words of it. It is quoted for a shell.
    """
    settings = prerequisite(config, stage)
    if stage in VERBS:  # its command chooses the training itself
        settings.remove(f"training={stage}")
    return shlex.join(["wf", *VERBS.get(stage, "train").split(), *settings, *more])


def prerequisite(config: Config, stage: str) -> list[str]:
    """The overrides that run `stage` in this experiment.

    They hand on what the user has set for this run, as far as it makes the other stage:

    | section | what is handed on |
    |---|---|
    | top level | `output_root`, `experiment`, `seed` |
    | `model`, `distributed`, `thinking` | all |
    | `method` | all, if the stage has the same method |
    | `data` | all, if both stages train on a task or both on text |
    | `training` | the settings in SHARED |

    All other settings belong to one stage, such as its steps and its loss.
    """
    model = chosen_model(config.model)
    overrides = [*model, f"training={stage}"]
    set_here = _set_here(config, model)
    overrides += _handed_on(set_here, overrides, ("output_root", "experiment", "seed"))
    defaults = composed(overrides)
    if config.distributed.name != defaults["distributed.name"]:
        overrides.append(setting("distributed", config.distributed.name))
    # The length of sequences matters to texts alone, which only the first stage of LLM-TRM reads.
    sections = [*(key for key in SHARED if stage not in VERBS or key != "training.max_seq_length")]
    sections += ["model", "distributed", "thinking"]
    if config.method is not None and defaults.get("method.name") == config.method.name:
        sections.append("method")
    if (config.data.source == "downstream") == (defaults["data.source"] == "downstream"):
        sections.append("data")
        if config.data.source != defaults["data.source"]:
            overrides.append(setting("data", config.data.source))
        if config.data.task is not None:
            overrides.append(setting("task", config.data.task))
    return overrides + _handed_on(set_here, overrides, sections)


def chosen_model(model: ModelConfig) -> list[str]:
    """The settings that choose this model: the name of its file, its folder or hub id, or else both parts."""
    short = resolve_model("model", model.pretrained)
    is_path = ("model.name", model.name) in short
    named = [setting("model", model.name)]
    if model.name in options("model") and (not is_path or composed(named)["model.pretrained"] == model.pretrained):
        return named
    if is_path:
        return [setting("model", model.pretrained)]
    return ["model=pretrained", setting("model.name", model.name), setting("model.pretrained", model.pretrained)]


def _set_here(config: Config, model: list[str]) -> dict[str, Any]:
    """The settings of `config`, by their full paths, that its model and training do not have by themselves."""
    mine = flat(config)
    own = [composed([*model, f"training={name}"]) for name in trainings_of(config.training.stage)]
    changed = [{key: value for key, value in mine.items() if defaults.get(key) != value} for defaults in own]
    return min(changed, key=len, default=mine)


def trainings_of(stage: str) -> list[str]:
    """The training files of a stage. Most have one, and a stage that the user named has none."""
    values = {path.stem: read_yaml(path).get("training") for path in option_files("training")}
    return [name for name, training in values.items() if isinstance(training, dict) and training.get("stage") == stage]


def composed(overrides: list[str], local: bool = True) -> dict[str, Any]:
    """The values that `overrides` compose, by their full paths, and the schema's for what they leave out.

    `local` says whether `local.yaml` counts.
    """
    known = {path: f.default for path, f in key_paths(Config) if f.default is not dataclasses.MISSING}
    return known | dict(flatten(compose_values(overrides, local=local)))


def flat(config: Config) -> dict[str, Any]:
    """The settings of `config` by their full paths, as `composed` has them."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in flatten(dataclasses.asdict(config))}


def _handed_on(values: dict[str, Any], overrides: list[str], sections: Sequence[str]) -> list[str]:
    """The settings among `values` that are in `sections` and that `overrides` do not compose already."""
    defaults = composed(overrides)
    return [
        setting(key, value)
        for key, value in values.items()
        if any(key == section or key.startswith(f"{section}.") for section in sections) and defaults.get(key) != value
    ]


def starting_folder(config: Config) -> Path | None:
    """The folder of the model to train from, or None to train from the pretrained model.

    It is the first entry of `training.start_from` that exists. Raises UserError if none does.
    """
    names = config.training.start_from
    if not names:
        return None
    done = [name for name in names if name not in options("training") or is_done(stage_folder(config, name))]
    return Path(stage_model(config, done[0] if done else names[-1]))


def missing(config: Config) -> list[str]:
    """The names of the stages that have to run before this one, in order; empty if all of them are done."""
    known = options("training")
    names = config.training.start_from
    needed = [name for name in [config.distillation.teacher] if name in known]
    if names and not any(name not in known or is_done(stage_folder(config, name)) for name in names):
        needed.append(names[-1])
    return [name for name in needed if name is not None and not is_done(stage_folder(config, name))]
