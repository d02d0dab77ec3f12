"""Loads causal language models: packed folders, training checkpoints, Hugging Face folders, models on the hub.

transformers answers several mistakes with random weights and a warning. Here they are errors of one line.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

import wrinklefree.packed  # noqa: F401  # registers the packed format
from wrinklefree.config.compose import read_config
from wrinklefree.config.schema import Config, ModelConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.text import first_line
from wrinklefree.models.check import check_causal, check_folder
from wrinklefree.models.find import model_folder, resolve_pretrained
from wrinklefree.training import checkpoint

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_model(path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Loaded:
    """Load a model in eval mode, and its tokenizer.

    | `path` | model |
    |---|---|
    | a training checkpoint | prepared by its method, with fp32 masters |
    | a run folder | its trained model: `final/`, or else the newest checkpoint |
    | a packed folder, a Hugging Face folder, a hub id | in `dtype`; None keeps the stored one |

    Raises UserError if anything is missing or truncated, or if it is not a causal language model.
    """
    source = resolve_pretrained(str(path))
    folder = model_folder(Path(source))
    if folder.exists():
        check_folder(folder)
        config = checkpoint_config(folder)
        if config is not None:
            return _load_checkpoint(folder, config, dtype)
        source = str(folder)
    return _from_pretrained(source, dtype or "auto", trust_remote_code), open_tokenizer(source, trust_remote_code)


def load_pretrained(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Loaded:
    """Load the model that a run starts from, in eval mode, and its tokenizer. Raises UserError if that fails."""
    return load_model(model.pretrained, dtype=dtype, trust_remote_code=model.trust_remote_code)


def checkpoint_config(folder: Path) -> Config | None:
    """The config of a folder with fp32 masters, which a method has to quantize before use; None for other folders."""
    file = folder / checkpoint.CONFIG
    config = read_config(file) if file.is_file() else None
    return None if config is None or config.method is None else config


def _load_checkpoint(folder: Path, config: Config, dtype: torch.dtype | None) -> Loaded:
    """Load a model as it was trained. The method prepares it first, so that its own parameters have a place."""
    if dtype not in (None, torch.float32):
        raise UserError(
            f"{folder}: a training checkpoint computes from fp32 masters; for {dtype} run `wf export` first"
        )
    with _quiet():  # transformers would report the method's parameters as unexpected
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
    """Return the model, and transformers' info on missing tensors. With `masters`, the folder's packing is ignored."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if masters:
            vars(config).pop("quantization_config", None)
        if not Path(source).is_dir():
            check_causal(Path(source), config.to_dict())
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:  # transformers raises these three for all it cannot read
        raise UserError(f"{source}: transformers cannot load it: {first_line(error)}") from error
    return model, info


def open_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id. Raises UserError if there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer: {first_line(error)}; copy the tokenizer's files into it") from error
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of unexpected tensors while the block runs."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
