"""Stages that build on one another: where each stands, and what has to be run first.

The stages of one experiment are siblings, `output_root/experiment_stage/`, each with the model it made in `final/`.
"""

from pathlib import Path

from wrinklefree.config.compose import options
from wrinklefree.config.schema import Config, DataConfig, DistributedConfig
from wrinklefree.core.errors import UserError

TEACHER = "stage0_sft"  # the one earlier stage that reads the task

# Stages with a command of their own.
VERBS = {
    "trm_compressor": "trm compressor",
    "trm_pairs": "trm pairs",
    "trm_recursion": "trm train",
    "trm_injection": "trm inject",
    "trm_grpo": "trm grpo",
}


def stage_folder(config: Config, stage: str) -> Path:
    """The run folder of an earlier stage of this experiment."""
    return Path(config.output_root) / f"{config.experiment}_{stage}"


def is_done(run: Path) -> bool:
    """Whether a stage has run to its end."""
    return (run / "final" / "config.json").is_file()


def stage_model(config: Config, name: str) -> str:
    """The model that an earlier stage made; any other `name`, a folder or a hub id, is returned as it is.

    Raises UserError naming the command to run where the stage has not been run.
    """
    if name not in options("training"):
        return name
    run = stage_folder(config, name)
    if not is_done(run):
        raise UserError(
            f"{config.training.stage} needs {name}, and {run}/final is not there: "
            f"run `{command(config, name)}`{'' if name in VERBS else ', or add auto_prereq=true'}"
        )
    return str(run / "final")


def command(config: Config, stage: str) -> str:
    """What runs a stage of this experiment."""
    settings = prerequisite(config, stage)
    if stage in VERBS:
        settings.remove(f"training={stage}")
    return " ".join(["wf", VERBS.get(stage, "train"), *settings])


def prerequisite(config: Config, stage: str) -> list[str]:
    """The same as overrides: model, place, seed, length, processes and data of `config`; all else is the stage's."""
    name, task = config.model.name, config.data.task
    overrides = [f"model={name if name in options('model') else config.model.pretrained}", f"training={stage}"]
    if config.output_root != "outputs":
        overrides.append(f"output_root={config.output_root}")
    if config.seed != Config.seed:
        overrides.append(f"seed={config.seed}")
    if config.training.max_seq_length != "auto":
        overrides.append(f"training.max_seq_length={config.training.max_seq_length}")
    if config.distributed.name != DistributedConfig.name:
        overrides.append(f"distributed={config.distributed.name}")
    if task is not None and stage == TEACHER:
        overrides.append(f"task={task}")
    if (task is not None) == (stage == TEACHER):  # both read the task's files, or both read text
        overrides += _files(config.data)
    return overrides


def _files(data: DataConfig) -> list[str]:
    """Local files, as overrides; anything else is the stage's own."""
    if data.source not in ("local", "downstream") or data.path is None:
        return []
    given = {"data.path": data.path, "data.heldout_path": data.heldout_path}
    chosen = ["data=local"] if data.source == "local" else []
    return chosen + [f"{key}={value}" for key, value in given.items() if value is not None]


def starting_folder(config: Config) -> Path | None:
    """The folder of the model to start from: the first of `training.start_from` that is there; None is the original.

    Raises UserError like `locate` where none is.
    """
    names = config.training.start_from
    if not names:
        return None
    done = [name for name in names if name not in options("training") or is_done(stage_folder(config, name))]
    return Path(stage_model(config, done[0] if done else names[-1]))


def missing(config: Config) -> list[str]:
    """The stages that have to be run before this one, in order."""
    known = options("training")
    names = config.training.start_from
    needed = [name for name in [config.distillation.teacher] if name in known]
    if names and not any(name not in known or is_done(stage_folder(config, name)) for name in names):
        needed.append(names[-1])
    return [name for name in needed if name is not None and not is_done(stage_folder(config, name))]
