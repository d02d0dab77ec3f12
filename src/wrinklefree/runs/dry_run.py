"""What `--dry-run` shows of a stage: its settings, and what each `auto` comes to."""

import logging

from wrinklefree.config.compose import config_yaml
from wrinklefree.config.schema import Config
from wrinklefree.data.open import is_unwritten
from wrinklefree.distributed.world import World, own_device
from wrinklefree.models.find import at_hand
from wrinklefree.models.load import meta_model, open_tokenizer
from wrinklefree.runs import preflight, self_text
from wrinklefree.training.plan import choose_length, choose_minutes, make_plan

log = logging.getLogger("wrinklefree")


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


def show_chain(configs: list[Config]) -> None:
    """Print the settings of several stages as YAML documents."""
    for number, config in enumerate(configs):
        print("---\n" if number else "", end="")
        print(config_yaml(config), end="")
    log.info("dry run: nothing was trained or written")
