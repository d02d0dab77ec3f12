"""`wf methods`: list everything that is chosen by name, with the first sentence of its file."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from wrinklefree.config.groups import option_files
from wrinklefree.core.find import EXPORT_FORMATS, KINDS, METHODS, Kind, files, summary
from wrinklefree.export.flags import formats

WIDTH = 80


def run(as_json: bool = False) -> None:
    """Print the names of each kind with a summary. Methods also get the training configs that use them."""
    if as_json:
        print(json.dumps({f"{kind.word}s": listed(kind) for kind in KINDS}))
    else:
        print("\n\n".join("\n".join(section(kind)) for kind in KINDS))


def listed(kind: Kind) -> list[dict[str, Any]]:
    """All names of one kind, each with its summary, and a method with its trainings."""
    paths = formats() if kind is EXPORT_FORMATS else dict(sorted(files(kind).items()))
    return [
        {"name": name, "summary": summary(path).removeprefix(f"`--format {name}`: ")}
        | ({"trainings": trainings(name)} if kind is METHODS else {})
        for name, path in paths.items()
    ]


def section(kind: Kind) -> Iterator[str]:
    """The lines for one kind."""
    yield f"{kind.word}s, by {kind.setting}; your own in {kind.folder}/"
    found = listed(kind)
    wide = max(len(each["name"]) for each in found) + 4
    for each in found:
        yield from _beside(f"  {each['name']}", each["summary"], wide)
        if each.get("trainings"):
            yield from _beside("", f"training={', '.join(each['trainings'])}", wide)


def _beside(label: str, text: str, wide: int) -> list[str]:
    """Lines with `label` in the first `wide` columns and the wrapped text in the others."""
    return textwrap.wrap(text, WIDTH, initial_indent=label.ljust(wide), subsequent_indent=" " * wide)


def trainings(name: str) -> list[str]:
    """The training configs that use this method, because their defaults or those that they build on choose it."""
    chosen = {path.stem: _defaults(path) for path in option_files("training")}
    return [training for training in chosen if _method(training, chosen) == name]


def _defaults(path: Path) -> list[str | dict[str, str | None]]:
    found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return list(found.get("defaults", []))


def _method(training: str, chosen: dict[str, list[str | dict[str, str | None]]]) -> str | None:
    """The method that a training names, or the training that it builds on; None if it goes with any."""
    for entry in chosen.get(training, []):
        if isinstance(entry, dict) and "override /method" in entry:
            return entry["override /method"]
    builds_on = [entry for entry in chosen.get(training, []) if isinstance(entry, str) and entry in chosen]
    return next((found for base in builds_on if (found := _method(base, chosen))), None)
