"""`wf doctor`: show what this machine has, what is missing, and how to get it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import constants

from wrinklefree.core import library
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import free_bytes
from wrinklefree.data import stdlib
from wrinklefree.data.hub import hub_reachable
from wrinklefree.distributed.world import has_bf16
from wrinklefree.tracking.terminal import print_hanging, short_size

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("transformers", "tokenizers", "safetensors", "datasets", "hydra-core", "matplotlib")
EXTRAS = {
    "wandb": ("wandb", "W&B logging"),
    "trackio": ("trackio", "Trackio logging"),
    "uvicorn": ("serve", "`wf serve`"),
    "lm_eval": ("eval", "`wf eval --tasks`"),
    "gcsfs": ("cloud", "gs:// paths"),
    "s3fs": ("cloud", "s3:// paths"),
}

# Seconds to wait for the hub, including the name lookup.
_HUB_TIMEOUT = 3.0

# Bytes. A run of the tiny model needs 0.3 GB with its checkpoints, so with less than this most runs fail.
_MIN_FREE_DISK = 1e9


@dataclass(frozen=True)
class Check:
    """One line of the report. The command fails if a check is `needed` and not `ok`."""

    name: str
    ok: bool
    text: str
    needed: bool = False


def run(as_json: bool = False) -> None:
    """Print one line per check. Raises UserError if something is missing that every command needs."""
    found = []
    for check in checks():
        found.append(check)
        if not as_json:
            print_hanging(f"{'OK' if check.ok else 'missing':7} {check.name:12} ", check.text)
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in found]}))
    broken = [check.name for check in found if check.needed and not check.ok]
    if broken:
        raise UserError(f"needed and missing: {', '.join(broken)}; the lines above say what to do")


def checks() -> Iterator[Check]:
    """Yield the result of every check, in the order of the report."""
    yield _python()
    yield Check("torch", True, torch.__version__, needed=True)
    yield from _devices()
    yield _compiler()
    yield _native()
    yield from (_library(name) for name in LIBRARIES)
    yield from (_extra(module, extra, what) for module, (extra, what) in EXTRAS.items())
    yield _disk(Path.cwd())
    yield _hub()
    yield _builtin_model()
    yield _stdlib_text()


def _python() -> Check:
    ok = sys.version_info >= (3, 10)
    advice = "" if ok else ": WrinkleFree needs 3.10 or newer"
    return Check("python", ok, f"{platform.python_version()} ({sys.executable}){advice}", needed=True)


def _devices() -> Iterator[Check]:
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if has_bf16(torch.device("cuda", i)) else "no bf16, so fp32"
        yield Check(f"cuda:{i}", True, f"{properties.name}, {short_size(properties.total_memory)}, {bf16}")
    if not torch.cuda.is_available():
        yield Check("cuda", False, "no GPU that torch can use: small models train on the CPU")
    if torch.backends.mps.is_available():
        yield Check("mps", True, "Apple GPU found; training uses the CPU")
    bf16 = "bf16" if has_bf16(torch.device("cpu")) else "no fast bf16, so fp32"
    yield Check("cpu", True, f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {bf16}")


def _compiler() -> Check:
    path = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return Check("compiler", path is not None, path or "no C++ compiler: torch.compile needs one (apt install g++)")


def _native() -> Check:
    """Whether the native kernels can be used (docs/runtime.md)."""
    reason = library.available()
    return Check("kernels", reason is None, library.isa() if reason is None else reason)


def _library(name: str) -> Check:
    try:
        return Check(name, True, importlib.metadata.version(name), needed=True)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "pip install wrinklefree", needed=True)


def _extra(module: str, extra: str, what: str) -> Check:
    found = importlib.util.find_spec(module) is not None
    return Check(module, found, what if found else f"for {what}: pip install 'wrinklefree[{extra}]'")


def _disk(folder: Path) -> Check:
    free = free_bytes(folder)
    ok = free >= _MIN_FREE_DISK
    return Check("disk", ok, f"{short_size(free)} free in {folder}" + ("" if ok else ": make room for checkpoints"))


def _hub() -> Check:
    if constants.HF_HUB_OFFLINE:
        return Check("hub", False, "HF_HUB_OFFLINE=1 is set; -m tiny and local folders work")
    if hub_reachable(constants.ENDPOINT, timeout=_HUB_TIMEOUT):
        return Check("hub", True, constants.ENDPOINT)
    return Check("hub", False, f"{constants.ENDPOINT} does not answer; -m tiny and local folders work")


def _builtin_model() -> Check:
    found = (PACKAGE / "models" / "builtin" / "tiny" / "model.safetensors").is_file()
    return Check("model tiny", found, "shipped in the package" if found else "make it: wf pretrain model=tiny")


def _stdlib_text() -> Check:
    try:
        counts = {split: len(stdlib.files(split)) for split in ("train", "heldout")}
    except ValueError as error:
        return Check("stdlib text", False, str(error))
    return Check("stdlib text", True, f"{counts['train']} files to train on, {counts['heldout']} held out")
