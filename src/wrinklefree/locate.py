"""Which model a person means: by a config's name, a run's folder, or anything that `load` reads."""

import logging
from pathlib import Path

from omegaconf import OmegaConf

from wrinklefree import distributed, load
from wrinklefree.config import CONFIGS, options

log = logging.getLogger("wrinklefree")


def locate(name: str) -> str:
    """`final/` of a run folder, `pretrained` of a model config (`tiny`), or else `name` itself."""
    folder = Path(name)
    if not folder.exists() and name in options("model"):
        return str(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")["pretrained"])
    if (folder / "final" / "config.json").is_file() and not (folder / "config.json").is_file():
        log.info("%s is a run: using %s", name, folder / "final")
        return str(folder / "final")
    return name


def open_model(name: str) -> load.Loaded:
    """The model in eval mode, on the GPU where there is one, and its tokenizer. Raises UserError like `load`."""
    model, tokenizer = load.load(locate(name))
    model.to(distributed.start().device)
    return model, tokenizer
