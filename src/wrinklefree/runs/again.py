"""The command line that makes a run's model again, for its model card."""

import shlex
from pathlib import Path
from typing import Any

from wrinklefree.config.compose import read_yaml
from wrinklefree.config.groups import option_files, options
from wrinklefree.config.schema import Config
from wrinklefree.config.values import setting
from wrinklefree.export.origin import HUB_ID
from wrinklefree.runs import self_text
from wrinklefree.runs.prerequisites import chosen_model, composed, flat, trainings_of

# Settings that say where a run keeps things and how much it tells, not which model it makes.
ASIDE = (
    "auto_prereq",
    "experiment",
    "output_dir",
    "output_root",
    "distributed",
    "training.budget_minutes",  # of the whole command; `training.max_minutes` has those of this stage
    "training.budget_share",
    "training.log_interval",
    "training.logging",
    "training.pack",
    "training.resume_from",
    "training.save_interval",
    "training.save_minutes",
    "training.save_total_limit",
    "training.upload_to",
)

FILES = ("data.heldout_path", "data.self_questions", "distillation.cache")  # settings that never name a hub's


def command(config: Config) -> str:
    """The `wf train` that trains such a model, with all settings that are not the defaults.

    It is quoted for a shell. Files and folders have their last name only, for the card tells no path of a machine.
    """
    overrides = _overrides(config)
    return shlex.join(["wf", "train", *(_shown(override, config) for override in overrides)])


def run_folder(config: Config) -> str:
    """The folder that this command writes, unless the reader chooses another."""
    return str(composed(_overrides(config), local=False)["output_dir"])


def _overrides(config: Config) -> list[str]:
    """The overrides that compose `config`, from the training that leaves the fewest to be set."""
    model = chosen_model(config.model)
    candidates = [_from_training([*model, f"training={name}"], config) for name in _trainings(config)]
    return min(candidates, key=len)


def _trainings(config: Config) -> list[str]:
    """The training files that this run may have begun with: those of its stage, or else those of its method."""
    of_stage = trainings_of(config.training.stage)
    if of_stage:
        return of_stage
    chooses = {"override /method": config.method.name}
    of_method = [path.stem for path in option_files("training") if chooses in read_yaml(path).get("defaults", [])]
    return of_method or ["fairy2_w2"]  # for a method without a training; `method=` then follows


def _from_training(begun: list[str], config: Config) -> list[str]:
    """`begun`, a model and a training, with the groups and the settings that they lack."""
    mine = _set(config)
    chosen = [*begun, *_groups(mine, composed(begun, local=False))]
    defaults = composed(chosen, local=False)
    changed = {key: value for key, value in mine.items() if defaults.get(key) != value}
    if changed.get("training.optimizer.lr") == mine["training.lr"]:
        del changed["training.optimizer.lr"]  # the YAML files take it from `training.lr`
    return [*chosen, *(setting(key, value) for key, value in changed.items())]


def _set(config: Config) -> dict[str, Any]:
    """The settings that make the model, by their full paths."""
    mine = {key: value for key, value in flat(config).items() if not _is_aside(key)}
    if mine["training.max_minutes"] not in (None, "auto"):
        mine["training.max_minutes"] = round(mine["training.max_minutes"], 1)  # a budget leaves 99.99873
    path = mine["data.path"]
    if config.data.source == "self" and path is not None and Path(path).parent.name == self_text.FOLDER:
        del mine["data.path"]  # the model has written it, and would again
    return mine


def _is_aside(key: str) -> bool:
    return any(key == aside or key.startswith(f"{aside}.") for aside in ASIDE)


def _groups(mine: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """The groups that a run has chosen otherwise than its model and its training do."""
    named = {"method": "method.name", "data": "data.source", "distillation": "distillation.name"}
    return [
        setting(group, mine[key])
        for group, key in named.items()
        if mine[key] != defaults.get(key) and mine[key] in options(group)
    ]


def _shown(override: str, config: Config) -> str:
    """An override with the last names of the files and folders in it."""
    key, _, value = override.partition("=")
    if key in ("model", "model.pretrained"):
        name = _name(value, key in FILES)
        # `model=NAME` would be a file of settings, and `./NAME` is a folder.
        return override if name == value else f"{key}=./{name}"
    if key == "training.start_from":
        return setting(key, [_name(entry, False) for entry in config.training.start_from])
    is_file = key in FILES or (key == "data.path" and config.data.source != "hub")
    return f"{key}={_name(value, is_file)}"


def _name(value: str, is_file: bool) -> str:
    """`value`, or its last name if it is the path of a file or folder."""
    is_path = "/" in value and (HUB_ID.fullmatch(value) is None or Path(value).exists())
    return Path(value).name if is_file or is_path else value
