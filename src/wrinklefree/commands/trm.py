"""`wf trm`: run the stages of LLM-TRM, which lets a model think in latent vectors."""

import importlib
from typing import Any

from wrinklefree.cloud.processes import for_scale
from wrinklefree.cloud.start import start
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import dry_run as preview
from wrinklefree.runs import mirror, remote_paths

# For each verb: the module in `thinking/`, the function in it that runs the stage, and the training config.
VERBS = {
    "pairs": ("pairs_stage", "make_pairs", "trm_pairs"),
    "train": ("stages", "train_network", "trm_recursion"),
    "inject": ("stages", "train_adapter", "trm_injection"),
    "grpo": ("stages", "reinforce", "trm_grpo"),
    "eval": ("compare", "compare_ways", "trm_eval"),
}

COMPRESSOR = "trm_compressor"


def run(
    verb: str,
    overrides: list[str],
    force: bool,
    sweep: str | None = None,
    scale: str | None = None,
    dry_run: bool = False,
    elsewhere: dict[str, Any] | None = None,
) -> None:
    """Run one stage. Raises UserError for anything that the user can fix.

    `dry_run` and `elsewhere` are as for `wf train`. A thinker is trained in one process, whatever the `scale`.
    """
    training = COMPRESSOR if verb == "compressor" else VERBS[verb][2]
    overrides = remote_paths.fetched(overrides) if elsewhere is None else overrides
    config = load_stage(overrides, training)
    if elsewhere is not None:
        start([[f"training={training}", *overrides]], elsewhere, dry_run)
    elif dry_run:
        preview.show_chain([config])
    elif (for_scale(scale, None) or 1) > 1:
        raise UserError(f"--scale {scale}: wf trm trains in one process: use dev or small, or leave it out")
    else:
        mirror.bring_back(config)
        if verb == "compressor":
            run_compressor(config, force, sweep)
        else:
            module, function, _ = VERBS[verb]
            vars(importlib.import_module(f"wrinklefree.thinking.{module}"))[function](config, force)
        mirror.send(config)


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
