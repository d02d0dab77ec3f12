"""`wf train` and `wf fairy2`: run one training stage."""

import logging

import torch

from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.data.open import is_unwritten
from wrinklefree.distributed.world import World, own_device
from wrinklefree.models.find import at_hand
from wrinklefree.models.load import meta_model, open_tokenizer
from wrinklefree.runs import launch, preflight, self_text
from wrinklefree.runs.budget import CommandBudget, command_budget
from wrinklefree.training.plan import choose_length, choose_minutes, make_plan

log = logging.getLogger("wrinklefree")

# Processes, batch size and accumulation steps, from the guide's table. `dev` also runs without a GPU.
SCALES = {"dev": (1, 8, 1), "small": (1, 8, 8), "medium": (2, 8, 4), "large": (4, 8, 2), "xlarge": (8, 8, 1)}


def run(
    overrides: list[str],
    *,
    dry_run: bool = False,
    force: bool = False,
    scale: str | None = None,
    processes: int | None = None,
    budget: str | None = None,
) -> None:
    """Train one stage with the settings in `overrides`. Raises UserError for anything that the user can fix.

    `budget` is the time for all of it, such as `2h`.
    `scale` is a name in SCALES. With `dry_run`, the settings are printed and nothing is trained.
    """
    if scale is not None:
        processes, batch_size, accumulation = SCALES[scale]
        sizes = [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={accumulation}"]
        overrides = [*overrides[:2], *sizes, *overrides[2:]]  # the user's own settings come later and win
    config = load_config(overrides)
    minutes = command_budget(budget, config)
    if minutes is not None:
        minutes.say(launch.shares_of(minutes, config, overrides, launch.needed_stages(config)))
    if dry_run:
        own = [] if minutes is None else minutes.settings(overrides, config, _before(minutes, config, overrides))
        show(load_config([*overrides, *own]), processes or launch.count_processes(config, None))
        return
    if scale not in (None, "dev") and processes is not None:
        check_gpus(processes, f"--scale {scale}")
    launch.run_stage(overrides, force=force, processes=processes, budget=minutes)


def _before(budget: CommandBudget, config: Config, overrides: list[str]) -> list[float]:
    """The shares of the stages that will take their minutes before this one."""
    shares = launch.shares_of(budget, config, overrides, launch.needed_stages(config))
    return [share for stage, share in shares.items() if stage != config.training.stage]


def show(config: Config, processes: int) -> None:
    """Print the config for `--dry-run`. If the model is on this machine, also log what each `auto` resolves to."""
    print(config_yaml(config), end="")
    source = at_hand(config.model.pretrained)
    if source is None:
        log.info("%s is not on this machine: the values of `auto` depend on it", config.model.pretrained)
    else:
        model = meta_model(str(source), config.model.trust_remote_code)
        t, device = config.training, own_device()
        minutes = choose_minutes(t, config.model, device)
        length = choose_length(t.max_seq_length, model, config.distillation.cache, minutes)
        plan = make_plan(t, config.model, model, length, World(0, processes, device))
        tokenizer = open_tokenizer(str(source), config.model.trust_remote_code)
        if is_unwritten(config.data):
            log.info("%s", self_text.describe(config, tokenizer, plan.minutes))
        size = preflight.text_size(config, tokenizer, plan)
        if size is not None:
            preflight.say_text(size, plan)
            problem = preflight.too_many_passes(config, size, plan)
            if problem is not None:
                log.warning("the run would be refused: %s", problem)
    log.info("dry run: nothing was trained or written")


def check_gpus(processes: int, what: str) -> None:
    """Raise UserError if this machine has fewer than `processes` GPUs. `what` names the option in the message."""
    gpus = torch.cuda.device_count()
    if gpus < processes:
        raise UserError(f"{what} needs {processes} GPU(s), this machine has {gpus}: use --scale dev, or leave it out")
