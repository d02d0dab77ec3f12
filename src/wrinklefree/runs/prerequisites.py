"""Stages that build on one another: where their folders are, and which of them must run first.

The stages of one experiment have sibling folders, `output_root/EXPERIMENT_STAGE/`. Each has its model in `final/`.
"""

from pathlib import Path

from wrinklefree.config.compose import options
from wrinklefree.config.schema import Config, DataConfig, DistributedConfig
from wrinklefree.core.errors import UserError

TEACHER = "stage0_sft"  # the only earlier stage that is trained on the task

# Stages that have their own command instead of `wf train`.
VERBS = {
    "trm_compressor": "trm compressor",
    "trm_pairs": "trm pairs",
    "trm_recursion": "trm train",
    "trm_injection": "trm inject",
    "trm_grpo": "trm grpo",
}


def stage_folder(config: Config, stage: str) -> Path:
    """The output folder for `stage` in this experiment."""
    return Path(config.output_root) / f"{config.experiment}_{stage}"


def is_done(run: Path) -> bool:
    """Whether the run in this folder has finished: its results are written, after all else."""
    return (run / "results.json").is_file() and (run / "final" / "config.json").is_file()


def stage_model(config: Config, name: str) -> str:
    """The folder of the model that stage `name` made. A `name` that is no stage (a folder, a hub id) is returned as is.

    Raises UserError if the stage has not been run. The message names the command that runs it.
    """
    if name not in options("training"):
        return name
    run = stage_folder(config, name)
    if not is_done(run):
        raise UserError(
            f"{config.training.stage} needs {name}, but there is no {run}/final: "
            f"run `{command(config, name)}`{'' if name in VERBS else ', or add auto_prereq=true'}"
        )
    return str(run / "final")


def command(config: Config, stage: str) -> str:
    """The command line that runs `stage` in this experiment, such as `wf train model=tiny training=...`."""
    settings = prerequisite(config, stage)
    if stage in VERBS:  # its command chooses the training itself
        settings.remove(f"training={stage}")
    return " ".join(["wf", VERBS.get(stage, "train"), *settings])


def prerequisite(config: Config, stage: str) -> list[str]:
    """The overrides that run `stage` in this experiment.

    Model, output root, seed, sequence length, `distributed` and data come from `config`. All other settings keep the
    stage's defaults.
    """
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
    if (task is not None) == (stage == TEACHER):  # both train on the task, or both on text
        overrides += _files(config.data)
    return overrides


def _files(data: DataConfig) -> list[str]:
    """Overrides for the local files in `data`; empty if the data is not in local files."""
    if data.source not in ("local", "downstream") or data.path is None:
        return []
    paths = {"data.path": data.path, "data.heldout_path": data.heldout_path}
    group = ["data=local"] if data.source == "local" else []
    return group + [f"{key}={value}" for key, value in paths.items() if value is not None]


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
