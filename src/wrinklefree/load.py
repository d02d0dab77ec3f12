"""Loads any folder of ours, or any causal language model of the hub, loudly.

transformers answers several mistakes with randomly initialized weights and a warning. Here they are errors of one line
that say what is wrong, where, and what to do.
"""

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

import wrinklefree.packed  # noqa: F401  # registers the packed format
from wrinklefree import checkpoint
from wrinklefree import config as configs
from wrinklefree.config import ModelConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.sources import hub_reachable
from wrinklefree.packed.quantizer import FORMAT, QUANT_METHOD

log = logging.getLogger("wrinklefree")

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

BUILTIN = Path(__file__).parent / "models"
OFFER = "use -m tiny, or -m FOLDER with a local copy"


def load(path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Loaded:
    """Model in eval mode and tokenizer, from a packed folder, a training checkpoint, a Hugging Face folder or the hub.

    In a run folder it is the trained model: `final/`, or else the newest checkpoint. A training checkpoint comes back
    prepared by its method, with fp32 masters; the others in `dtype`, or as stored.
    Raises UserError for anything that is missing, truncated, foreign or no causal language model.
    """
    source = resolve_pretrained(str(path))
    folder = model_folder(Path(source))
    if folder.exists():
        check_folder(folder)
        if is_training_checkpoint(folder):
            return _load_checkpoint(folder, dtype)
        source = str(folder)
    return _from_pretrained(source, dtype or "auto", trust_remote_code), open_tokenizer(source, trust_remote_code)


def model_folder(path: Path) -> Path:
    """`path`, or the model inside of it where it is a run folder: `final/`, else the newest checkpoint.

    A run folder may have a config.json of its own, which belongs to a `.pt` file.
    """
    if (path / "config.json").is_file() and (any(path.glob("*.safetensors")) or any(path.glob("*.bin"))):
        return path
    candidates = [path / "final", *reversed(checkpoint.step_folders(path / "checkpoints")), path / "packed"]
    return next((folder for folder in candidates if (folder / "config.json").is_file()), path)


def load_pretrained(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Loaded:
    """The pretrained model that a run starts from, in eval mode, and its tokenizer. Raises UserError like `load`."""
    return load(model.pretrained, dtype=dtype, trust_remote_code=model.trust_remote_code)


def resolve_pretrained(name: str) -> str:
    """A folder, or a hub id that can be reached now: `builtin:NAME`, a local path, a cached or a reachable hub model.

    Raises UserError where there is nothing of that name, at once and not after transformers' retries.
    """
    kind, _, builtin = name.partition(":")
    if kind == "builtin":
        return _builtin(builtin)
    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    if not _looks_like_hub_id(name):
        raise UserError(f"{name}: no such folder")
    return _hub(name)


def at_hand(name: str) -> Path | None:
    """The folder of a model, without asking the hub: None for a hub id that is not in the cache.

    Raises UserError for a path or a builtin that is not there.
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
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def _hub(name: str) -> str:
    """`name` where the hub answers, else the folder of a cached copy."""
    reason = _why_unreachable()
    if reason is None:
        return name
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        log.info("%s: %s, using the copy in the local cache", name, reason)
        return str(Path(cached).parent)
    raise UserError(f"{name}: no such folder here, and {reason}: {OFFER}")


def _why_unreachable() -> str | None:
    """Why the hub cannot be asked, or None; transformers itself would try for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return "the Hugging Face hub is switched off (HF_HUB_OFFLINE)"
    return None if hub_reachable(constants.ENDPOINT) else f"the Hugging Face hub ({constants.ENDPOINT}) does not answer"


def check_folder(folder: Path) -> None:
    """Raises UserError where `folder` is not a whole causal language model that this version can read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: a model is a folder, this is a file")
    config = _read_config(folder)
    _check_causal(folder, config)
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == QUANT_METHOD and quantization.get("format", 0) > FORMAT:
        raise UserError(f"{folder}: packed format {quantization['format']}, this version reads up to {FORMAT}: upgrade")
    for file in _weight_files(folder):
        check_safetensors(file)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: no config.json, so not a model folder; give a folder that save_pretrained or wf wrote"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not readable JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a model config")
    return config


def _check_causal(folder: Path, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or []
    if config.get("auto_map") and "quantization_config" not in config:
        return  # code of the model's own: transformers finds out
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'}: no model_type, so not a transformers model")
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        what = ", ".join(architectures) or "a model without architectures in its config.json"
        raise UserError(f"{folder}: {what}, not a causal language model")


def _weight_files(folder: Path) -> list[Path]:
    """Every safetensors file that the folder's model consists of. Raises UserError where one is missing."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} files): copy it again")
        return [folder / name for name in names]
    if any(folder.glob("pytorch_model*.bin")):
        return []
    raise UserError(f"{folder}: no model.safetensors, so there are no weights; copy the folder again or train it first")


def check_safetensors(file: Path) -> None:
    """Raises UserError where the file is not as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = handle.read(length) if 8 + length <= size else b""
    try:
        entries = json.loads(header)
        end = max((v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: truncated, or not a safetensors file ({size:,} bytes): copy it again") from error
    if size != 8 + length + end:
        raise UserError(f"{file}: truncated, {size:,} of {8 + length + end:,} bytes: copy it again")


def is_training_checkpoint(folder: Path) -> bool:
    """Whether the folder's weights are masters that its method has yet to quantize."""
    file = folder / checkpoint.CONFIG
    return file.is_file() and configs.from_yaml(file).method is not None


def _load_checkpoint(folder: Path, dtype: torch.dtype | None) -> Loaded:
    """The model as it was trained: masters, prepared by the method, then every tensor strictly."""
    if dtype not in (None, torch.float32):
        raise UserError(
            f"{folder}: a training checkpoint computes from fp32 masters; for {dtype} run `wf export` first"
        )
    config = configs.from_yaml(folder / checkpoint.CONFIG)
    with _quiet():  # the method's own parameters are "unexpected" to the plain model
        model = _open(str(folder), torch.float32, config.model.trust_remote_code, masters=True)[0]
    model = config.method.prepare(model, initialize=False)
    checkpoint.load_weights(folder, model)
    return model.eval(), open_tokenizer(str(folder), config.model.trust_remote_code)


def _from_pretrained(source: str, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
    model, info = _open(source, dtype, trust_remote_code)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{source}: its weights are not those of a {type(model).__name__}: "
            f"{missing[0]} is missing ({len(missing)} tensors in all)"
        )
    return model.eval()


def _open(
    source: str, dtype: torch.dtype | str, trust_remote_code: bool, masters: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and what transformers says of missing tensors; `masters` leaves it to the caller to quantize."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if masters:
            vars(config).pop("quantization_config", None)
        if not Path(source).is_dir():
            _check_causal(Path(source), config.to_dict())
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:  # transformers has no finer types for what it cannot read
        raise UserError(f"{source}: transformers cannot load it: {_first_line(error)}") from error
    return model, info


def open_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Raises UserError where there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer: {_first_line(error)}; copy the tokenizer's files into it") from error
    return tokenizer


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of unexpected tensors."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
