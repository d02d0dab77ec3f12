"""The keys of settings, and what a shell completes them to."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from wrinklefree.config.groups import GROUPS, options
from wrinklefree.config.schema import Config
from wrinklefree.core.find import DATA_FORMATS, OBJECTIVES, SCHEDULES, names

NAMED = (OBJECTIVES, SCHEDULES, DATA_FORMATS)  # the kinds that a setting chooses by name


def key_paths(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full path, dataclass field) for every key of a config class, sections included."""
    for f in dataclasses.fields(cls):
        path = f"{prefix}{f.name}"
        yield path, f
        for inner in (f.type, *get_args(f.type)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from key_paths(inner, path + ".")


def completions(before: Sequence[str], word: str) -> list[str]:
    """What may stand in place of `word`, the beginning of KEY=VALUE, after the settings `before`.

    bash takes a word apart: `training=fa` arrives as `training` and `=` before the word `fa`, and of `training=` the
    equals sign is lost. There the values stand alone. Other shells hand over the word whole, and get it back whole.
    """
    key, equals, value = word.partition("=")
    if equals:
        return [f"{key}={name}" for name in _values(key) if name.startswith(value)]
    split = before[-2:-1] if before[-1:] == ["="] else before[-1:] if not word else []
    values = [name for name in _values(split[0]) if name.startswith(word)] if split else []
    found = [each for each in (*GROUPS, *_keys()) if each.startswith(word)]
    if values or len(found) != 1:
        return values or [f"{each}=" for each in found]
    # bash puts a space behind a single word, and none behind what several have in common.
    return [f"{found[0]}={value}" for value in _values(found[0]) or ("", "null")]


def _keys() -> list[str]:
    """The keys that take a value, but those of methods, which depend on the method."""
    paths = [path for path, _ in key_paths(Config)]
    return [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]


def _values(key: str) -> list[str]:
    """The values that a key may have, if there is a list of them."""
    if key in GROUPS:
        return options(key)
    for kind in NAMED:
        if key == kind.setting:
            return names(kind)
    types = [f.type for path, f in key_paths(Config) if path == key]
    return [word for kind in types for word in _words(kind)]


def _words(kind: Any) -> list[str]:
    """The words of a type: true and false, and those of Literals."""
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for part in get_args(kind) for word in _words(part)]
