"""What a training would read that is on this machine alone: a rented one gets the package and the command."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from wrinklefree.config.compose import all_settings, local_settings
from wrinklefree.config.groups import options
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import DATA_FORMATS, METHODS, OBJECTIVES, SCHEDULES, users_file
from wrinklefree.training import storage


def refuse_what_stays(chain: Sequence[list[str]], configs: Sequence[Config]) -> None:
    """Raise UserError if a stage reads a file or folder that a rented machine does not have.

    `chain` has the overrides of each stage, and `configs` what they come to.
    """
    if local_settings(()):
        raise UserError("local.yaml: a rented machine does not have it: give its settings as KEY=VALUE instead")
    for key, value in (pair for overrides in chain for pair in all_settings(overrides)):
        file = Path("configs") / key / f"{value}.yaml"
        if file.is_file():
            raise UserError(f"{file}: a rented machine does not have it: give its settings as KEY=VALUE")
    own = [Path(config.output_dir).absolute() for config in configs]
    for config in configs:
        for file in _plug_ins(config):
            raise UserError(f"{file}: a rented machine does not have it: move it into the package, in your checkout")
        for setting, path in _read(config):
            if _is_here(path, config) and not any(Path(path).absolute().is_relative_to(made) for made in own):
                raise UserError(
                    f"{setting}={path}: a rented machine does not have it: upload it, and give its address (gs://, s3://)"
                )


def _plug_ins(config: Config) -> Iterator[Path]:
    """The files of methods and the like that are found where the user stands."""
    names = {
        METHODS: None if config.method is None else config.method.name,
        OBJECTIVES: config.training.objective,
        SCHEDULES: config.training.scheduler.name,
        DATA_FORMATS: config.data.format,
    }
    for kind, name in names.items():
        file = None if name is None else users_file(kind, name)
        if file is not None:
            yield file


def _read(config: Config) -> Iterator[tuple[str, str]]:
    """The settings that name something to read."""
    data = config.data
    yield "model", config.model.pretrained
    named = {
        "data.path": data.path if data.source in ("local", "self") else None,
        "data.heldout_path": data.heldout_path,
        "data.self_questions": data.self_questions,
        "distillation.cache": config.distillation.cache,
        "distillation.teacher": config.distillation.teacher,
    }
    yield from ((setting, path) for setting, path in named.items() if path is not None)
    yield from (("training.start_from", path) for path in config.training.start_from)
    if config.thinking is not None and config.training.stage == "trm_pairs":
        yield "thinking.pairs.problems", config.thinking.pairs.problems


def _is_here(name: str, config: Config) -> bool:
    """Whether a name is that of a path here, or of what another command would write here.

    Copies of what is in a store do not count, because the command names the store.
    """
    if "://" in name or name in options("training"):
        return False
    path = Path(name).expanduser().absolute()
    if path.is_relative_to(storage.cache_folder().absolute()):
        return False
    return path.exists() or path.is_relative_to(Path(config.output_root).absolute())
