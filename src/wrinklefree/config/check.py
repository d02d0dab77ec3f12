"""Check plain values against the schema, and report every mistake at once with the closest known key."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeGuard

from pydantic import TypeAdapter, ValidationError

from wrinklefree.config.keys import NAMED, key_paths
from wrinklefree.config.schema import Config, QuantizationConfig
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import OBJECTIVES, find_named, names, unknown
from wrinklefree.core.method import find, per_layer_entry
from wrinklefree.core.text import did_you_mean


def check_config(values: Mapping[str, Any], presets: Collection[str] | None = None) -> Config:
    """Check plain values against the schema and return the typed config.

    `presets` are the names that `distillation` may have. None skips every check of names: a run that was trained
    elsewhere may name files that this machine does not have.
    Raises UserError with one line per mistake.
    """
    problems = [*_without_section(values), *([] if presets is None else _unknown_names(values, presets))]
    config: Config = _check(Config, dict(values) | {"method": None}, "", problems)
    section = values.get("method")
    method = _check(find(section["name"]), section, "method.", problems) if _is_chosen(section) else None
    if not problems and method is not None:
        problems += _per_layer_problems(method)
    if not problems:
        problems += _thinker_problems(config, method)
    if not problems and presets is not None:
        problems += find_named(OBJECTIVES, config.training.objective).problems(config)
    if not problems:
        config.method = None if method is None else _with_bits(method, config.model.quantization, problems)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _per_layer_problems(method: Any) -> list[str]:
    """One message for each mistake in `method.per_layer`."""
    problems: list[str] = []
    for entry in method.per_layer:
        try:
            change, _ = per_layer_entry(entry)
        except ValueError as error:
            problems.append(f"method.per_layer: {error}")
        else:
            values = dataclasses.asdict(method) | {"per_layer": []} | change
            _check(type(method), values, "method.per_layer.", problems)
    return problems


def _is_chosen(section: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether the training's YAML chose this section (`method` or `thinking`). Only such a choice sets `name`."""
    return isinstance(section, Mapping) and "name" in section


def _without_section(values: Mapping[str, Any]) -> Iterator[str]:
    """One message for each setting of `method` or `thinking` if the training does not have that section."""
    for section in ("method", "thinking"):
        settings = values.get(section)
        if settings is None or _is_chosen(settings):
            continue
        for path, _ in flatten({section: settings}):
            if section == "method" and _is_chosen(values.get("thinking")):
                known = [key for key, _ in key_paths(ThinkingConfig, "thinking.")]
                yield f"{path}: unknown key{did_you_mean(path.replace('method', 'thinking', 1), known)}"
            else:
                yield f"{path}: has no effect, since this training has no section {section!r}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("a.b.c", value) for every value in nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _thinker_problems(config: Config, method: Any) -> Iterator[str]:
    """One message for each setting that a thinker does not allow."""
    if config.thinking is None:
        return
    if method is not None:
        yield f"method={method.name}: a thinker has no method; name a quantized model by model=FOLDER"
    for key, bits in vars(config.model.quantization).items():
        if bits is not None:
            yield f"model.quantization.{key}={bits}: has no effect on a thinker; name a quantized model by model=FOLDER"


def _unknown_names(values: Mapping[str, Any], presets: Collection[str]) -> Iterator[str]:
    """One message for each setting whose name is not known."""
    for kind in NAMED:
        name, known = _value(values, kind.setting), names(kind)
        if isinstance(name, str) and name not in known:  # the schema reports values that are not text
            yield f"{kind.setting}={name}: {unknown(kind, name, known)}"
    name = _value(values, "distillation.name")
    if isinstance(name, str) and name not in {*presets, "???"}:
        yield f"distillation.name={name}: no such preset{did_you_mean(name, presets)}; available: {', '.join(presets)}"


def _value(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path in nested mappings, or None."""
    value: Any = values
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _with_bits(method: Any, wanted: QuantizationConfig, problems: list[str]) -> Any:
    """The method's config with `model.quantization` applied. Adds to `problems` if the method lacks those bits."""
    own = {f.name for f in dataclasses.fields(method)}
    if wanted.weight_bits is not None and wanted.weight_bits != method.weight_bits:
        problems.append(
            f"model.quantization.weight_bits={wanted.weight_bits:g}: {method.name} has {method.weight_bits}"
        )
    if wanted.activation_bits is None:
        return method
    if "activation_bits" not in own:
        problems.append(
            f"model.quantization.activation_bits={wanted.activation_bits}: {method.name} has no such setting"
        )
        return method
    bits = None if wanted.activation_bits == "none" else wanted.activation_bits
    return dataclasses.replace(method, activation_bits=bits)


def _check(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """Validate `values` as `cls`. Adds one message per mistake to `problems`, and then returns None."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        by_path: dict[str, list[Any]] = {}  # a union reports one error per member
        for mistake in error.errors():
            by_path.setdefault(prefix + ".".join(_where(mistake)), []).append(mistake)
        problems += [_describe(cls, prefix, path, members) for path, members in by_path.items()]
        return None


# Errors of the members of a union whose kind of value was not given.
OTHER_KIND = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
}


def _where(error: Any) -> list[str]:
    """The keys of a mistake, without the members of unions that pydantic puts between them."""
    where = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained", "literal"))]
    return [part for part in where if part not in ("int", "float", "str")]


def _describe(cls: type, prefix: str, path: str, errors: list[Any]) -> str:
    """Turn the errors of one path into one line: `path.to.key: what is wrong`.

    For a union this is what is wrong with the member that the user meant. If the value is of no member's kind, it is
    the list of all kinds.
    """
    meant = [error for error in errors if error["type"] not in OTHER_KIND and error["type"] != "literal_error"]
    error, where = (meant or errors)[0], _where(errors[0])
    if len(errors) > 1 and not meant:
        kinds = [OTHER_KIND.get(error["type"]) or error["ctx"]["expected"] for error in errors]
        return f"{path}: input should be {' or '.join(kinds)}, got {error['input']!r}"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = dict(key_paths(cls, prefix))
        return f"{path}: unknown key{did_you_mean(path, known)}"
    if error["type"] == "missing" or error["input"] == "???":
        return f"{path}: a value is required"
    if error["type"] == "value_error" and not where:  # two settings that do not go together
        return f"{prefix.rstrip('.')}: {error['msg'].removeprefix('Value error, ')}"
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
