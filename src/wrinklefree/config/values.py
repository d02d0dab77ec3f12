"""Turns the text of KEY=VALUE into a value, and back. The key's type in the schema decides what a text means.

| type of the key | `KEY=1e5` | `KEY=[a,b]` | `KEY=null` |
|---|---|---|---|
| text (`output_dir`, `data.path`) | the text `1e5` | the text `[a,b]` | no value if the key allows that, else text |
| list of texts (`training.start_from`) | an error | the texts `a` and `b` | an error |
| all else (`training.lr`) | the number | a list | no value |

So names and paths are taken letter by letter, and only the last row knows a grammar, which is Hydra's.
"""

import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from wrinklefree.core.errors import UserError

Kinds = Mapping[str, Any]  # the type of each key, by its full path

# An item of `[a, 'b, c']`: between quotes, or up to the next comma.
ITEM = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([^,]*?))\s*(?:,|$)""")


def setting(key: str, value: Any) -> str:
    """Return KEY=VALUE, from which `parse_value` reads `value` again: text, number, bool, None, or a list of these."""
    if isinstance(value, str):
        return f"{key}={value}"
    plain = list(value) if isinstance(value, tuple) else value
    return f"{key}={json.dumps(plain, ensure_ascii=False)}"


def parse_value(key: str, text: str, kinds: Kinds) -> Any:
    """Return the value that `text` stands for. A text that its type cannot mean is returned as it is."""
    wanted = set(_leaves(kinds[key])) if key in kinds else set()
    if types.NoneType in wanted and text == "null":
        return None
    if wanted and wanted <= {str, types.NoneType}:
        return text
    if list[str] in wanted and text.startswith("[") and text.endswith("]"):
        return _texts(text)
    return _by_grammar(text)


def check_literal(key: str, value: Any) -> None:
    """Raise UserError if a text in `value` has `${...}`: it would be replaced, and in a name it is a mistake."""
    if isinstance(value, Mapping):
        value = list(value.values())
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, list | Mapping):
            check_literal(key, part)
        elif isinstance(part, str) and "${" in part:
            raise UserError(f"{key}={part}: ${{...}} is for the YAML files of configs/; write the value itself")


def _leaves(kind: Any) -> Iterator[Any]:
    """Yield the types of a union. The words of a Literal have the type of a word."""
    if get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from _leaves(part)
    elif get_origin(kind) is Annotated:
        yield from _leaves(get_args(kind)[0])
    elif get_origin(kind) is Literal:
        yield from (type(word) for word in get_args(kind))
    else:
        yield kind


def _texts(text: str) -> list[str]:
    """Split `[a, 'b, c']`; JSON is read as JSON."""
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if isinstance(read, list) and all(isinstance(item, str) for item in read):
        return read
    inner = text[1:-1].strip()
    items, place = list[str](), 0
    while place < len(inner):
        found = ITEM.match(inner, place)
        assert found is not None  # the last alternative takes anything
        double, single, plain = found.groups()
        quoted = double if double is not None else single
        items.append(plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted))
        place = found.end()
    return items


def _by_grammar(text: str) -> Any:
    """Read numbers, words and lists as Hydra does; what it cannot read stays text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return text
    return text if override.is_sweep_override() else override.value()


def quoted(text: str) -> str:
    """Quote a text for Hydra's grammar, which reads a backslash only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + (r"\'" if m[2] else ""), text) + "'"
