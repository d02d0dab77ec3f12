"""Compose YAML files, `local.yaml` and KEY=VALUE overrides to plain values, with Hydra."""

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Collection
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from wrinklefree.config.check import check_config, flatten
from wrinklefree.config.groups import CONFIGS, USERS, option_files, options
from wrinklefree.config.keys import key_paths
from wrinklefree.config.schema import Config
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.config.values import check_literal, parse_value, quoted
from wrinklefree.core import find
from wrinklefree.core import method as methods
from wrinklefree.core.errors import UserError
from wrinklefree.core.text import did_you_mean, without_bucket

LARGEST_YAML = 1 << 18  # bytes; a run's settings have 3,000

LARGEST_SETTINGS = 10_000  # values and keys in a file of settings

PATH = re.compile(r"(?!\d)[\w-]+(\.(?!\d)[\w-]+)*")  # of a setting


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


def resolve_model(key: str, value: str) -> list[tuple[str, str]]:
    """Expand the two short forms of settings. All others are returned as they are.

    | setting | becomes |
    |---|---|
    | `task=NAME` | `data.task=NAME` |
    | `model=PATH`, `model=HUB_ID` | `model=pretrained`, and that path or id as `model.pretrained` |
    """
    if key == "task":
        return [("data.task", value)]
    if key != "model" or value in options("model") or not _names_a_model(value):
        return [(key, value)]
    return [("model", "pretrained"), ("model.name", Path(value).resolve().name), ("model.pretrained", value)]


def _names_a_model(value: str) -> bool:
    """Whether `value` looks like a path or a hub id. If not, it is a misspelt name of a YAML file."""
    return "/" in value or value.startswith((".", "~")) or Path(value).is_dir()


def load_config(overrides: list[str], config_name: str = "config") -> Config:
    """Compose the YAML files with `a.b=c` overrides, and check the result.

    Raises UserError with one line per mistake.
    """
    values = compose_values(overrides, config_name)
    return check_config(values, options("distillation"))


def compose_values(overrides: list[str], config_name: str = "config", local: bool = True) -> dict[str, Any]:
    """Compose the YAML files with `a.b=c` overrides to nested dictionaries, not checked against the schema.

    `local` says whether `local.yaml` counts.
    Raises UserError with Hydra's reason if it cannot compose them.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings = [short for key, value in all_settings(overrides, local) for short in _expanded(key, value)]
    groups = [_choice(key, value) for key, value in settings if _is_group(key)]
    try:
        composed = copy.deepcopy(_composed(config_name, (*groups, *search_path()), _sources()))
        _put(composed, [pair for pair in settings if not _is_group(pair[0])])
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@functools.lru_cache(maxsize=32)
def _composed(config_name: str, groups: tuple[str, ...], sources: tuple[tuple[Path, int], ...]) -> Any:
    """What Hydra composes of `groups`, to be copied. It takes 0.3 s, and a command composes the same twice.

    `sources`, the files that it reads and when they were changed, make the cache miss after an edit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    _store_schema()
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return hydra_compose(config_name, list(groups))


def _sources() -> tuple[tuple[Path, int], ...]:
    """The files of all groups and methods, with the times of their last changes.

    Raises UserError if two files have one name: Hydra would take the package's silently.
    """
    groups = [option_files(folder.name) for folder in CONFIGS.iterdir() if folder.is_dir()]
    files = [*CONFIGS.glob("*.yaml"), *(path for paths in groups for path in paths), *find.files(find.METHODS).values()]
    return tuple((path, path.stat().st_mtime_ns) for path in files)


def all_settings(overrides: list[str], local: bool = True) -> list[tuple[str, Any]]:
    """The settings in `local.yaml`, then those in `overrides`, whose values are text that is not parsed yet.

    Without `local` only the latter.

    Raises UserError for an override that is not KEY=VALUE.
    """
    pairs: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.lstrip("+")  # Hydra's sign for a new key
        if not equals:
            raise UserError(f"override {override!r} is not key=value")
        if not PATH.fullmatch(key):
            raise UserError(f"{key}={value}: {key!r} is not the path of a setting, such as training.max_steps")
        pairs.append((key, value))
    return [*local_settings({key for key, _ in pairs}), *pairs] if local else pairs


def _expanded(key: str, value: Any) -> list[tuple[str, Any]]:
    return resolve_model(key, value) if isinstance(value, str) else [(key, value)]


def _is_group(key: str) -> bool:
    """Whether a setting chooses a file or a method, as `model=tiny` does, instead of giving a value."""
    return key in ("method", "thinking") or (CONFIGS / key).is_dir()


def _choice(group: str, name: Any) -> str:
    """The override that makes Hydra choose `name`. Raises UserError if the group has no such option."""
    if group == "method" and name == "null":
        raise UserError("method=null: choose a training without a method, such as training=full_precision")
    if group == "thinking":
        raise UserError(
            f"{group}={name}: a training chooses this section; give its settings, as in thinking.d_compressed=64"
        )
    if name in options(group):
        return f"{group}={quoted(name)}"
    if name == "null":
        return f"{group}=null"
    raise UserError(_no_such_option(group, str(name)))


def _no_such_option(group: str, name: str) -> str:
    known = options(group)
    return f"{group}={name}: no such option{did_you_mean(name, known)}; available: {', '.join(known)}"


def _put(composed: Any, settings: list[tuple[str, Any]]) -> None:
    """Write values into a composed config. Keys may be new: our own check reports all wrong ones together."""
    from omegaconf import OmegaConf

    OmegaConf.set_struct(composed, False)
    kinds = kinds_of(composed)
    for key, given in settings:
        value = parse_value(key, given, kinds) if isinstance(given, str) else given
        check_literal(key, value)
        OmegaConf.update(composed, key, value, force_add=True)


def kinds_of(composed: Any) -> dict[str, Any]:
    """The type of every setting, by its full path, with those of the method that was chosen."""
    sections: list[tuple[type, str]] = [(Config, "")]
    if composed.get("method") is not None:
        sections.append((methods.find(composed.method.name), "method."))
    return {path: f.type for cls, prefix in sections for path, f in key_paths(cls, prefix)}


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
    mine = Path.cwd() / USERS
    return [f"hydra.searchpath=[{quoted(f'file://{mine}')}]"] if mine.is_dir() else []


def local_settings(given: Collection[str]) -> list[tuple[str, Any]]:
    """The settings in `local.yaml` in the working directory. Keys that are in `given` are left out.

    `model: smollm2_135m` chooses an option of a group, `training: {batch_size: 4}` sets a value in one.
    Raises UserError if the file is not a YAML mapping.
    """
    file = Path("local.yaml")
    return [(key, value) for key, value in flatten(read_yaml(file)) if key not in given] if file.is_file() else []


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


def _one_line(error: Exception) -> str:
    """Hydra's message in one line, without its hints."""
    text = str(error)
    choice = re.search(r"Could not find '(\w+)/([^']+)'", text)  # in the `defaults` of a YAML file
    if choice:
        return _no_such_option(*choice.groups())
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing.group(1)}: a value is required"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def config_yaml(config: Config) -> str:
    """The resolved config as YAML text. `read_config` reads it back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def saved_yaml(config: Config) -> str:
    """`config_yaml` for a file that is kept: addresses of stores are without their buckets' names."""
    training = config.training
    hidden = dataclasses.replace(
        training,
        upload_to=training.upload_to and without_bucket(training.upload_to),
        resume_from=training.resume_from and ",".join(map(without_bucket, training.resume_from.split(","))),
    )
    return config_yaml(dataclasses.replace(config, training=hidden))


def read_config(path: Path) -> Config:
    """Read the config of a run, `wrinklefree.yaml`. Raises UserError if the file is not such a config.

    `model.trust_remote_code` is false in the result: the permission to run a folder's Python comes from the command
    line of this user, never from a file in that folder.
    """
    config = check_config(_as_of_today(read_yaml(path)))
    config.model.trust_remote_code = False
    return config


def _as_of_today(values: dict[str, Any]) -> dict[str, Any]:
    """Translate the config of an older version.

    Version 0.1 kept the settings of a thinker in the section `method`. `model.auto_tokens_slow` chose the tokens of a
    CPU without bf16, before a CPU had minutes instead.
    """
    method, model = values.get("method"), values.get("model")
    if isinstance(model, dict):
        values = {**values, "model": {key: value for key, value in model.items() if key != "auto_tokens_slow"}}
    if isinstance(method, dict) and method.get("name") == "trm":
        return {**values, "method": None, "thinking": method}
    return values
