"""The model that was quantized, as its own folder tells of it: its name, where it comes from, its licence."""

import re
from dataclasses import dataclass
from pathlib import Path

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ORG_AND_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
MOST_CHARACTERS = 65_536  # that are read of another model's card
NOT_STATED = "not stated by the base model"


@dataclass(frozen=True)
class Origin:
    """What a card says of the base model."""

    name: str  # a hub id, the last name of a folder, or that of a model in this package
    words: str  # the same as part of a sentence
    base_model: str | None  # a hub id
    licence: str | None  # as its own card names it

    @property
    def licence_words(self) -> str:
        if self.licence is not None:
            return f"{self.licence}, as the base model states"
        return f"see the page of {self.name}" if self.name == self.base_model else NOT_STATED


def origin_of(pretrained: str, folder: Path | None) -> Origin:
    """What is known of the model `pretrained`, the setting of that name. `folder` has its files, if they are here."""
    licence = None if folder is None else stated(folder, "license")
    kind, _, builtin = pretrained.partition(":")
    if kind == "builtin":
        return Origin(builtin, f"`{builtin}`, which comes with wrinklefree", None, licence)
    if HUB_ID.fullmatch(pretrained) and not Path(pretrained).exists():
        return Origin(pretrained, f"`{pretrained}`", pretrained, licence)
    name = Path(pretrained).resolve().name
    source = None if folder is None else source_of(folder)
    what = f"the {'file' if name.lower().endswith('.gguf') else 'folder'} `{name}`"
    words = what if source is None else f"{what}, which names `{source}` as its source"
    return Origin(name, words, source, licence)


def source_of(folder: Path) -> str | None:
    """The ORG/NAME that a folder's card or config names as the model it was made of."""
    named = [stated(folder, "base_model"), _loaded_from(folder / "config.json")]
    return next((name for name in named if name is not None and ORG_AND_NAME.fullmatch(name)), None)


def _loaded_from(config: Path) -> str | None:
    try:
        values = read_json(config)
    except UserError:  # the folder may have gone or changed since the training, and a card can do without
        return None
    name = values.get("_name_or_path") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def stated(folder: Path, key: str) -> str | None:
    """The word that the front matter of a model's own card gives for `key`, if there is one."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    with readme.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(MOST_CHARACTERS), re.DOTALL)
    # One word, perhaps in quotes; a list or a sentence is not copied.
    named = front and re.search(rf"^{key}: *[\"']?([\w./-]+)[\"']? *$", front[1], re.MULTILINE)
    return named[1] if named else None
