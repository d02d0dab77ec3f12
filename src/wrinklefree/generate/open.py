"""Open the model that a user names, and choose what runs it: the native engine or transformers.

A name is that of a model config (`tiny`), a run or model folder, a GGUF file, or a hub id.
"""

import shlex
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from wrinklefree.config.compose import load_config
from wrinklefree.config.groups import options
from wrinklefree.core.errors import UserError
from wrinklefree.distributed.world import join_world
from wrinklefree.engine.engine import Engine, supports
from wrinklefree.families.architectures import positions
from wrinklefree.models.check import check_folder
from wrinklefree.models.find import model_folder, resolve_pretrained
from wrinklefree.models.gguf import gguf_folder, is_gguf
from wrinklefree.models.integers import integers_folder
from wrinklefree.models.load import Loaded, checkpoint_config, load_model, open_config, open_tokenizer
from wrinklefree.packed.quantizer import QUANT_METHOD

EngineName = Literal["auto", "native", "transformers"]


def pretrained_of(name: str) -> str:
    """The folder or hub id that `name` means: for the name of a model config its `pretrained`, else `name` itself.

    For a GGUF file, and for a folder with BitNet's or compressed-tensors' integers, that is a packed folder, which the
    first call writes. A path that exists comes before a model config of the same name.
    """
    if is_gguf(name):
        return str(gguf_folder(Path(name), "packed"))
    if Path(name).exists():
        return str(integers_folder(model_folder(Path(name))) or name)
    if name not in options("model"):
        return name
    return load_config([f"model={name}"]).model.pretrained


def open_model(name: str, trust_remote_code: bool = False) -> Loaded:
    """Load a model in eval mode, on the GPU if there is one, and its tokenizer.

    Raises UserError if there is no such model, or it cannot be loaded.
    """
    device = join_world().device
    # fp32 on a CPU, so that the figures of a packed folder can be compared with those of its checkpoint.
    dtype = torch.float32 if device.type == "cpu" else None
    model, tokenizer = load_model(pretrained_of(name), dtype=dtype, trust_remote_code=trust_remote_code)
    return model.to(device), tokenizer


def open_engine(
    name: str,
    choice: EngineName = "auto",
    threads: int | None = None,
    slots: int = 1,
    context: int | None = None,
    half_cache: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """Open a model to generate text: an `Engine` or a transformers model, its tokenizer, and a line that says which.

    `auto` chooses the native engine for packed folders that it can run. A native engine answers up to `slots`
    sequences at once, each of `context` tokens, or of the model's context if that is shorter.
    Raises UserError if there is no such model, or `choice` is `native` and the engine cannot run it.
    """
    folder, reason = engine_for(name, choice, trust_remote_code)
    if reason is None:
        engine = Engine.from_folder(folder, threads, _within(folder, context), slots, half_cache=half_cache)
        return engine, open_tokenizer(str(folder)), f"engine: {engine.describe()}"
    if threads is not None:
        torch.set_num_threads(threads)
    return *open_model(name, trust_remote_code), f"engine: transformers ({reason})"


def engine_for(name: str, choice: EngineName = "auto", trust_remote_code: bool = False) -> tuple[Path, str | None]:
    """The folder of a model, and why transformers runs it; None if the native engine does.

    Raises UserError if there is no such model, or `choice` is `native` and the engine cannot run it.
    """
    folder = model_folder(Path(resolve_pretrained(pretrained_of(name))))
    reason = "asked for" if choice == "transformers" else _why_not_native(folder, choice, trust_remote_code)
    if choice == "native" and reason is not None:
        raise UserError(f"--engine native: {reason}")
    return folder, reason


def _within(folder: Path, context: int | None) -> int | None:
    """`context`, but no more than the model's context. None means the model's context."""
    return context and min(context, positions(open_config(str(folder))) or context)


def _why_not_native(folder: Path, choice: EngineName, trust_remote_code: bool) -> str | None:
    """Why the native engine is not used for this model, or None if it is used."""
    if not folder.is_dir():
        return f"{folder} is no local folder"
    check_folder(folder)
    if checkpoint_config(folder) is not None:
        return f"a training checkpoint; `wf export {shlex.quote(str(folder))}` makes a packed folder of it"
    settings = open_config(str(folder), trust_remote_code)
    quantization = settings.to_dict().get("quantization_config") or {}
    if choice == "auto" and quantization.get("quant_method") != QUANT_METHOD:
        return "not a packed folder"
    if choice == "auto" and torch.cuda.is_available():
        return "there is a GPU"
    return supports(settings)
