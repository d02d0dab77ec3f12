"""Which model a person means, by the name of a model config or by anything that `load` reads."""

from pathlib import Path

from omegaconf import OmegaConf

from wrinklefree import distributed, load
from wrinklefree.config import CONFIGS, options


def locate(name: str) -> str:
    """`pretrained` of the model config `name` (`tiny`), unless a folder has that name; else `name` itself."""
    if Path(name).exists() or name not in options("model"):
        return name
    return str(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml").pretrained)


def open_model(name: str) -> load.Loaded:
    """The model in eval mode, on the GPU where there is one, and its tokenizer. Raises UserError like `load`."""
    model, tokenizer = load.load(locate(name))
    model.to(distributed.start().device)
    return model, tokenizer
