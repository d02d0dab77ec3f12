"""Plain values against the schema: every mistake at once, one line each, with the closest known key."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeGuard

from pydantic import TypeAdapter, ValidationError

from wrinklefree.config.schema import Config, QuantizationConfig
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import DATA_FORMATS, OBJECTIVES, SCHEDULES, find_named, names, unknown
from wrinklefree.core.method import find
from wrinklefree.core.text import did_you_mean

NAMED = (OBJECTIVES, SCHEDULES, DATA_FORMATS)  # kinds that a setting of the schema names


def check_config(values: Mapping[str, Any], presets: Collection[str] | None = None) -> Config:
    """Check plain values against the schema. Raises UserError with one line per mistake.

    `presets` are the known names of `distillation`. Without them no name is looked up: the names of a run that was
    trained elsewhere, where they were found, are believed.
    """
    problems = [*_without_section(values), *([] if presets is None else _unknown_names(values, presets))]
    config: Config = _check(Config, dict(values) | {"method": None}, "", problems)
    section = values.get("method")
    method = _check(find(section["name"]), section, "method.", problems) if _is_chosen(section) else None
    if not problems:
        problems += _thinker(config, method)
    if not problems and presets is not None:
        problems += find_named(OBJECTIVES, config.training.objective).problems(config)
    if not problems:
        config.method = None if method is None else _quantization(method, config.model.quantization, problems)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _is_chosen(section: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a training's YAML chose this section, `method` or `thinking`: that is what sets its `name`."""
    return isinstance(section, Mapping) and "name" in section


def _without_section(values: Mapping[str, Any]) -> Iterator[str]:
    """Settings of `method` or `thinking` that were given although the training has no such section."""
    for section in ("method", "thinking"):
        given = values.get(section)
        if given is None or _is_chosen(given):
            continue
        for path, _ in flatten({section: given}):
            if section == "method" and _is_chosen(values.get("thinking")):
                known = [key for key, _ in key_paths(ThinkingConfig, "thinking.")]
                yield f"{path}: unknown key{did_you_mean(path.replace('method', 'thinking', 1), known)}"
            else:
                yield f"{path}: has no effect, since this training has no section {section!r}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings, with the path of its key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _thinker(config: Config, method: Any) -> Iterator[str]:
    """What does not go together with a thinker."""
    if config.thinking is None:
        return
    if method is not None:
        yield f"method={method.name}: a thinker has no method; name a quantized model by model=FOLDER"
    for key, bits in vars(config.model.quantization).items():
        if bits is not None:
            yield f"model.quantization.{key}={bits}: has no effect on a thinker; name a quantized model by model=FOLDER"


def _unknown_names(values: Mapping[str, Any], presets: Collection[str]) -> Iterator[str]:
    """One line for each setting that names something that is not there; the schema speaks of what is no text."""
    for kind in NAMED:
        name, known = _value(values, kind.setting), names(kind)
        if isinstance(name, str) and name not in known:
            yield f"{kind.setting}={name}: {unknown(kind, name, known)}"
    name = _value(values, "distillation.name")
    if isinstance(name, str) and name not in {*presets, "???"}:
        yield f"distillation.name={name}: no such preset{did_you_mean(name, presets)}; available: {', '.join(presets)}"


def _value(values: Mapping[str, Any], path: str) -> Any:
    found: Any = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _quantization(method: Any, given: QuantizationConfig, problems: list[str]) -> Any:
    """The method with `model.quantization` applied, which must name what the method can do."""
    own = {f.name for f in dataclasses.fields(method)}
    if given.weight_bits is not None and given.weight_bits != method.weight_bits:
        problems.append(f"model.quantization.weight_bits={given.weight_bits:g}: {method.name} has {method.weight_bits}")
    if given.activation_bits is None:
        return method
    if "activation_bits" not in own:
        problems.append(
            f"model.quantization.activation_bits={given.activation_bits}: {method.name} has no such setting"
        )
        return method
    bits = None if given.activation_bits == "none" else given.activation_bits
    return dataclasses.replace(method, activation_bits=bits)


def _check(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        lines = [_describe(cls, prefix, e) for e in error.errors()]
        problems += {line.partition(":")[0]: line for line in reversed(lines)}.values()  # one a path: unions give two
        return None


def _describe(cls: type, prefix: str, error: Any) -> str:
    where = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained", "literal"))]
    where = [part for part in where if part not in ("int", "float", "str")]
    path = prefix + ".".join(where)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = dict(key_paths(cls, prefix))
        return f"{path}: unknown key{did_you_mean(path, known)}"
    if error["type"] == "missing" or error["input"] == "???":
        return f"{path}: a value is required"
    if error["type"] == "value_error" and not where:  # two settings that do not go together
        return f"{prefix.rstrip('.')}: {error['msg'].removeprefix('Value error, ')}"
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def key_paths(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the schema with its full path."""
    for f in dataclasses.fields(cls):
        path = f"{prefix}{f.name}"
        yield path, f
        for inner in (f.type, *_union_members(f.type)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from key_paths(inner, path + ".")


def _union_members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union annotation."""
    from typing import get_args

    return get_args(annotation)
