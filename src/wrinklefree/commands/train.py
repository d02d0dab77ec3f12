"""`wf train` and `wf fairy2`: run one training stage."""

import logging
from typing import Any

from wrinklefree.cloud.places import scales
from wrinklefree.cloud.processes import for_scale
from wrinklefree.cloud.start import start
from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.runs import dry_run as preview
from wrinklefree.runs import launch
from wrinklefree.runs.budget import CommandBudget, command_budget

log = logging.getLogger("wrinklefree")


def run(
    overrides: list[str],
    *,
    dry_run: bool = False,
    force: bool = False,
    scale: str | None = None,
    processes: int | None = None,
    budget: str | None = None,
    elsewhere: dict[str, Any] | None = None,
) -> None:
    """Train one stage with the settings in `overrides`. Raises UserError for anything that the user can fix.

    `budget` is the time for all of it, such as `2h`.
    `scale` is a name in cloud/places.yaml. With `dry_run`, the settings are printed and nothing is trained.
    With `elsewhere`, the fields of a `cloud.job.Request`, the command runs there, not here.
    """
    if scale is not None:
        overrides = [*overrides[:2], *scales()[scale].settings(), *overrides[2:]]  # the user's own come later and win
    if elsewhere is not None:
        start([overrides], elsewhere, dry_run, budget)
        return
    config = load_config(overrides)
    minutes = command_budget(budget, config)
    if minutes is not None:
        minutes.say(launch.shares_of(minutes, config, overrides, launch.needed_stages(config)))
    if dry_run:
        own = [] if minutes is None else minutes.settings(overrides, config, _before(minutes, config, overrides))
        number = processes or (None if scale is None else scales()[scale].gpus)
        preview.show(load_config([*overrides, *own]), number or launch.count_processes(config, None))
        return
    launch.run_stage(overrides, force=force, processes=for_scale(scale, processes), budget=minutes)


def _before(budget: CommandBudget, config: Config, overrides: list[str]) -> list[float]:
    """The shares of the stages that will take their minutes before this one."""
    shares = launch.shares_of(budget, config, overrides, launch.needed_stages(config))
    return [share for stage, share in shares.items() if stage != config.training.stage]
