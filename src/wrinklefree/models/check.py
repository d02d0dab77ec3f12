"""Checks that a folder holds a whole causal language model, without loading it."""

import json
import struct
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wrinklefree.core.errors import UserError
from wrinklefree.packed.quantizer import FORMAT, QUANT_METHOD


def check_folder(folder: Path) -> None:
    """Raises UserError if `folder` is not a whole causal language model, or if this version cannot read it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: a model is a folder, this is a file")
    config = read_model_config(folder)
    check_causal(folder, config)
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == QUANT_METHOD and quantization.get("format", 0) > FORMAT:
        raise UserError(f"{folder}: packed format {quantization['format']}, this version reads up to {FORMAT}: upgrade")
    for file in _weight_files(folder):
        check_safetensors(file)


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json. Raises UserError if it is missing or broken."""
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


def check_causal(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError if `config`, the config.json of `folder`, does not name a causal LM of transformers."""
    architectures = config.get("architectures") or []
    if config.get("auto_map") and "quantization_config" not in config:
        return  # the model brings its own code, so only transformers can tell
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'}: no model_type, so not a transformers model")
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        what = ", ".join(architectures) or "a model without architectures in its config.json"
        raise UserError(f"{folder}: {what}, not a causal language model")


def _weight_files(folder: Path) -> list[Path]:
    """Return all safetensors files of the folder's model. Raises UserError if one is missing.

    The list is empty if the weights are in pytorch_model*.bin, which cannot be checked without loading.
    """
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
    """Raises UserError if the file is not exactly as long as its header says."""
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
