"""`wf trm`: run the stages of LLM-TRM, which lets a model think in latent vectors."""

import importlib

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError

# For each verb: the module in `thinking/`, the function in it that runs the stage, and the training config.
VERBS = {
    "pairs": ("pairs_stage", "make_pairs", "trm_pairs"),
    "train": ("stages", "train_network", "trm_recursion"),
    "inject": ("stages", "train_adapter", "trm_injection"),
    "grpo": ("stages", "reinforce", "trm_grpo"),
    "eval": ("compare", "compare_ways", "trm_eval"),
}


def run(verb: str, overrides: list[str], force: bool, sweep: str | None = None) -> None:
    """Run one stage. Raises UserError for anything that the user can fix."""
    if verb == "compressor":
        run_compressor(load_stage(overrides, "trm_compressor"), force, sweep)
        return
    module, function, training = VERBS[verb]
    stage = vars(importlib.import_module(f"wrinklefree.thinking.{module}"))[function]
    stage(load_stage(overrides, training), force)


def run_compressor(config: Config, force: bool, sweep: str | None) -> None:
    """Make one compressor, or one for each width in `sweep` (such as `64,128`). Raises UserError for other widths."""
    from wrinklefree.thinking.compressor import make_compressor, sweep_compressors

    if sweep is None:
        make_compressor(config, force)
        return
    widths = sweep.split(",")
    if not all(width.strip().isdigit() for width in widths):
        raise UserError(f"--sweep {sweep}: give numbers with commas in between, such as 64,128,256")
    sweep_compressors(config, [int(width) for width in widths], force)


def load_stage(overrides: list[str], training: str) -> Config:
    """The config of the stage that `training` names. Raises UserError for a setting without effect."""
    config = load_config([f"training={training}", *overrides])
    if config.auto_prereq:
        raise UserError("auto_prereq=true: has no effect on `wf trm`, whose stages are run one by one")
    return config
