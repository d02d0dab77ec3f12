"""From YAML and KEY=VALUE to plain values: Hydra composes, `local.yaml` and `model=PATH` join in."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from wrinklefree.config.check import check_config, flatten
from wrinklefree.config.schema import (
    Config,
    DataConfig,
    DistillationConfig,
    DistributedConfig,
    ExportConfig,
    ModelConfig,
    TrainingConfig,
)
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core import method as methods
from wrinklefree.core.errors import UserError
from wrinklefree.core.text import did_you_mean

CONFIGS = Path(__file__).parent / "yaml"


def defaults(cls: type) -> dict[str, Any]:
    """Field defaults as plain values, `???` where a value is required: Hydra then knows every key."""
    return {f.name: _default(f) for f in dataclasses.fields(cls)}


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return list(f.default) if isinstance(f.default, tuple) else f.default
    if f.default_factory is dataclasses.MISSING:
        return "???"
    value = f.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def options(group: str) -> list[str]:
    """The choices of a group: its YAML files, the package's and the user's, or every method found."""
    if group == "method":
        return methods.available()
    return sorted(path.stem for path in option_files(group))


def option_files(group: str) -> list[Path]:
    """The YAML files of a group. Raises UserError if the user's `configs/` has one of a name that the package has."""
    own, users = (sorted((root / group).glob("*.yaml")) for root in (CONFIGS, Path.cwd() / "configs"))
    for path in users:
        if path.name in [mine.name for mine in own]:
            raise UserError(f"{path}: the package has a {group}={path.stem} already; rename the file")
    return own + users


def resolve_model(override: str) -> list[str]:
    """`model=NAME` for a name without a YAML is a local folder or a hub id; `task=NAME` is short for `data.task`."""
    key, _, value = override.partition("=")
    if key == "task":
        return [f"data.task={value}"]
    if key != "model" or value in options("model") or not _names_a_model(value):
        return [override]
    return ["model=pretrained", f"model.name={Path(value).resolve().name}", f"model.pretrained={value}"]


def _names_a_model(value: str) -> bool:
    """Whether it looks like a path or a hub id, not like a misspelt config."""
    return "/" in value or value.startswith((".", "~")) or Path(value).is_dir()


def load_config(overrides: list[str], config_name: str = "config") -> Config:
    """Compose the YAML with `a.b=c` overrides and check it. Raises UserError naming every mistake, one line each."""
    values = compose_values(overrides, config_name)
    return check_config(values, options("distillation"))


def compose_values(overrides: list[str], config_name: str = "config") -> dict[str, Any]:
    """The resolved values as plain dictionaries, unchecked."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    sections = {
        "model": ModelConfig,
        "training": TrainingConfig,
        "data": DataConfig,
        "distillation": DistillationConfig,
        "distributed": DistributedConfig,
        "export": ExportConfig,
    }
    plain = {f.name: f.default for f in dataclasses.fields(Config) if f.default is not dataclasses.MISSING}
    store.store("schema", {**plain, **{name: defaults(cls) for name, cls in sections.items()}})
    for folder in CONFIGS.iterdir():
        if folder.is_dir():
            option_files(folder.name)  # refuses a file that would be overlooked
    for name in methods.available():
        store.store(name, defaults(methods.find(name)), group="method")
    store.store("trm", defaults(ThinkingConfig), group="thinking")
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            everything = [*local_overrides(overrides), *overrides]
            given = [_soften(resolved) for o in everything for resolved in resolve_model(o)]
            composed = hydra_compose(config_name, given + search_path())
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def search_path() -> list[str]:
    """A folder `configs/` where the user stands adds groups of their own."""
    mine = Path.cwd() / "configs"
    return [f"hydra.searchpath=[file://{mine}]"] if mine.is_dir() else []


def local_overrides(given: list[str]) -> list[str]:
    """The settings of `local.yaml` where the user stands, as overrides, but for keys that are `given`.

    A name for a group chooses (`model: smollm2_135m`), a mapping sets (`training: {batch_size: 4}`).
    Raises UserError where the file is not such a mapping.
    """
    file = Path("local.yaml")
    if not file.is_file():
        return []
    values = read_yaml(file)
    taken = {override.partition("=")[0].lstrip("+~") for override in given}
    flat = [(key, value) for key, value in flatten(values) if key not in taken]
    return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in flat]


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is not a YAML mapping."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable YAML file ({error.__class__.__name__})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a wrinklefree config")
    return {str(key): value for key, value in values.items()}


def _soften(override: str) -> str:
    """Let Hydra take any key, so that our own check reports all wrong ones together; group choices stay as they are."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} is not key=value")
    if key == "method" and value == "null":
        raise UserError("method=null: choose a training without a method, such as training=full_precision")
    if key == "thinking":
        raise UserError(
            f"{override}: a training chooses this section; give its settings, as in thinking.d_compressed=64"
        )
    if (CONFIGS / key.lstrip("+~")).is_dir() or key == "method":
        return override
    if "=" in value and not value.startswith(("'", '"', "[", "{")):
        value = f"'{value}'"
    return f"++{key.lstrip('+')}={value}"


def _one_line(error: Exception) -> str:
    """Hydra's message without its stack of hints."""
    text = str(error)
    choice = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if choice:
        group, name = choice.groups()
        known = options(group)
        return f"{group}={name}: no such option{did_you_mean(name, known)}; available: {', '.join(known)}"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)}: a value is required"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def config_yaml(config: Config) -> str:
    """The resolved config as YAML; `from_yaml` gives the same config back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def read_config(path: Path) -> Config:
    """Read a `wrinklefree.yaml`. Raises UserError where it is not one of ours."""
    return check_config(_as_of_today(read_yaml(path)))


def _as_of_today(values: dict[str, Any]) -> dict[str, Any]:
    """Translate what version 0.1 wrote: it kept the settings of a thinker in the section `method`."""
    method = values.get("method")
    if isinstance(method, dict) and method.get("name") == "trm":
        return {**values, "method": None, "thinking": method}
    return values
