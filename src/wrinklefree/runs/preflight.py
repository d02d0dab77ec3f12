"""Checks a run before its model is loaded and before anything is written.

    trackers    their packages are installed
    storage     the driver is there, and the place takes files
    models      the model, the teacher and the KD cache are there
    data        the first rows can be read, for training and for evaluation
    disk        the checkpoints fit
    memory      one block fits, or the whole model if it is trained as such

Once the model is loaded, the plan says how often the text is gone through.
"""

import logging
import math
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import free_bytes
from wrinklefree.data.kd_cache.read import KDCache
from wrinklefree.data.open import is_unwritten
from wrinklefree.data.preview import Size, preview, size_of
from wrinklefree.distributed.world import own_device
from wrinklefree.models.check import check_folder
from wrinklefree.models.find import at_hand, model_folder, model_source
from wrinklefree.models.load import meta_model, open_tokenizer
from wrinklefree.runs import memory, prerequisites
from wrinklefree.runs.folder import outputs
from wrinklefree.tracking.services import check_service
from wrinklefree.tracking.terminal import short_number, short_size
from wrinklefree.training import storage
from wrinklefree.training.plan import Plan

log = logging.getLogger("wrinklefree")

# Bytes a parameter: its fp32 weight, and AdamW's two moments in a checkpoint that can be resumed from.
WEIGHT, MOMENTS = 4, 8


def check_places(config: Config) -> None:
    """Raises UserError if a tracker is not installed, or if `training.upload_to` takes no files."""
    if config.training.logging.wandb.enabled:
        check_service(config.training.logging.wandb.service)
    if config.training.upload_to is not None:
        storage.check_writable(config.training.upload_to)


def check_model(config: Config, reads_text: bool) -> None:
    """Raises UserError if the model, the teacher, the KD cache, the text or the room on the disk is missing."""
    source = model_source(config.model.pretrained)
    if Path(source).exists():
        check_folder(Path(source))
    named = prerequisites.teacher(config)
    if named is not None and Path(teacher := model_source(named)).exists():
        check_folder(Path(teacher))
    if config.distillation.cache is not None:
        KDCache(Path(config.distillation.cache))
    elif reads_text and not is_unwritten(config.data):
        preview(config.data, open_tokenizer(source, config.model.trust_remote_code))
    if config.thinking is None:  # a thinker is far smaller than its model
        if config.training.max_steps != 0 or config.rebuilds:
            check_disk(config)
        check_memory(config)


def check_text(config: Config, reads_text: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the KD cache or the text of a model in memory is missing."""
    if config.distillation.cache is not None:
        KDCache(Path(config.distillation.cache))
    elif reads_text and not is_unwritten(config.data):
        preview(config.data, tokenizer)


def check_disk(config: Config) -> None:
    """Raises UserError if the disk has no room for the checkpoints of this run."""
    model = skeleton(config)
    if model is None:
        return
    parameters = int(model.num_parameters())
    out = Path(config.output_dir)
    # What an earlier run wrote will be replaced. Other files stay, and there may be very many.
    files = (file for path in outputs(out) for file in (path, *path.rglob("*")))
    there = sum(file.stat().st_size for file in files if file.is_file())
    needed, free = checkpoint_bytes(config, parameters), free_bytes(out) + there
    # Written while what it replaces is still there.
    first = parameters * (WEIGHT if config.training.max_steps == 0 else WEIGHT + MOMENTS)
    if needed > free or first > free_bytes(out):
        raise UserError(
            f"{out}: the checkpoints of this run need {short_size(needed)}, and the disk has {short_size(free)} for "
            f"them: another output_dir, or a smaller training.save_total_limit (now {config.training.save_total_limit})"
        )


def check_memory(config: Config) -> None:
    """Raises UserError if a CPU has too little memory for a run that it does alone."""
    model, free = skeleton(config), memory.available()
    if model is None or free is None or own_device().type != "cpu" or config.distributed.strategy != "replicate":
        return
    t, alone = config.training, stays_stored(config)
    parts = memory.of_blocks(model, config.method, t) if alone else memory.of_training(model, t)
    needed = sum(parts.values())
    if needed <= free:
        return
    parted = ", ".join(f"{name} {short_size(size)}" for name, size in parts.items())
    advice = "a smaller training.batch_size or training.max_seq_length, or a machine with more"
    if not alone and config.method is not None:
        other = sum(memory.of_blocks(model, config.method, t).values())
        advice = f"training=blockwise, which takes {short_size(other)}, or a machine with more"
    raise UserError(
        f"{config.model.pretrained}: this run takes about {short_size(needed)} of memory ({parted}), and "
        f"{short_size(free)} are free: {advice}"
    )


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """The most that a run's checkpoints and its final model take, while one more checkpoint is being written."""
    t = config.training
    checkpoints = 0 if t.max_steps == 0 else (t.save_total_limit + 1) * (WEIGHT + MOMENTS)
    models = (3 if t.keep_best else 1) * WEIGHT  # final/, the best model, and the one before it
    models += WEIGHT if config.rebuilds else 0  # its blocks
    return parameters * (checkpoints + models)


def stays_stored(config: Config) -> bool:
    """Whether the models of a run stay in files: on a CPU, if it trains no more than one block at a time."""
    alone = config.training.max_steps == 0 and config.distributed.strategy == "replicate"
    return config.rebuilds and alone and own_device().type == "cpu"


def skeleton(config: Config) -> PreTrainedModel | None:
    """The model without weights, on the meta device, if its config is on this machine; None if it is not."""
    source = at_hand(config.model.pretrained)
    return None if source is None else meta_model(str(model_folder(source)), config.model.trust_remote_code)


def check_passes(config: Config, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Size | None:
    """Log which text is gone through, and how often. Returns its size, or None if that is not known.

    Raises UserError if a number of tokens goes through it more often than `data.max_passes`. A number of steps may, and
    so may a number of minutes, which nobody can turn into passes beforehand.
    """
    size = text_size(config, tokenizer, plan)
    if size is not None:
        say_text(size, plan)
        _refuse_passes(config, size, plan)
    return size


def check_unwritten(config: Config, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
    """Raises UserError if a number of tokens goes through text that is still to be written too often."""
    size = text_size(config, tokenizer, plan)
    if size is not None:
        _refuse_passes(config, size, plan)


def _refuse_passes(config: Config, size: Size, plan: Plan) -> None:
    problem = too_many_passes(config, size, plan)
    if problem is not None:
        raise UserError(problem)


def text_size(config: Config, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Size | None:
    """How much text the plan goes through; None if that is not known, or if it goes through none."""
    if config.distillation.cache is not None or plan.max_steps == 0:
        return None
    size = size_of(config.data, tokenizer)
    return None if size is None or size.tokens == 0 else size


def say_text(size: Size, plan: Plan) -> None:
    """Log which text is gone through, and how often if that is known."""
    passes = "" if plan.minutes is not None else f"; the plan goes through it {_passes(size, plan):.3g} times"
    log.info("text: %s, about %s tokens%s", size.name, short_number(size.tokens), passes)


def too_many_passes(config: Config, size: Size, plan: Plan) -> str | None:
    """Why the plan goes through the text too often, or None."""
    passes, limit = _passes(size, plan), config.data.max_passes
    if plan.minutes is not None or plan.total_tokens is None or passes <= limit:
        return None
    more = _more(config, passes / limit)
    return (
        f"{plan.total_tokens:,} tokens are {passes:.3g} passes over {size.name}: {more}, train "
        f"on fewer (training.total_tokens={int(limit * size.tokens)}), or allow it (data.max_passes={passes + 1:.0f})"
    )


def _more(config: Config, times: float) -> str:
    """Say how to get more text, `times` as much as there is."""
    if config.data.source != "self":
        return "give more text (data=local data.path=FOLDER)"
    enough = math.ceil(1.05 * times * config.data.self_tokens)  # its size is estimated from a sample
    return f"let the model write more (data.self_tokens={enough})"


def say_passes(config: Config, size: Size, plan: Plan) -> None:
    """Log how often a plan that fits a budget goes through the text, and what to do if that is too often."""
    passes, limit = _passes(size, plan), config.data.max_passes
    more = f"; better: {_more(config, passes / limit)}" if passes > limit else ""
    log.info("the plan goes through the text %.3g times%s", passes, more)


def _passes(size: Size, plan: Plan) -> float:
    return plan.max_steps * plan.tokens_per_step / size.tokens
