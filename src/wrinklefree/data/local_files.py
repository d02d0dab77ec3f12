"""Finds the local files of a setting, and refuses by name what nothing here reads."""

from pathlib import Path

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *DELIMITERS, *TABLE_SUFFIXES)
ZIPPED = ".gz"

# Files that may hold text to train on, but that nothing here reads. Leaving them out in silence would train on a part.
UNREAD = (
    *(".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz"),
    *(".feather", ".orc", ".avro", ".xlsx", ".xls", ".ods"),
)


def find_files(setting: str, path: str | None) -> list[Path]:
    """Return the file `path`, or all files in the folder `path` that end in one of `SUFFIXES`, sorted by POSIX path.

    Hidden files are left out. A folder that `datasets.save_to_disk` wrote gives its Arrow files.
    Raises UserError, beginning with the key `setting`, if there is no such file, or if the folder has data in a format
    that is not read.
    """
    if path is None:
        raise UserError(f"{setting}: a value is required: a file or folder of {', '.join(SUFFIXES)}")
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{setting}={path}: no such file or folder")
    if is_saved_dataset(root):
        return _saved_files(f"{setting}={path}", root)
    found = sorted(
        file.relative_to(root).as_posix() for file in root.rglob("*") if suffix_of(file) in SUFFIXES + UNREAD
    )
    names = [name for name in found if not _is_hidden(name) and (root / name).is_file()]
    for name in names:
        _check_in_folder(f"{setting}={path}", root / name)
    if not names:
        raise UserError(f"{setting}={path}: no file here ends in {', '.join(SUFFIXES)}")
    return [root / name for name in names]


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _saved_files(where: str, root: Path) -> list[Path]:
    """Return the Arrow files of a saved dataset. Raises UserError if it has several splits, or is damaged."""
    if (root / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in root.glob("*/state.json"))
        raise UserError(f"{where}: a dataset with the splits {', '.join(splits)}: name one, such as {root / splits[0]}")
    try:
        names = [entry["filename"] for entry in read_json(root / "state.json")["_data_files"]]
    except (UserError, LookupError, TypeError) as error:
        raise UserError(f"{where}: state.json does not name the dataset's files: save it again") from error
    absent = [name for name in names if name != Path(str(name)).name or not (root / name).is_file()]
    if absent or not names:
        raise UserError(f"{where}: no file {absent[0]!r}, which state.json names" if absent else f"{where}: no files")
    return [root / name for name in names]


def _check_in_folder(where: str, file: Path) -> None:
    """Raises UserError if a file in a folder holds data in a format that is not read."""
    if suffix_of(file) in UNREAD:
        raise UserError(f"{where}: {file.name}: {suffix_of(file)} is not read: unpack or convert it, or take it out")
    if is_saved_dataset(file.parent):
        raise UserError(f"{where}: {file.parent} is a folder of save_to_disk: name it alone")


def suffix_of(path: Path) -> str:
    """Return the last suffix in small letters, without a `.gz` after it."""
    name = path.name.lower()
    return Path(name.removesuffix(ZIPPED)).suffix


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))
