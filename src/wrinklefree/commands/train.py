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
from wrinklefree.training.plan import choose_length, make_plan

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
) -> None:
    """Train one stage with the settings in `overrides`. Raises UserError for anything that the user can fix.

    `scale` is a name in SCALES. With `dry_run`, the settings are printed and nothing is trained.
    """
    if scale is not None:
        processes, batch_size, accumulation = SCALES[scale]
        sizes = [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={accumulation}"]
        overrides = [*overrides[:2], *sizes, *overrides[2:]]  # the user's own settings come later and win
    if dry_run:
        config = load_config(overrides)
        show(config, processes or launch.count_processes(config, None))
        return
    if scale not in (None, "dev") and processes is not None:
        load_config(overrides)
        check_gpus(processes, f"--scale {scale}")
    launch.run_stage(overrides, force=force, processes=processes)


def show(config: Config, processes: int) -> None:
    """Print the config for `--dry-run`. If the model is on this machine, also log what each `auto` resolves to."""
    print(config_yaml(config), end="")
    source = at_hand(config.model.pretrained)
    if source is None:
        log.info("%s is not on this machine: the values of `auto` depend on it", config.model.pretrained)
    else:
        model = meta_model(str(source), config.model.trust_remote_code)
        length = choose_length(config.training.max_seq_length, model, config.distillation.cache)
        plan = make_plan(config.training, config.model, model, length, World(0, processes, own_device()))
        tokenizer = open_tokenizer(str(source), config.model.trust_remote_code)
        if is_unwritten(config.data):
            log.info("%s", self_text.describe(config, tokenizer))
        problem = preflight.too_many_passes(config, tokenizer, plan)
        if problem is not None:
            log.warning("the run would be refused: %s", problem)
    log.info("dry run: nothing was trained or written")


def check_gpus(processes: int, what: str) -> None:
    """Raise UserError if this machine has fewer than `processes` GPUs. `what` names the option in the message."""
    gpus = torch.cuda.device_count()
    if gpus < processes:
        raise UserError(f"{what} needs {processes} GPU(s), this machine has {gpus}: use --scale dev, or leave it out")
