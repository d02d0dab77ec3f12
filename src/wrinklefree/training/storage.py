"""Copies files and folders from and to gs://, s3:// and every other scheme that fsspec knows.

`push` writes a manifest of names, sizes and SHA-256 sums before a folder's files. From it `fetch` sees that an upload
was cut off or a file changed, and which files an older upload left behind. A folder without a manifest, put there by
another tool, is taken as it is. Names that lead out of the folder are refused, wherever they come from.
"""

import base64
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import inner_path, parse_json
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.core.text import first_line, without_bucket

MANIFEST = ".wrinklefree-manifest.json"

SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")

LARGEST_MANIFEST = 1 << 26  # bytes

PROBE = ".wrinklefree-probe"

PATIENCE = 15  # seconds for each request of a check: drivers go on trying for a minute, which is right in a training

BUCKETS = {"s3", "gs", "hf"}  # stores without folders

# Exceptions of the drivers that are no OSError: (module, class). A class is looked up if its module has been imported.
_REFUSALS = [
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("aiohttp.client_exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("botocore.exceptions", "BotoCoreError"),
]


def is_remote(url: str) -> bool:
    """Whether `url` begins with a scheme, as neither a local path does nor a setting such as data.path=gs://bucket."""
    return bool(SCHEME.match(url))


def cache_folder() -> Path:
    """Return the folder for downloads: WRINKLEFREE_CACHE, or ~/.cache/wrinklefree."""
    return Path(os.environ.get("WRINKLEFREE_CACHE", "~/.cache/wrinklefree")).expanduser()


def fetch(url: str, cache: Path | None = None) -> Path:
    """Return the local path of a file or folder at `url`, downloading it unless this version is in the cache.

    A local path is returned unchanged. Raises UserError if there is nothing at `url`, if its upload was cut off, if a
    file is not the one that was uploaded, or if the driver is not installed.
    """
    if not is_remote(url):
        return Path(url)
    files, root = _connect(url)
    with _refusals_explained(url):
        listing, sums = _listing(files, root, url)
        version = fingerprint([url, sorted(listing.items())])
        folder, name = (cache or cache_folder()) / "remote" / version, root.rpartition("/")[2]
        target = inner_path(folder, name, without_bucket(url)) if name else folder
        if not target.exists():
            _download(files, listing, sums, target, url)
    return target


def local_copies(value: Any) -> Any:
    """An address, or each one in a list, as the path of its copy; all else unchanged. Raises UserError as `fetch`."""
    if isinstance(value, list):
        return [local_copies(entry) for entry in value]
    # builtin:NAME has no slashes, and hub ids have no scheme.
    return str(fetch(value)) if isinstance(value, str) and is_remote(value) else value


def push(local: Path, url: str) -> None:
    """Upload a file or folder to the address `url`, replacing files that are there.

    Raises UserError if `local` is missing, if the driver is not installed, or if the service refuses.
    """
    if not local.exists():
        raise UserError(f"{local}: no such file or folder to upload")
    files, root = _connect(url)
    with _refusals_explained(url):
        if local.is_file():
            _put(files, local, root)
        else:
            _push_folder(files, local, root)


def check_writable(url: str) -> None:
    """Write a small file under `url`, and remove it.

    Raises UserError if the driver is missing, if the place refuses, or if it does not answer in `PATIENCE` seconds.
    """
    files, root = _connect(url)
    limit = {"timeout": PATIENCE} if files.async_impl else {}  # the drivers of gs:// and s3://
    with _refusals_explained(url):
        _make_folder(files, root)
        files.pipe_file(f"{root}/{PROBE}", b"written to see whether it can be; it may be removed", **limit)
        files.rm_file(f"{root}/{PROBE}", **limit)


def names(url: str) -> list[str]:
    """The names of files and folders directly in the folder at `url`, sorted; empty if there is nothing.

    Raises UserError if the driver is missing or the place refuses.
    """
    files, root = _connect(url)
    with _refusals_explained(url):
        try:
            found = files.ls(root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})


def remove(url: str) -> None:
    """Remove the folder at `url`, if there is one. Raises UserError if the place refuses."""
    files, root = _connect(url)
    with _refusals_explained(url):
        if files.exists(root):
            files.rm(root, recursive=True)


def _connect(url: str) -> tuple[Any, str]:
    """Return the fsspec file system for `url`, and the path inside it."""
    # Otherwise gcsfs, from 2026.3 on, asks over gRPC what kind each bucket is. That can hang for a minute.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback per retry, and raises the last
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{without_bucket(url)}: {error}; it comes with: pip install 'wrinklefree[cloud]'") from error
    except ValueError as error:
        raise UserError(f"{without_bucket(url)}: {error}; use gs://, s3:// or a local path") from error
    files.invalidate_cache()  # listings are cached until the process ends, and others write there
    return files, str(root).rstrip("/")


def _listing(files: Any, root: str, url: str) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Return {name: [remote path, size, fingerprint]}, and {name: SHA-256} for what the manifest has one of.

    A name is the path relative to `root`, or "" if `root` is a file.
    Raises UserError if there is nothing, if a name leads out of the folder, or if the manifest names files that are
    missing or of another size.
    """
    if files.isfile(root):
        return {"": _entry(root, files.info(root))}, {}
    present = {
        path[len(root) + 1 :]: _entry(path, info)
        for path, info in files.find(root, detail=True).items()
        if info["type"] == "file"
    }
    if not present:
        raise UserError(f"{without_bucket(url)}: nothing there")
    sizes = {name: int(entry[1]) for name, entry in present.items()}
    sums: dict[str, str] = {}
    for manifest in [name for name in present if name.rpartition("/")[2] == MANIFEST]:  # each folder that was pushed
        folder = manifest.removesuffix(MANIFEST)
        own, hashes = _read_manifest(files, present[manifest], f"{without_bucket(url)}/{manifest}")
        sizes = {name: size for name, size in sizes.items() if not name.startswith(folder)}
        sizes |= {folder + name: size for name, size in own.items()}
        sums |= {folder + name: value for name, value in hashes.items()}
    for name in {**present, **sizes}:
        inner_path(Path(), name, without_bucket(url))
    missing = [name for name, size in sizes.items() if name not in present or present[name][1] != size]
    if missing:
        raise UserError(
            f"{without_bucket(url)}: not whole, its upload was cut off "
            f"({len(missing)} of {len(sizes)} files, {missing[0]} first)"
        )
    return {name: present[name] for name in sizes}, sums


def _read_manifest(files: Any, entry: list[Any], where: str) -> tuple[dict[str, int], dict[str, str]]:
    """Return the sizes and the SHA-256 sums of a manifest. One of an older version has sizes alone.

    Raises UserError if it is no manifest.
    """
    path, size, _ = entry
    if size > LARGEST_MANIFEST:
        raise UserError(f"{where}: {size:,} bytes are too many for a manifest")
    values = parse_json(files.cat_file(path), where)
    try:
        sizes = {name: value if isinstance(value, int) else int(value["size"]) for name, value in values.items()}
        sums = {name: str(value["sha256"]) for name, value in values.items() if not isinstance(value, int)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a manifest of an upload: upload the folder again") from error
    return sizes, sums


def _entry(path: str, info: dict[str, Any]) -> list[Any]:
    # Services report different times and checksums: hash everything they say, and any change makes a new version.
    return [path, info["size"], hashlib.sha256(repr(sorted(info.items(), key=str)).encode()).hexdigest()]


def _download(files: Any, listing: dict[str, list[Any]], sums: dict[str, str], target: Path, url: str) -> None:
    """Download to a folder beside `target`, then rename it, so that `target` is never half a download.

    Raises UserError if a file has another SHA-256 than in `sums`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        for name, (path, _, _) in listing.items():
            local = aside / target.name / name
            local.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(path, str(local))
            if name in sums and _sha256(local) != sums[name]:
                raise UserError(
                    f"{without_bucket(url)}: {name} is not the file that was uploaded (its SHA-256 differs): "
                    f"upload it again"
                )
        if not target.exists():  # it does if another process was faster
            (aside / target.name).rename(target)
    finally:
        shutil.rmtree(aside)


def _make_folder(files: Any, path: str) -> None:
    """Make a folder, unless the store has none but buckets: s3fs would make a bucket of a name that was mistyped."""
    protocols = {files.protocol} if isinstance(files.protocol, str) else {*files.protocol}
    if not protocols & BUCKETS:
        files.makedirs(path, exist_ok=True)


def _push_folder(files: Any, local: Path, root: str) -> None:
    paths = {p.relative_to(local).as_posix(): p for p in sorted(local.rglob("*")) if p.is_file()}
    manifest = {name: {"size": p.stat().st_size, "sha256": _sha256(p)} for name, p in paths.items()}
    _make_folder(files, root)
    files.pipe_file(f"{root}/{MANIFEST}", json.dumps(manifest).encode())
    for name in paths:
        _put(files, local / name, f"{root}/{name}")


def _sha256(file: Path) -> str:
    return _digest(file, "sha256")


def _digest(file: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _put(files: Any, local: Path, remote: str) -> None:
    """Upload a file. Raises OSError if less of it, or something else, has arrived."""
    _make_folder(files, remote.rpartition("/")[0])
    files.put_file(str(local), remote)
    files.invalidate_cache()
    there = files.info(remote)
    if there["size"] != local.stat().st_size:
        raise OSError(f"{local.name} has {local.stat().st_size:,} bytes, and {there['size']:,} have arrived")
    theirs = _md5_of(there)
    if theirs is not None and theirs != _digest(local, "md5"):
        raise OSError(f"{local.name} has arrived changed: its MD5 is another one")


def _md5_of(info: dict[str, Any]) -> str | None:
    """The MD5 that a service gives for a file, in hexadecimal; None if it gives none."""
    if "md5Hash" in info:  # Google's
        return base64.b64decode(info["md5Hash"]).hex()
    tag = str(info.get("ETag", "")).strip('"')  # Amazon's, unless the file was uploaded in parts or encrypted
    return tag if re.fullmatch(r"[0-9a-f]{32}", tag) and not info.get("SSEKMSKeyId") else None


@contextmanager
def _refusals_explained(url: str) -> Iterator[None]:
    """Turn a service's error (nothing there, no access, no connection) into a UserError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{without_bucket(url)}: nothing there") from error
    except _refusals() as error:
        # fsspec's timeout has no words
        said = "no answer" if isinstance(error, TimeoutError) else _without_names(first_line(error), url)
        raise UserError(f"{without_bucket(url)}: {said}; is the service reachable, are you logged in?") from error


def _without_names(text: str, url: str) -> str:
    """A driver's message without the names of the bucket and of the server, which belong in no log."""
    bucket = url.partition("://")[2].partition("/")[0]
    text = re.sub(r"\b(https?://[^\s\"',>)]+|host [\w.-]+:\d+)", "its server", text)
    return re.sub(rf"(?<![\w-]){re.escape(bucket)}(?![\w-])", "...", text) if bucket else text


def _refusals() -> tuple[type[Exception], ...]:
    known = (vars(sys.modules[module]).get(name) for module, name in _REFUSALS if module in sys.modules)
    return (OSError, *(found for found in known if found is not None))
