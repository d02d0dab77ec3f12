"""Which model a person means, by the name of a model config or by anything that `load` reads."""

from pathlib import Path

import torch

from wrinklefree import config, distributed, load
from wrinklefree.config import options


def locate(name: str) -> str:
    """`pretrained` of the model config `name` (`tiny`), unless a folder has that name; else `name` itself."""
    if Path(name).exists() or name not in options("model"):
        return name
    return config.load([f"model={name}"]).model.pretrained


def open_model(name: str) -> load.Loaded:
    """The model in eval mode, on the GPU where there is one, and its tokenizer. Raises UserError like `load`."""
    device = distributed.start().device
    dtype = torch.float32 if device.type == "cpu" else None  # as exact as the checkpoint that it may be compared with
    model, tokenizer = load.load(locate(name), dtype=dtype)
    return model.to(device), tokenizer
