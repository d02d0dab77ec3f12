"""The source of the running Python's standard library, as documents to train and evaluate on.

Every machine that runs this program has this text, so a small language model can be trained from nothing and without a
network. Licence: PSF. The text differs a little between Python versions, and so do figures measured on it.

The split is by file, and a path is in the same split on every Python. About 5 % of the library's own files are held
out. The library's tests (18 of 26 MB, if a Python ships them; Debian's does not) are only trained on, so held-out
figures compare between Pythons with and without tests.

Left out:
- packages that are not the library (`site-packages`) and files about one machine (`_sysconfigdata*`, `config-*`);
- packages that are mostly data, or gone from newer Pythons (`_EXCLUDED_TOP`);
- lookup tables (`_is_table`), empty files, and files that are not UTF-8;
- copies. If a held-out text also occurs elsewhere, the held-out file stays. Within a split, the library's own file
  stays, or else the first path.
"""

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from wrinklefree.data.sources import Split

# A hash sorts paths into this many buckets, and one of them is held out. On 3.11, bucket 13 has 31 of 418 library files
# and 5.5 % of their text, from 20 packages. (Bucket 0 has 15 files and 2 %, too little to measure on.)
_BUCKETS = 20
_HELDOUT_BUCKET = 13

# 3.11 has 418 usable library files. With fewer than this, the library was stripped.
_MIN_LIBRARY_FILES = 100

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_EXCLUDED_TOP = frozenset({"encodings", "idlelib", "distutils", "lib2to3", "sitecustomize.py", "usercustomize.py"})
_MACHINE_FILE = re.compile(r"_sysconfig_?(data|vars)|config-")

# A line that begins so is probably an entry of a table: `'AElig': 0xc6,` or `0x0300, 0x036f,`.
_ENTRY_START = tuple("'\"0123456789")


def files(split: Split, tests: bool = True) -> list[Path]:
    """Return the files of one split, sorted by POSIX path; with `tests=False`, without the library's tests.

    Raises ValueError if this Python does not ship its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return [root / path for path in _split_paths(root)[split] if tests or not _is_test(path)]


def documents(split: Split, tests: bool = True) -> Iterator[str]:
    """Yield the text of each of `files(split, tests)`, with `\\n` line ends."""
    for path in files(split, tests):
        yield path.read_text(encoding="utf-8")


def library() -> dict[str, str]:
    """Return {relative POSIX path: text} of the library's own files, without tests, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    return {path: text for path, text in _texts(root).items() if not _is_test(path)}


@cache
def _split_paths(root: Path) -> dict[Split, tuple[str, ...]]:
    """Return the relative POSIX paths of each split, without copies."""
    texts = _texts(root)
    library = [path for path in texts if not _is_test(path)]
    if len(library) < _MIN_LIBRARY_FILES:
        raise ValueError(
            f"this Python's library source is not at {root} ({len(library)} usable .py files; a zipped or stripped "
            f"Python?): use data=local with text of your own, or a Python that has its library's source"
        )
    heldout = _without_copies([path for path in library if _is_heldout(path)], texts, seen=set())
    seen = {texts[path] for path in heldout}
    train = [path for path in library if not _is_heldout(path)] + [path for path in texts if _is_test(path)]
    return {"train": tuple(sorted(_without_copies(train, texts, seen))), "heldout": tuple(heldout)}


def _texts(root: Path) -> dict[str, str]:
    """Return {relative POSIX path: text} of every usable file under `root`, in path order."""
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file())
    texts = {path: _read_utf8(root / path) for path in paths if not _is_excluded(path)}
    return {path: text for path, text in texts.items() if text.strip() and not _is_table(text)}


def _read_utf8(path: Path) -> str:
    """Return the file's text, or "" if it is not UTF-8. The library's tests hold such files on purpose."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _without_copies(paths: list[str], texts: dict[str, str], seen: set[str]) -> list[str]:
    """Return the first path for each different text, leaving out the texts in `seen`."""
    first: dict[str, str] = {}
    for path in paths:
        first.setdefault(texts[path], path)
    return [path for text, path in first.items() if text not in seen]


def _is_excluded(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return parts[0] in _EXCLUDED_TOP or bool(_MACHINE_FILE.match(parts[0])) or not _EXCLUDED_FOLDERS.isdisjoint(parts)


def _is_test(path: str) -> bool:
    return not _TEST_FOLDERS.isdisjoint(PurePosixPath(path).parts)


def _is_heldout(path: str) -> bool:
    """Whether `path` falls in the held-out bucket."""
    # Not Python's `hash`, which is salted anew in each process.
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % _BUCKETS == _HELDOUT_BUCKET


def _is_table(text: str) -> bool:
    """Whether the file is data rather than code: more than half of its lines start with a quote or a digit."""
    lines = [line for raw in text.splitlines() if (line := raw.strip())]
    return 2 * sum(line.startswith(_ENTRY_START) for line in lines) > len(lines)
