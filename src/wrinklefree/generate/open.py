"""Which model a person means, by the name of a model config or by anything that `load` reads, and what runs it."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from wrinklefree.config.compose import load_config, options
from wrinklefree.core.errors import UserError
from wrinklefree.distributed.world import join_world
from wrinklefree.engine.engine import Engine, supports
from wrinklefree.models.check import check_folder
from wrinklefree.models.find import model_folder, resolve_pretrained
from wrinklefree.models.load import Loaded, is_training_checkpoint, load_model, open_tokenizer
from wrinklefree.packed.quantizer import QUANT_METHOD

EngineName = Literal["auto", "native", "transformers"]


def pretrained_of(name: str) -> str:
    """`pretrained` of the model config `name` (`tiny`), unless a folder has that name; else `name` itself."""
    if Path(name).exists() or name not in options("model"):
        return name
    return load_config([f"model={name}"]).model.pretrained


def open_model(name: str) -> Loaded:
    """The model in eval mode, on the GPU where there is one, and its tokenizer. Raises UserError like `load`."""
    device = join_world().device
    dtype = torch.float32 if device.type == "cpu" else None  # as exact as the checkpoint that it may be compared with
    model, tokenizer = load_model(pretrained_of(name), dtype=dtype)
    return model.to(device), tokenizer


def open_engine(
    name: str,
    choice: EngineName = "auto",
    threads: int | None = None,
    slots: int = 1,
    context: int | None = None,
    half_cache: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """What continues text, a native `Engine` or a model, its tokenizer, and one line that says which it is.

    `auto` is native for packed folders that it can run. A native engine has `slots`, each for `context` tokens or for
    the model's context where that is less. Raises UserError like `load`, and where `native` cannot be had.
    """
    folder = model_folder(Path(resolve_pretrained(pretrained_of(name))))
    reason = "asked for" if choice == "transformers" else _why_not_native(folder, choice)
    if reason is None:
        engine = Engine.from_folder(folder, threads, _within(folder, context), slots, half_cache=half_cache)
        return engine, open_tokenizer(str(folder)), f"engine: {engine.describe()}"
    if choice == "native":
        raise UserError(f"--engine native: {reason}")
    if threads is not None:
        torch.set_num_threads(threads)
    return *open_model(name), f"engine: transformers ({reason})"


def _within(folder: Path, context: int | None) -> int | None:
    """`context`, or the model's where that is less; None is the model's."""
    return context and min(context, int(AutoConfig.from_pretrained(folder).max_position_embeddings))


def _why_not_native(folder: Path, choice: EngineName) -> str | None:
    """Why the native loop is not taken for this model; None where it is."""
    if not folder.is_dir():
        return f"{folder} is no local folder"
    check_folder(folder)
    if is_training_checkpoint(folder):
        return "a training checkpoint; `wf export` makes a packed folder of it"
    settings = AutoConfig.from_pretrained(folder)
    quantization = settings.to_dict().get("quantization_config") or {}
    if choice == "auto" and quantization.get("quant_method") != QUANT_METHOD:
        return "not a packed folder"
    if choice == "auto" and torch.cuda.is_available():
        return "there is a GPU"
    return supports(settings)
