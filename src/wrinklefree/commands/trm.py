"""`wf trm`: the stages of a thinker."""

import importlib

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError

# What runs each verb, and the training that its settings come from.
VERBS = {
    "pairs": ("stages", "make_pairs", "trm_pairs"),
    "train": ("stages", "recursion", "trm_recursion"),
    "inject": ("stages", "injection", "trm_injection"),
    "grpo": ("stages", "grpo", "trm_grpo"),
    "eval": ("compare", "compare_ways", "trm_eval"),
}


def run(verb: str, overrides: list[str], force: bool, sweep: str | None = None) -> None:
    """One stage. Raises UserError for anything the user can mend."""
    if verb == "compressor":
        compressor(load(overrides, "trm_compressor"), force, sweep)
        return
    module, function, training = VERBS[verb]
    stage = vars(importlib.import_module(f"wrinklefree.thinking.{module}"))[function]
    stage(load(overrides, training), force)


def compressor(config: Config, force: bool, sweep: str | None) -> None:
    """One compressor, or one of each width. Raises UserError for widths that are no numbers."""
    from wrinklefree.thinking import compressor as stage

    if sweep is None:
        stage.run(config, force)
        return
    widths = sweep.split(",")
    if not all(width.strip().isdigit() for width in widths):
        raise UserError(f"--sweep {sweep}: numbers with commas in between, such as 64,128,256")
    stage.sweep(config, [int(width) for width in widths], force)


def load(overrides: list[str], training: str) -> Config:
    return load_config([f"training={training}", *overrides])
