"""Loads causal language models: packed folders, training checkpoints, Hugging Face folders, models on the hub.

transformers answers several mistakes with random weights and a warning. Here they are errors of one line.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

import wrinklefree.packed  # noqa: F401  # registers the packed format
from wrinklefree.config.compose import read_config
from wrinklefree.config.schema import Config, ModelConfig
from wrinklefree.core import stored
from wrinklefree.core.errors import UserError
from wrinklefree.core.numbers import first_not_numbers
from wrinklefree.families.foreign import refused_in_one_line
from wrinklefree.models.check import Contents, check_causal, check_folder, check_shapes
from wrinklefree.models.find import model_source
from wrinklefree.training import checkpoint

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # dtypes, as safetensors names them


def load_model(path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Loaded:
    """Load a model in eval mode, and its tokenizer.

    | `path` | model |
    |---|---|
    | a training checkpoint | prepared by its method, with fp32 masters |
    | a run folder | its trained model: `final/`, or else the newest checkpoint |
    | a packed folder, a Hugging Face folder, a hub id | in `dtype`; None keeps the stored one |

    Python files in the folder run only if `trust_remote_code` says so; nothing in the folder can.

    Raises UserError if anything is missing or truncated, or if it is not a causal language model.
    """
    source = model_source(str(path))
    folder = Path(source)
    if not folder.exists():  # a hub id
        tokenizer = open_tokenizer(source, trust_remote_code)
        return _fitting(source, _from_pretrained(source, dtype or "auto", trust_remote_code), tokenizer)
    contents = check_folder(folder)
    config = checkpoint_config(folder)
    tokenizer = open_tokenizer(source, trust_remote_code)
    if config is not None:
        return _fitting(source, _load_checkpoint(contents, config, dtype, trust_remote_code), tokenizer)
    _check_skeleton(contents, trust_remote_code)
    return _fitting(source, _from_pretrained(source, dtype or "auto", trust_remote_code), tokenizer)


def load_pretrained(model: ModelConfig) -> Loaded:
    """Load the model that a run starts from, in fp32 and eval mode, and its tokenizer. Raises UserError on failure."""
    return load_model(model.pretrained, dtype=torch.float32, trust_remote_code=model.trust_remote_code)


def load_stored(model: ModelConfig) -> Loaded:
    """Load the model that a run starts from, in eval mode, and its tokenizer. The decoder layers stay in the files.

    It computes what `load_pretrained` would. That is also what it returns if the weights have several dtypes, or none
    that is known, and if the model has buffers that depend on the dtype. Raises UserError on failure.
    """
    folder = Path(model_source(model.pretrained))
    header = check_folder(folder).header if folder.exists() and checkpoint_config(folder) is None else {}
    dtypes = {tensor.dtype for tensor in header.values()}
    dtype = STORED.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None:
        return load_pretrained(model)
    loaded, tokenizer = load_model(folder, dtype=dtype, trust_remote_code=model.trust_remote_code)
    if any(buffer.is_floating_point() and buffer.dtype != torch.float32 for buffer in loaded.buffers()):
        return load_pretrained(model)
    stored.keep(loaded)
    stored.free_at_once()
    loaded.config.dtype = torch.float32
    return loaded, tokenizer


def checkpoint_config(folder: Path) -> Config | None:
    """The config of a folder with fp32 masters, which a method has to quantize before use; None for other folders."""
    file = folder / checkpoint.CONFIG
    config = read_config(file) if file.is_file() else None
    return None if config is None or config.method is None else config


def meta_model(source: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model without weights, on the meta device, from its config alone; packed layers are plain ones in it."""
    config = open_config(source, trust_remote_code)
    with refused_in_one_line(f"{source}: transformers cannot load it"), torch.device("meta"):
        vars(config).pop("quantization_config", None)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def _check_skeleton(contents: Contents, trust_remote_code: bool) -> None:
    """Raises UserError if the files' headers do not fit the model that config.json describes."""
    others = contents.config.get("quantization_config") is not None and contents.packed is None
    if contents.header and not others:  # another library's quantized layers have shapes that only it knows
        check_shapes(contents, meta_model(str(contents.folder), trust_remote_code))


def _load_checkpoint(
    contents: Contents, config: Config, dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    """Load a model as it was trained. The method prepares it first, so that its own parameters have a place."""
    folder = contents.folder
    if dtype not in (None, torch.float32):
        raise UserError(
            f"{folder}: a training checkpoint computes from fp32 masters; for {dtype} run "
            f"`wf export {shlex.quote(str(folder))}` first"
        )
    _check_skeleton(contents, trust_remote_code)
    with _quiet():  # transformers would report the method's parameters as unexpected
        model = _open(str(folder), torch.float32, trust_remote_code, masters=True)[0]
        model = config.method.prepare(model, initialize=False)
        checkpoint.load_weights(folder, model)
    return model.eval()


def _fitting(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """Check weights and tokenizer. Raises UserError for NaN, and for ids without a row in the embedding."""
    problem = first_not_numbers(model.state_dict().items())
    if problem:
        raise UserError(f"{source}: {problem}: the files are damaged, or the training that made them diverged")
    check_ids(source, tokenizer, model.config.get_text_config().vocab_size)
    return model, tokenizer


def check_ids(source: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raises UserError if text can become an id that the embedding has no row for. Padding is never looked up."""
    ids = [index for index in tokenizer.get_vocab().values() if index != tokenizer.pad_token_id]
    if ids and max(ids) >= rows:
        raise UserError(
            f"{source}: its tokenizer has ids up to {max(ids)}, its embedding has {rows} rows: "
            f"these two do not belong together"
        )


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
    config = open_config(source, trust_remote_code)
    if masters:
        vars(config).pop("quantization_config", None)
    if not Path(source).is_dir():
        check_causal(Path(source), config.to_dict())
    with refused_in_one_line(f"{source}: transformers cannot load it"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    return model, info


def open_config(source: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the config of a folder or hub id. Raises UserError if transformers cannot read it."""
    with refused_in_one_line(f"{source}: transformers cannot load it"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    return config


def open_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id. Raises UserError if there is none, or if it cannot be used."""
    with refused_in_one_line(f"{source}: no tokenizer", "; copy the tokenizer's files into it"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer.get_vocab()
        tokenizer.decode(tokenizer("a b")["input_ids"])
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
