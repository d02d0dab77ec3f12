"""Finds the folder or hub model that a name means."""

import logging
import re
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from wrinklefree.config.groups import options
from wrinklefree.core.errors import UserError
from wrinklefree.core.text import did_you_mean
from wrinklefree.data.hub import hub_reachable
from wrinklefree.models.gguf import gguf_folder, is_gguf
from wrinklefree.training import checkpoint

log = logging.getLogger("wrinklefree")


BUILTIN = Path(__file__).parent / "builtin"

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

OFFER = "use -m tiny, or -m FOLDER with a local copy"


def model_folder(path: Path) -> Path:
    """Return the folder of the model in `path`.

    That is `path` itself if it holds weights. In a run folder it is the first that exists of `final/`, the newest
    checkpoint, and `packed/`. If there is none, it is `path` again.
    """
    # A config.json alone does not make a model: in some run folders it belongs to a `.pt` file.
    if (path / "config.json").is_file() and (any(path.glob("*.safetensors")) or any(path.glob("*.bin"))):
        return path
    candidates = [path / "final", *reversed(checkpoint.step_folders(path / "checkpoints")), path / "packed"]
    return next((folder for folder in candidates if (folder / "config.json").is_file()), path)


def resolve_pretrained(name: str) -> str:
    """Return what transformers can load for `name`, which is `builtin:NAME`, a local path or a hub id.

    For a GGUF file that is a folder with its weights in floating point, which the first call writes. For a hub id that
    is the id if the hub answers, or else the folder of a cached copy.
    Raises UserError if there is no such model, within seconds: transformers itself would retry for half a minute.
    """
    kind, _, builtin = name.partition(":")
    if kind == "builtin":
        return _builtin(builtin)
    path = Path(name).expanduser()
    if is_gguf(path):
        return str(gguf_folder(path, "dense"))
    if path.exists():
        return str(path)
    if not _looks_like_hub_id(name):
        raise UserError(f"{name}: no such folder")
    return _hub(name)


def model_source(name: str) -> str:
    """Return the folder of the model that `name` means, or a hub id. Raises UserError if there is no such model."""
    source = resolve_pretrained(name)
    folder = model_folder(Path(source))
    return str(folder) if folder.exists() else source


def at_hand(name: str) -> Path | None:
    """Return a model's folder without asking the hub, or None for a hub id that is not in the cache.

    Raises UserError if `name` is a path or a builtin and does not exist.
    """
    if name.startswith("builtin:") or Path(name).expanduser().exists() or not _looks_like_hub_id(name):
        return Path(resolve_pretrained(name))
    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _builtin(name: str) -> str:
    folder = BUILTIN / name
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in BUILTIN.glob("*") if p.is_dir())) or "none"
        raise UserError(f"builtin:{name}: no such model in this package; there are: {known}")
    return str(folder)


def _looks_like_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None


def _hub(name: str) -> str:
    """Return `name` if the hub answers, or else the folder of a cached copy. Raises UserError if there is none."""
    reason = _why_unreachable()
    if reason is None:
        return name
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        log.info("%s: %s, using the copy in the local cache", name, reason)
        return str(Path(cached).parent)
    raise UserError(f"{name}: no such folder here{did_you_mean(name, options('model'))}, and {reason}: {OFFER}")


def _why_unreachable() -> str | None:
    """Return why the hub cannot be asked, as part of a sentence, or None if it answers."""
    if constants.HF_HUB_OFFLINE:
        return "the Hugging Face hub is switched off (HF_HUB_OFFLINE)"
    return None if hub_reachable(constants.ENDPOINT) else f"the Hugging Face hub ({constants.ENDPOINT}) does not answer"
