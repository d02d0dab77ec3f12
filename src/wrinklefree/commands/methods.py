"""`wf methods`: list everything that is chosen by name, with the first sentence of its file."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from wrinklefree.config.compose import option_files
from wrinklefree.core.find import EXPORT_FORMATS, KINDS, METHODS, Kind, files, summary
from wrinklefree.export.flags import formats

WIDTH = 80


def run() -> None:
    """Print the names of each kind with a summary. Methods also get the training configs that use them."""
    print("\n\n".join("\n".join(section(kind)) for kind in KINDS))


def section(kind: Kind) -> Iterator[str]:
    """The lines for one kind."""
    yield f"{kind.word}s, by {kind.setting}; your own in {kind.folder}/"
    paths = formats() if kind is EXPORT_FORMATS else dict(sorted(files(kind).items()))
    wide = max(len(name) for name in paths) + 4
    for name, path in paths.items():
        yield from _beside(f"  {name}", summary(path).removeprefix(f"`--format {name}`: "), wide)
        if kind is METHODS and (chosen := trainings(name)):
            yield from _beside("", f"training={', '.join(chosen)}", wide)


def _beside(label: str, text: str, wide: int) -> list[str]:
    """Lines with `label` in the first `wide` columns and the wrapped text in the others."""
    return textwrap.wrap(text, WIDTH, initial_indent=label.ljust(wide), subsequent_indent=" " * wide)


def trainings(name: str) -> list[str]:
    """The names of the training configs whose defaults list chooses this method."""
    chooses = re.compile(rf"override /method:\s*{re.escape(name)}\s*$", re.MULTILINE)
    paths: list[Path] = [path for path in option_files("training") if chooses.search(path.read_text(encoding="utf-8"))]
    return [path.stem for path in paths]
