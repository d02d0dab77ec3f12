"""Compose YAML files, `local.yaml` and KEY=VALUE overrides to plain values, with Hydra."""

import dataclasses
import json
import math
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from wrinklefree.config.check import check_config, flatten
from wrinklefree.config.schema import (
    Config,
)
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core import method as methods
from wrinklefree.core.errors import UserError
from wrinklefree.core.text import did_you_mean

LARGEST_YAML = 1 << 18  # bytes; a run's settings have 3,000

LARGEST_SETTINGS = 10_000  # values and keys in a file of settings

CONFIGS = Path(__file__).parent / "yaml"


def defaults(cls: type) -> dict[str, Any]:
    """The defaults of a config class as plain values. A required field gets `???`, so that Hydra knows every key."""
    return {f.name: _default(f) for f in dataclasses.fields(cls)}


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return list(f.default) if isinstance(f.default, tuple) else f.default
    if f.default_factory is dataclasses.MISSING:
        return "???"
    value = f.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def options(group: str) -> list[str]:
    """The names that a group may be set to: all methods, or the group's YAML files (the package's and the user's)."""
    if group == "method":
        return methods.available()
    return sorted(path.stem for path in option_files(group))


def option_files(group: str) -> list[Path]:
    """The YAML files of a group: the package's, then those in the user's `configs/`.

    Raises UserError if a user's file has a name that the package has already.
    """
    own, users = (sorted((root / group).glob("*.yaml")) for root in (CONFIGS, Path.cwd() / "configs"))
    for path in users:
        if path.name in [mine.name for mine in own]:
            raise UserError(f"{path}: the package has a {group}={path.stem} already; rename the file")
    return own + users


def resolve_model(override: str) -> list[str]:
    """Expand the two short forms among overrides. All others are returned as they are.

    | override | becomes |
    |---|---|
    | `task=NAME` | `data.task=NAME` |
    | `model=PATH`, `model=HUB_ID` | `model=pretrained`, and that path or id as `model.pretrained` |
    """
    key, _, value = override.partition("=")
    if key == "task":
        return [f"data.task={value}"]
    if key != "model" or value in options("model") or not _names_a_model(value):
        return [override]
    return ["model=pretrained", f"model.name={Path(value).resolve().name}", f"model.pretrained={value}"]


def _names_a_model(value: str) -> bool:
    """Whether `value` looks like a path or a hub id. If not, it is a misspelt name of a YAML file."""
    return "/" in value or value.startswith((".", "~")) or Path(value).is_dir()


def load_config(overrides: list[str], config_name: str = "config") -> Config:
    """Compose the YAML files with `a.b=c` overrides, and check the result.

    Raises UserError with one line per mistake.
    """
    values = compose_values(overrides, config_name)
    return check_config(values, options("distillation"))


def compose_values(overrides: list[str], config_name: str = "config") -> dict[str, Any]:
    """Compose the YAML files with `a.b=c` overrides to nested dictionaries, not checked against the schema.

    Raises UserError with Hydra's reason if it cannot compose them.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _store_schema()
    for folder in CONFIGS.iterdir():
        if folder.is_dir():
            option_files(folder.name)  # raises if two files have one name: Hydra would take the package's silently
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            everything = [*local_overrides(overrides), *overrides]
            softened = [_soften(resolved) for o in everything for resolved in resolve_model(o)]
            composed = hydra_compose(config_name, softened + search_path())
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _store_schema() -> None:
    """Tell Hydra every section with its defaults, and every method as an option in the group `method`."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    sections = {f.name: f.type for f in dataclasses.fields(Config) if isinstance(f.type, type) and is_dataclass(f.type)}
    plain = {f.name: f.default for f in dataclasses.fields(Config) if f.default is not dataclasses.MISSING}
    store.store("schema", {**plain, **{name: defaults(cls) for name, cls in sections.items()}})
    for name in methods.available():
        store.store(name, defaults(methods.find(name)), group="method")
    store.store("trm", defaults(ThinkingConfig), group="thinking")


def search_path() -> list[str]:
    """The override that lets Hydra find the user's `configs/` in the working directory; empty if there is none."""
    mine = Path.cwd() / "configs"
    return [f"hydra.searchpath=[file://{mine}]"] if mine.is_dir() else []


def local_overrides(given: list[str]) -> list[str]:
    """The settings in `local.yaml` in the working directory, as overrides. Keys that are in `given` are left out.

    `model: smollm2_135m` chooses an option of a group, `training: {batch_size: 4}` sets a value in one.
    Raises UserError if the file is not a YAML mapping.
    """
    file = Path("local.yaml")
    if not file.is_file():
        return []
    values = read_yaml(file)
    taken = {override.partition("=")[0].lstrip("+~") for override in given}
    flat = [(key, value) for key, value in flatten(values) if key not in taken]
    return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in flat]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises UserError if it is not one, or if it is too large, as it stands or with its aliases written out.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        size = path.stat().st_size
        if size > LARGEST_YAML:
            raise UserError(f"{path}: {size:,} bytes are too many for settings")
        _check_nodes(path)
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not a readable YAML file ({error.__class__.__name__})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a wrinklefree config")
    return {str(key): value for key, value in values.items()}


def _check_nodes(path: Path) -> None:
    """Raises UserError if a YAML file has too many values once its aliases are written out, as OmegaConf does.

    Nine lines, each a list of ten aliases of the line before, are a billion values.
    """
    import yaml

    with path.open(encoding="utf-8") as file:
        root = yaml.compose(file)
    sizes: dict[int, float] = {}

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # for a node that contains itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if size(root) > LARGEST_SETTINGS:
        raise UserError(f"{path}: more than {LARGEST_SETTINGS:,} values, with its aliases written out")


def _soften(override: str) -> str:
    """Add `++` so that Hydra accepts any key, and our own check can report all wrong ones together.

    Group choices such as `model=tiny` stay as they are. Raises UserError for an override without `=`.
    """
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
    """Hydra's message in one line, without its hints."""
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
    """The resolved config as YAML text. `read_config` reads it back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def read_config(path: Path) -> Config:
    """Read the config of a run, `wrinklefree.yaml`. Raises UserError if the file is not such a config.

    `model.trust_remote_code` is false in the result: the permission to run a folder's Python comes from the command
    line of this user, never from a file in that folder.
    """
    config = check_config(_as_of_today(read_yaml(path)))
    config.model.trust_remote_code = False
    return config


def _as_of_today(values: dict[str, Any]) -> dict[str, Any]:
    """Translate the config of an older version. Version 0.1 kept the settings of a thinker in the section `method`."""
    method = values.get("method")
    if isinstance(method, dict) and method.get("name") == "trm":
        return {**values, "method": None, "thinking": method}
    return values
