"""Files and folders on gs://, s3:// and whatever else fsspec knows, brought here and sent there.

A pushed folder carries a manifest (names and sizes), written before the files: a `fetch` of a folder whose push was cut
off sees what is missing and fails, and files that an older push left at the same address are not taken along. Folders
without one, put there by other tools, are taken as they are.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint

MANIFEST = ".wrinklefree-manifest.json"

# What the drivers raise beside OSError, looked up once a driver has been imported.
_REFUSALS = [
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("botocore.exceptions", "BotoCoreError"),
]


def is_remote(url: str) -> bool:
    """Whether `url` names something that is not a local path."""
    return "://" in url


def cache_folder() -> Path:
    """Where downloads are kept: WRINKLEFREE_CACHE, or ~/.cache/wrinklefree."""
    return Path(os.environ.get("WRINKLEFREE_CACHE", "~/.cache/wrinklefree")).expanduser()


def fetch(url: str, cache: Path | None = None) -> Path:
    """The local path of a remote file or folder, downloaded unless the same version of it is in the cache.

    A local path is given back as it is. Raises UserError where there is nothing at `url`, where a folder there is not
    whole, and where the driver for it is not installed.
    """
    if not is_remote(url):
        return Path(url)
    files, root = _connect(url)
    with _refusals_explained(url):
        found = _listing(files, root, url)
        version = fingerprint([url, sorted(found.items())])
        target = (cache or cache_folder()) / "remote" / version / root.rpartition("/")[2]
        if not target.exists():
            _download(files, found, target)
    return target


def push(local: Path, url: str) -> None:
    """Upload a file or folder to `url`, which becomes its address; files already there are replaced.

    Raises UserError where `local` is missing, where the driver is not installed, and where the upload is refused.
    """
    if not local.exists():
        raise UserError(f"{local}: no such file or folder to upload")
    files, root = _connect(url)
    with _refusals_explained(url):
        if local.is_file():
            _put(files, local, root)
        else:
            _push_folder(files, local, root)


def _connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it."""
    # From 2026.3 on, gcsfs otherwise asks each bucket over gRPC what kind it is, which can hang for a minute.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback per retry; the last error is raised
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}; it comes with: pip install 'wrinklefree[cloud]'") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; use gs://, s3:// or a local path") from error
    files.invalidate_cache()  # listings are cached for the life of the process, and others write there
    return files, str(root).rstrip("/")


def _listing(files: Any, root: str, url: str) -> dict[str, list[Any]]:
    """Remote path relative to `root` ("" where root is a file) -> [remote path, size, fingerprint]."""
    if files.isfile(root):
        return {"": _entry(root, files.info(root))}
    found = {
        path[len(root) + 1 :]: _entry(path, info)
        for path, info in files.find(root, detail=True).items()
        if info["type"] == "file"
    }
    if not found:
        raise UserError(f"{url}: nothing there")
    if MANIFEST not in found:
        return found
    sizes = json.loads(files.cat_file(found[MANIFEST][0]))
    missing = [name for name, size in sizes.items() if name not in found or found[name][1] != size]
    if missing:
        raise UserError(
            f"{url}: not whole, its upload was cut off ({len(missing)} of {len(sizes)} files, {missing[0]} first)"
        )
    return {name: found[name] for name in sizes}


def _entry(path: str, info: dict[str, Any]) -> list[Any]:
    # The times and checksums differ by service: all that is not the file's content goes into one fingerprint.
    return [path, info["size"], hashlib.sha256(repr(sorted(info.items(), key=str)).encode()).hexdigest()]


def _download(files: Any, found: dict[str, list[Any]], target: Path) -> None:
    """Download beside `target`, then rename: an interrupted download is never taken for a whole one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        for name, (path, _, _) in found.items():
            local = aside / target.name / name
            local.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(path, str(local))
        if not target.exists():  # another process may have been faster
            (aside / target.name).rename(target)
    finally:
        shutil.rmtree(aside)


def _push_folder(files: Any, local: Path, root: str) -> None:
    sizes = {p.relative_to(local).as_posix(): p.stat().st_size for p in sorted(local.rglob("*")) if p.is_file()}
    files.makedirs(root, exist_ok=True)
    files.pipe_file(f"{root}/{MANIFEST}", json.dumps(sizes).encode())
    for name in sizes:
        _put(files, local / name, f"{root}/{name}")


def _put(files: Any, local: Path, remote: str) -> None:
    files.makedirs(remote.rpartition("/")[0], exist_ok=True)
    files.put_file(str(local), remote)


@contextmanager
def _refusals_explained(url: str) -> Iterator[None]:
    """Turn a service's refusal (nothing there, no access, no connection) into a UserError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{url}: nothing there") from error
    except _refusals() as error:
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{url}: {line}; is the service reachable, are you logged in?") from error


def _refusals() -> tuple[type[Exception], ...]:
    return (OSError, *(vars(sys.modules[module])[name] for module, name in _REFUSALS if module in sys.modules))
