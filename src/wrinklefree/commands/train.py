"""`wf train` and `wf fairy2`: one stage of training."""

import logging

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.distributed.world import World
from wrinklefree.models.find import at_hand
from wrinklefree.runs import launch
from wrinklefree.training.plan import choose_length, make_plan

log = logging.getLogger("wrinklefree")

# The guide's table: processes, batch size, accumulation; `dev` is for trying out, on whatever there is.
SCALES = {"dev": (1, 8, 1), "small": (1, 8, 8), "medium": (2, 8, 4), "large": (4, 8, 2), "xlarge": (8, 8, 1)}


def run(
    overrides: list[str],
    *,
    dry_run: bool = False,
    force: bool = False,
    scale: str | None = None,
    processes: int | None = None,
) -> None:
    """Train as the overrides say. Raises UserError for anything the user can mend."""
    if scale is not None:
        processes, batch_size, accumulation = SCALES[scale]
        sizes = [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={accumulation}"]
        overrides = [*overrides[:2], *sizes, *overrides[2:]]
    if dry_run:
        show(load_config(overrides), processes or 1)
        return
    if scale not in (None, "dev") and processes is not None:
        load_config(overrides)
        check_gpus(processes, f"--scale {scale}")
    launch.run_stage(overrides, force=force, processes=processes)


def show(config: Config, processes: int) -> None:
    """`--dry-run`: the resolved config and, where the model is at hand, what `auto` means for it."""
    print(config_yaml(config), end="")
    source = at_hand(config.model.pretrained)
    if source is None:
        log.info("%s is not at hand: what `auto` means depends on it", config.model.pretrained)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        length = choose_length(config.training.max_seq_length, model, config.distillation.cache)
        make_plan(config.training, config.model, model, length, World(0, processes, torch.device("cpu")))
    log.info("dry run: nothing was trained or written")


def check_gpus(processes: int, what: str) -> None:
    found = torch.cuda.device_count()
    if found < processes:
        raise UserError(f"{what} needs {processes} GPU(s), this machine has {found}: use --scale dev, or leave it out")
